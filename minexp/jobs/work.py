"""What one process of a job does: tasks in, shards on disk, events out. No torch."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ..data.items import ImageSource
from ..data.preprocessing import Preprocessing
from ..data.shard import Reserve, Shard, write_shard
from ..data.table import Columns, Table
from ..errors import MinexpError
from .unit import Unit, batch_of

Thing = TypeVar("Thing")
Truths = Callable[[int | None], int | None]


@dataclass(frozen=True)
class Job:
    """What is done with every image, and where it is stored; travels to every process of the job.

    unit: makes the core unit of the worker of that number, in its process. truths: from the source's label to the
    model's class. row_bytes: what a row takes on disk at most. flush_seconds: how long rows wait for their shard to be
    full. fail_fast: the first row with an error ends the job.
    """

    unit: Callable[[int], Unit]
    table: Table
    run: Mapping[str, Any]
    directory: Path
    preprocessing: Preprocessing
    truths: Truths
    batch: int
    row_bytes: int
    flush_seconds: float
    fail_fast: bool


@dataclass(frozen=True)
class Task:
    """Positions start <= position < stop of the source, whose items are all there is in ``part``."""

    part: ImageSource
    start: int
    stop: int


@dataclass(frozen=True)
class Progress:
    """Rows made that are not on disk yet, by status; and what was left out of their images, by how many."""

    statuses: Mapping[str, int]
    notes: Mapping[str, int]


@dataclass(frozen=True)
class Finished:
    """All rows of the task are on disk."""

    start: int


@dataclass(frozen=True)
class Lost:
    """A worker died: what it had done and not stored is to be done again."""


Event = Shard | Progress | Finished | Lost


class RowError(MinexpError):
    """A row failed in a job that is to stop at the first one."""

    exit_code = 3


def work(
    job: Job, unit: Unit, tasks: Iterator[Task], emit: Callable[[Event], None], stopping: Callable[[], bool]
) -> None:
    """Do the tasks in order; the next batch is read and decoded while the unit has one.

    What is made reaches the disk whatever happens in between: an exception or ``stopping`` ends the work after the rows
    that are ready are written.
    """
    rows = _Rows(job, emit)
    try:
        for task, batch in ahead(batches_of(job, tasks, job.batch), depth=2):
            rows.expect(task, int(batch["position"][0]))
            made = unit(batch)
            try:
                rows.add(check_rows(job, batch, made), count_notes(batch))
            except RowError:
                good = {name: values[: _first_error(made)] for name, values in made.items()}
                rows.add(_stored(job, good), count_notes(batch))
                raise
            if rows.complete:
                rows.flush()
                emit(Finished(task.start))
            if stopping():
                return
    finally:
        rows.close()


class _Rows:
    """Rows of one task on their way to the disk."""

    def __init__(self, job: Job, emit: Callable[[Event], None]) -> None:
        self._job, self._emit, self._reserve = job, emit, Reserve(job.directory)
        self._start = self._stop = self._count = 0
        self._waiting: list[pa.Table] = []
        self._since = time.monotonic()

    def expect(self, task: Task, position: int) -> None:
        """The next rows are those from ``position`` on: hold the space they will need."""
        if self._waiting:
            return
        self._start, self._stop, self._since = position, task.stop, time.monotonic()
        self._reserve.hold(position, (task.stop - position) * self._job.row_bytes)

    def add(self, rows: pa.Table, notes: Mapping[str, int]) -> None:
        if len(rows):
            self._waiting.append(rows)
            self._count += len(rows)
            self._emit(Progress(Counter(rows["status"].to_pylist()), notes))
        if time.monotonic() - self._since > self._job.flush_seconds and not self.complete:
            self.flush()

    @property
    def complete(self) -> bool:
        return self._start + self._count == self._stop

    def flush(self) -> None:
        self._reserve.free()
        if self._waiting:
            waiting, start = self._waiting, self._start
            self._waiting, self._start, self._count = [], start + self._count, 0
            self._emit(write_shard(self._job.directory, self._job.table, self._job.run, start, waiting))

    def close(self) -> None:
        self.flush()


def batches_of(job: Job, tasks: Iterator[Task], size: int) -> Iterator[tuple[Task, Columns]]:
    """The tasks' images, decoded, as a unit's input of at most ``size`` of them."""
    height, width = job.preprocessing.size
    shape = (height, width, job.preprocessing.channels)
    for task in tasks:
        # Prepared image by image: a large photograph takes a thousand times the memory of a model's input.
        items = task.part.range(prepare=job.preprocessing.pixels, ahead=size)
        for start in range(task.start, task.stop, size):
            stop = min(start + size, task.stop)
            group = list(islice(items, stop - start))
            yield task, batch_of(group, range(start, stop), job.truths, shape)


def ahead(things: Iterator[Thing], depth: int) -> Iterator[Thing]:
    """The same things, made in a thread that is at most ``depth`` of them ahead."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    over = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not over.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            with closing(things):  # type: ignore[type-var]
                for thing in things:
                    if not put((True, thing)):
                        return
            put((False, None))
        except BaseException as error:  # the consumer's to handle
            put((False, error))

    threading.Thread(target=make, name="ahead", daemon=True).start()
    try:
        while True:
            good, thing = made.get()
            if not good:
                if thing is not None:
                    raise thing
                return
            yield thing
    finally:
        over.set()


def count_notes(batch: Columns) -> Mapping[str, int]:
    """What was left out of images of the batch, and of how many."""
    return Counter(note for note in batch["note"] if note)


def check_rows(job: Job, batch: Columns, made: Columns) -> pa.Table:
    """What a unit made of a batch as it is stored. Raises RowError where the job ends at an error."""
    if len(made["status"]) != len(batch["id"]):
        raise ValueError(f"the unit made {len(made['status'])} rows of {len(batch['id'])} images")
    if job.fail_fast and "error" in made["status"].tolist():
        place = _first_error(made)
        raise RowError(
            f"{made['id'][place]}: {made['error'][place]} (--on-error skip stores such rows and goes on)"
        )
    return _stored(job, made)


def _stored(job: Job, rows: Columns) -> pa.Table:
    """Rows that wait for their shard to be full do so in Arrow's columns: nested ones take much less memory there."""
    return job.table.to_arrow({name: values for name, values in rows.items() if name != "position"})


def _first_error(rows: Columns) -> int:
    return rows["status"].tolist().index("error")
