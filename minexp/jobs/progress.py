"""How far a job is: a bar on a terminal, a line of JSON now and then elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from types import TracebackType

from tqdm import tqdm

from ..data.shard import Shard
from .work import Event, Lost, Progress

EVERY = 30.0  # seconds between lines where there is no terminal


class Meter:
    """Counts rows, those on disk and those on their way there, and shows them on stderr.

    total: rows there will be; done: those there were at the start. good: the status whose share is shown. quiet: count
    only. notes: what was left out of images, by how many.
    """

    def __init__(self, total: int, done: int, *, good: str, quiet: bool) -> None:
        self.total, self._resumed, self._stored = total, done, done
        self._good = good
        self._on_the_way: dict[int, Counter[str]] = {}
        self._statuses: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._lines = not quiet and not sys.stderr.isatty()
        self._started = self._told = time.monotonic()
        self._bar = tqdm(total=total, initial=done, unit="image", disable=True if quiet else None)

    def take(self, event: Event, worker: int) -> None:
        on_the_way = self._on_the_way.setdefault(worker, Counter())
        if isinstance(event, Progress):
            on_the_way.update(event.statuses)
            self.notes.update(event.notes)
        elif isinstance(event, Shard):
            self._stored += event.rows
            self._statuses.update(event.tally.statuses)
            on_the_way.subtract(event.tally.statuses)
            self._on_the_way[worker] = +on_the_way
        elif isinstance(event, Lost):
            on_the_way.clear()
        self._show()

    @property
    def rows(self) -> int:
        return self._stored + sum(counts.total() for counts in self._on_the_way.values())

    def count(self, status: str) -> int:
        """Rows of that status since the start."""
        return self._statuses[status] + sum(counts[status] for counts in self._on_the_way.values())

    def _show(self) -> None:
        rows, new = self.rows, self.rows - self._resumed
        self._bar.n = rows
        if new > 0:
            self._bar.set_postfix({self._good: f"{self.count(self._good) / new:.1%}"}, refresh=False)
        self._bar.update(0)
        if self._lines and (now := time.monotonic()) - self._told >= EVERY:
            self._told = now
            print(json.dumps(self._line(rows, new, now - self._started)), file=sys.stderr, flush=True)

    def _line(self, rows: int, new: int, seconds: float) -> dict[str, object]:
        rate = new / seconds
        return {
            "rows": rows,
            "total": self.total,
            self._good: self.count(self._good),
            "errors": self.count("error"),
            "images_per_second": round(rate, 3),
            "seconds_left": round((self.total - rows) / rate) if rate > 0 else None,
        }

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.refresh()
        self._bar.close()
