"""A first run of a model in a process of its own, so that one that crashes, hangs or swallows memory harms nothing.

`python -m minexp.deploy.trial PATH` loads the model, runs it on one grey image and says so by its exit code.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from ..errors import RequestError

SECONDS = 120
MEMORY = 4 << 30  # bytes of address space, and 16 times the file on top


def try_model(path: Path, *, provider: str = "cpu") -> None:
    """Raises RequestError, one line, when the model cannot be loaded and run within the limits."""
    command = [sys.executable, "-m", "minexp.deploy.trial", str(path), provider]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise RequestError(f"{path}: one image took more than {SECONDS} s; it is not run") from None
    if done.returncode == 0:
        return
    if done.returncode == RequestError.exit_code:
        raise RequestError(done.stdout.strip().splitlines()[-1])
    why = f"signal {-done.returncode}" if done.returncode < 0 else "not enough memory, or another failure"
    raise RequestError(f"{path}: running it ends in {why}; it is damaged or hostile, and is not run")


def _limit(path: Path) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has such limits
        import resource

        memory = MEMORY + 16 * path.stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(path: str, provider: str) -> int:
    if provider == "cpu":  # a GPU's driver maps more address space than there is memory
        _limit(Path(path))
    from .runtime import Explainer

    try:
        Explainer(path, provider=provider, threads=1, trusted=True).warm_up()
    except RequestError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
