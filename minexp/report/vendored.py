"""Cytoscape.js, which draws the page of circuits, and how it came into vendor/.

It is kept in the package, so that the page is written without npm and without a network. `make vendor` takes the
version pinned here from the npm registry again.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import resources
from pathlib import Path

from ..data.files import write_text
from ..data.npm import NpmPackage

CYTOSCAPE = NpmPackage(
    "cytoscape",  # the Cytoscape Consortium's, MIT licence
    "3.35.0",
    {
        "cytoscape.min.js": "71fa9ebec21a7ca2c40cff6aacc30d1f6464e363662ad4b2c197e1adc770cd94",
        "LICENSE": "eb319c6e6f233607f71e8e2f450391751883cfc0eeb3ca7ef574c13d1d9c2203",
    },
    "`make vendor FROM=FILE`",
)


@lru_cache(maxsize=1)
def cytoscape() -> str:
    """The library, a classic script; its licence is the comment at its head."""
    return (resources.files(__package__) / "vendor" / "cytoscape.min.js").read_text(encoding="utf-8")


def vendor(folder: Path, source: str | Path | None = None) -> list[Path]:
    """Write the library's files, out of its npm package, to ``folder``, and return them."""
    written = []
    for name, content in CYTOSCAPE.find(source).items():
        path = folder / (f"cytoscape.{name}" if name == "LICENSE" else name)
        write_text(path, content.decode())
        written.append(path)
    return written


if __name__ == "__main__":
    print(*vendor(Path(__file__).parent / "vendor", *sys.argv[1:]), sep="\n")
