"""`python -m minexp`, the command line where no script is installed, as under torchrun."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
