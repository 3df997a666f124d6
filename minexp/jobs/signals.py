"""Ctrl-C and SIGTERM as a wish to end well: what is being explained is finished and stored first."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_EXIT = 128  # plus the signal's number, as shells have it


class Stop:
    """Whether the job is to end. Set by the first signal; the second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def raise_if_set(self) -> None:
        """What the signal would have raised."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            sys.exit(_EXIT + self.signal)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A `Stop` that the signals set while the block runs; outside of the main thread nothing sets it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop():
            restore()
            stop.raise_if_set()
        stop.signal = number
        if sys.stderr.isatty():
            print("\nfinishing what is being explained; again to stop at once", file=sys.stderr)

    # A job started in the background ignores SIGINT, and goes on to.
    caught = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in caught}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield stop
    finally:
        restore()
