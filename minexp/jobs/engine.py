"""A dataset through a core unit, whatever runs it: one row for every input, resumable. No torch."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.lock import Part
from ..data.preprocessing import Preprocessing
from ..data.shard import Shard, Tally
from ..data.sources import ImageSource
from ..data.store import Store
from ..data.table import Table
from ..data.tables import EXPLANATIONS
from ..errors import RequestError
from .progress import Meter
from .signals import Stop, stoppable
from .unit import Unit
from .work import Event, Job, RowError, Task, work


@dataclass(frozen=True)
class Placement:
    """Where a job runs and in how many processes; none of it changes an answer.

    workers: processes; 1 is this one. part: (i, n), the i-th of n parts of the job. errors: rows with an error after
    which the job ends; 0 is the first one, None never. address, gpus: of the Ray cluster, and of it a worker.
    flush_seconds: how long rows wait for their shard to be full: what a killed process has to do again.
    """

    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    part: Part = (0, 1)
    errors: int | None = None
    address: str | None = None
    gpus: float = 0.0
    flush_seconds: float = 60.0

    @property
    def in_process(self) -> bool:
        """Does this process do the work, so that it needs the model where it runs?"""
        return self.engine == "local" and self.workers == 1

    @property
    def threads(self) -> int:
        """Of a worker's operators."""
        return max(1, (os.cpu_count() or 1) // self.workers)


ONE_PROCESS = Placement()


def run_job(
    unit: Callable[[int], Unit],
    source: ImageSource,
    out: str | Path,
    *,
    run: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    batch: int,
    resume: bool = True,
    progress: bool = True,
    placement: Placement = ONE_PROCESS,
    table: Table = EXPLANATIONS,
    row_bytes: int | None = None,
) -> dict[str, Any]:
    """Store one row for every image of ``source`` in the directory ``out``, in the source's order.

    unit: makes the core unit (`minexp.jobs.unit`) of a worker, by its number. run: facts about the job, with
    `fingerprint`, `provider` and `precision`. row_bytes: what a row takes on disk at most, by default a mask and its
    certificate. An input that cannot be decoded, or for which the unit throws, becomes a row with its error. A job that
    was stopped goes on with the rows that are missing; ``resume=False`` starts over. What was left out of images
    (colour profiles) is said in a warning.
    Returns the summary of the rows that this part of the job has in ``out`` (shares of 1; None where no row has the
    figure). Raises RequestError when ``out`` holds another job or the disk is full, RowError after too many rows
    with errors.
    """
    started = time.perf_counter()
    height, width = preprocessing.size
    with Store(out, run=run, rows=len(source), table=table, part=placement.part, resume=resume) as store:
        job = Job(
            unit=unit,
            table=table,
            run=dict(run),
            directory=store.directory.absolute(),
            preprocessing=preprocessing,
            truths=Truths.of(source.class_names, class_names),
            batch=batch,
            row_bytes=height * width // 8 + 1024 if row_bytes is None else row_bytes,
            flush_seconds=placement.flush_seconds,
            fail_fast=placement.errors == 0,
        )
        good = table.statuses[0]
        with Meter(store.rows, store.rows_done, good=good, quiet=not progress) as meter, stoppable() as stop:
            restarts = _Run(job, source, store, meter, placement).finish(stop)
        if store.rows_done < store.rows:
            stop.raise_if_set()
    seconds = time.perf_counter() - started
    for note, count in meter.notes.items():
        warnings.warn(f"{count} of {store.rows_done - store.resumed} images: {note}", stacklevel=2)
    return {
        **summarise(table, store.tally),
        "resumed": store.resumed,
        "seconds": round(seconds, 3),
        "images_per_second": round((store.rows_done - store.resumed) / seconds, 3),
        "provider": run["provider"],
        "precision": run["precision"],
        "workers": placement.workers,
        "restarts": restarts,
        "out": str(out),
    }


class _Run:
    """One process's part of a job, from what is missing to what is stored."""

    def __init__(
        self, job: Job, source: ImageSource, store: Store, meter: Meter, placement: Placement
    ) -> None:
        self._job, self._source, self._store = job, source, store
        self._meter, self._placement = meter, placement
        self._before = store.tally.statuses.get("error", 0)

    def finish(self, stop: Stop) -> int:
        """Do what is missing, or as much as the signals let; the number of workers that were replaced."""
        restarts = 0
        if self._too_many():
            raise self._refusal()
        if gaps := self._store.missing():
            try:
                restarts = self._work(gaps, lambda: stop() or self._too_many())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise RequestError(
                    f"no space is left for {self._store.directory}: {self._store.rows_done} of {self._store.rows} rows"
                    " are stored; free some and give the same command again"
                ) from error
        if self._too_many():
            raise self._refusal()
        return restarts

    def _work(self, gaps: list[tuple[int, int]], stopping: Callable[[], bool]) -> int:
        if self._placement.engine == "ray":
            from .ray import work_on_ray

            return work_on_ray(self._job, self._source, gaps, self._placement, self._take, stopping)
        if not self._placement.in_process:
            from .workers import Workers

            workers = Workers(
                self._placement.workers, self._job, self._source, self._store, threads=self._placement.threads
            )
            workers.run(gaps, self._take, stopping)
            return workers.deaths
        tasks = (Task(self._source.part(start, stop), start, stop) for start, stop in gaps)
        work(self._job, self._job.unit(0), tasks, lambda event: self._take(event, 0), stopping)
        return 0

    def _take(self, event: Event, worker: int) -> None:
        if isinstance(event, Shard):
            self._store.record(event)
        self._meter.take(event, worker)

    def _too_many(self) -> bool:
        most = self._placement.errors
        return most is not None and most > 0 and self._before + self._meter.count("error") > most

    def _refusal(self) -> RowError:
        most = self._placement.errors
        return RowError(
            f"{self._store.directory}: more than {most} rows have errors (--on-error max={most}); the store says which;"
            " --on-error skip goes on"
        )


def summarise(table: Table, tally: Tally) -> dict[str, Any]:
    """Counts and means of rows; a mean is None when no row has the figure."""
    counts = {status: tally.statuses.get(status, 0) for status in table.statuses}
    summary: dict[str, Any] = {"rows": sum(counts.values())}
    summary |= {_STATUS_KEYS.get(status, status): count for status, count in counts.items()}
    for column in table.means:
        mean = tally.mean(column)
        summary[_MEAN_KEYS.get(column, column)] = None if mean is None else round(mean, 6)
    return summary


_STATUS_KEYS = {"uncertified": "failed", "error": "errors"}
_MEAN_KEYS = {"area": "mean_area", "evaluations": "evaluations_per_image"}


@dataclass(frozen=True)
class Truths:
    """From the source's label to the classifier's class: by name where the names agree, else as it is if it can be."""

    classes: tuple[int, ...] | None
    known: bool

    @classmethod
    def of(cls, labels: Sequence[str] | None, class_names: Sequence[str]) -> Truths:
        if labels is None:
            return cls(None, True)
        places = {name: index for index, name in enumerate(class_names)}
        if all(name in places for name in labels):
            return cls(tuple(places[name] for name in labels), True)
        return cls(None, len(labels) == len(class_names))

    def __call__(self, label: int | None) -> int | None:
        if label is None or not self.known:
            return None
        return label if self.classes is None else self.classes[label]
