"""A job on a Ray cluster: Ray Data reads and decodes in tasks, actors hold the core unit and write the store's shards.

The store is the checkpoint: a block is a run of positions, its shard appears whole or not at all, and what a killed
driver, actor or node left is what `Store.missing` gives to the next run, on Ray or not. Ray Data's own checkpoints
would know rows by an id column, in files of their own, and only on Ray.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError

from ..data.items import ImageSource
from ..data.shard import Reserve, Shard, write_shard
from ..data.table import Columns, objects
from ..errors import MinexpError, RequestError
from .engine import Placement
from .unit import DeviceError
from .work import Event, Job, Progress, Task, batches_of, check_rows, count_notes

BLOCK_BYTES = 64 << 20  # decoded images of a block: Ray Data would split one above 128 MiB
WAVE = 4096  # blocks the driver hands to Ray Data at a time, whose description takes memory there
DEATHS = 3  # of actors on one block before the job ends instead of trying for ever


def work_on_ray(
    job: Job,
    source: ImageSource,
    gaps: Sequence[tuple[int, int]],
    placement: Placement,
    emit: Callable[[Event, int], None],
    stopping: Callable[[], bool],
) -> int:
    """Do the positions of the gaps; 0, because Ray replaces processes by itself.

    Raises RequestError when the cluster has no CPU to spare for reading beside the workers or no common directory.
    """
    height, width = job.preprocessing.size
    rows = max(1, BLOCK_BYTES // (height * width * job.preprocessing.channels))
    blocks = iter([(a, min(a + rows, stop)) for start, stop in gaps for a in range(start, stop, rows)])
    with _cluster(placement):
        while wave := list(islice(blocks, WAVE)):
            tasks = [Task(source.part(start, stop), start, stop) for start, stop in wave]
            for shard, notes in _shards(job, tasks, placement):
                if not (job.directory / shard.name).exists():
                    raise RequestError(
                        f"{shard.name} was written on another machine: give an --out that all of the cluster share"
                    )
                emit(Progress(shard.tally.statuses, notes), 0)
                emit(shard, 0)
                if stopping():
                    return 0
    return 0


def _shards(job: Job, tasks: list[Task], placement: Placement) -> Iterator[tuple[Shard, dict[str, int]]]:
    """The tasks' shards as they get written, and what was left out of images."""
    dataset = ray.data.read_datasource(_Blocks(job, tasks), override_num_blocks=len(tasks)).map_batches(
        _Worker,
        fn_constructor_args=(job,),
        # A block at a time: for GPUs Ray Data wants a number, and may then put short blocks together or cut one.
        batch_size=max(task.stop - task.start for task in tasks) if placement.gpus else None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(placement.workers, len(tasks))),
        num_cpus=1,
        num_gpus=placement.gpus,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            for shard, notes, failure in zip(batch["shard"], batch["notes"], batch["failure"], strict=True):
                if failure:
                    raise pickle.loads(failure)
                yield Shard.from_json(shard), json.loads(notes)
    except RayError as error:
        last = [line for line in str(error).splitlines() if line.strip(" ^")][-1:]
        raise MinexpError(f"Ray: {' '.join(last)[:300].strip() or type(error).__name__}") from None


class _Blocks(Datasource):
    """Ray Data's Read op: one task a block, which decodes its images where it runs."""

    def __init__(self, job: Job, tasks: list[Task]) -> None:
        super().__init__()
        self._job, self._tasks = ray.put(job), tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(partial(_read, self._job, task), BlockMetadata(task.stop - task.start, None, None))
            for task in self._tasks
        ]


def _read(job: Any, task: Task) -> Iterable[Any]:
    from ray.data.block import BlockAccessor

    ((_, batch),) = batches_of(ray.get(job), iter([task]), task.stop - task.start)
    batch["task"] = np.full(len(batch["position"]), task.start)
    return [BlockAccessor.batch_to_block(batch)]


class _Worker:
    """An actor: makes the core unit once, then turns a block of images into a shard."""

    def __init__(self, job: Job) -> None:
        self._job, self._unit = job, job.unit(0)

    def __call__(self, block: Columns) -> Columns:
        cuts = np.flatnonzero((np.diff(block["position"]) != 1) | (np.diff(block["task"]) != 0)) + 1
        ends = [0, *cuts.tolist(), len(block["position"])]
        runs = [slice(start, stop) for start, stop in pairwise(ends)]
        shards, failure = [], b""
        try:
            for run in runs:
                shards.append(self._shard({name: values[run] for name, values in block.items()}).to_json())
        except (MinexpError, OSError) as error:  # said by the driver; thrown here, Ray would print its trace
            failure = pickle.dumps(error)
        count = len(shards) + bool(failure)
        notes = json.dumps(count_notes(block))
        return {
            "shard": objects([*shards, ""][:count]),
            "notes": objects([notes, *["{}"] * count][:count]),
            "failure": objects([*[b""] * len(shards), failure][:count]),
        }

    def _shard(self, run: Columns) -> Shard:
        """The shard of images at consecutive positions."""
        job, start, count = self._job, int(run["position"][0]), len(run["position"])
        reserve, trial = Reserve(job.directory), job.directory / f".reserve-{start}-trial"
        deaths = trial.stat().st_size if trial.exists() else 0
        if deaths >= DEATHS:
            raise MinexpError(
                f"every process that works on the images {start} to {start + count - 1} dies: without --engine ray,"
                " several --workers find the one that does it"
            )
        trial.write_bytes(bytes(deaths + 1))
        try:
            reserve.hold(start, count * job.row_bytes)
            rows = []
            for place in range(0, count, job.batch):
                batch = {name: values[place : place + job.batch] for name, values in run.items()}
                rows.append(check_rows(job, batch, self._unit(batch)))
            reserve.free()
            return write_shard(job.directory, job.table, job.run, start, rows)
        except DeviceError:
            os._exit(70)  # Ray starts another actor for this block
        finally:  # not reached by a process that dies
            reserve.free()
            trial.unlink(missing_ok=True)


@contextmanager
def _cluster(placement: Placement) -> Iterator[None]:
    """A connection to the cluster, or a cluster of this machine, for the time of the block."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    ours = not ray.is_initialized()
    if ours:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if placement.address is None:
            cpus = max(os.cpu_count() or 1, placement.workers + 1)
            here = {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
            }  # its processes find what this one does
            ray.init(num_cpus=cpus, include_dashboard=False, runtime_env={"env_vars": here}, **quiet)
        else:
            try:
                ray.init(address=placement.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise RequestError(
                    f"no Ray cluster at {placement.address} ({' '.join(str(error).split())[:200]}); start one with"
                    " ray start --head, or leave out --address"
                ) from error
    try:
        there = ray.cluster_resources()
        wanted = {"CPU": placement.workers + 1.0, "GPU": placement.gpus * placement.workers}
        for resource, amount in wanted.items():
            if there.get(resource, 0.0) < amount:
                raise RequestError(
                    f"{placement.workers} workers need {amount:g} {resource}s, one CPU being for reading:"
                    f" the cluster has {there.get(resource, 0.0):g}; give fewer --workers, or add machines"
                )
        yield
    finally:
        if ours:
            ray.shutdown()
