"""Who writes to a store: one job as a whole, or several parts of one job side by side."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

from ..errors import RequestError

LOCK = ".lock"
Part = tuple[int, int]  # (i, n): the i-th of n parts of a job, from 0; (0, 1) is the job as a whole


def hold(owner: object, directory: Path, part: Part) -> Callable[[], object]:
    """Hold the directory for one part of a job, where the file system knows locks: two writers would do work twice.

    Returns what releases it; it is also released when ``owner`` or the process goes. Raises RequestError when the
    whole job, this part, or parts of another division are being written.
    """
    try:
        import fcntl
    except ImportError:
        return lambda: None
    whole = part[1] == 1
    held: list[int] = []

    def take(path: Path, kind: int) -> None:
        handle = os.open(
            path, os.O_RDWR | os.O_CREAT, 0o666
        )  # opened for writing: network file systems ask for it
        held.append(handle)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            release()
            raise RequestError(
                f"another process is writing to {directory}: wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks

    release = weakref.finalize(owner, _close, held)
    take(directory / LOCK, fcntl.LOCK_EX if whole else fcntl.LOCK_SH)
    if not whole:
        mine = directory / f"{LOCK}-{part[0]}-of-{part[1]}"
        take(mine, fcntl.LOCK_EX)
        for other in directory.glob(f"{LOCK}-*-of-*"):
            if not other.name.endswith(f"-of-{part[1]}"):
                take(other, fcntl.LOCK_SH)  # nobody works on parts of another division
    return release


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())
