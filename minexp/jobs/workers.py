"""Worker processes of one machine: each does tasks one after the other, and is replaced when it dies. No torch.

A worker is a child process with a pipe to its parent. It asks for a task when it can read one, and says what it has
done and stored. When it dies, what it stored is taken in and the rest of its tasks is given to another; a task
that kills every worker is halved until the image that does it is known, which then becomes a row with an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ..data.catalogue import sweep
from ..data.items import ImageSource
from ..data.shard import write_shard
from ..data.store import Store
from ..data.table import by_column
from ..errors import MinexpError, RequestError, one_line
from .unit import DeviceError, Unit, error_row
from .work import Event, Finished, Job, Lost, Task, work

DEATHS = 3  # of workers on one task, without a row more of it stored, before it is halved
STARTS = 3  # workers that die one after the other before they are ready
_BROKEN = 70  # exit code of a worker whose device failed


Emit = Callable[[Event, int], None]
_UNSENT = "this job cannot be sent to worker processes"
_WAY_OUT = "define the model and what explains it in a module, or use --workers 1"


@dataclass(frozen=True)
class _Ready:
    """The unit is made."""


@dataclass(frozen=True)
class _Wanted:
    """The worker can take a task."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


@dataclass
class _Worker:
    number: int
    process: Any
    pipe: Connection
    tasks: list[Task] = field(default_factory=list)
    wants: bool = False
    ready: bool = False
    gone: bool = False


class Workers:
    """``count`` worker processes of a job, each with ``threads`` threads, replaced as often as they die.

    deaths: of workers that were doing something.
    """

    def __init__(self, count: int, job: Job, source: ImageSource, store: Store, *, threads: int) -> None:
        try:
            self._payload = pickle.dumps(job)
        except Exception as error:
            raise RequestError(f"{_UNSENT} ({one_line(error)}): {_WAY_OUT}") from error
        self._job, self._source, self._store, self._threads = job, source, store, threads
        self._workers: list[_Worker] = []
        self._count, self._failed_starts = count, 0
        self._died: dict[int, int] = {}  # task's start -> deaths on it
        self.deaths = 0

    def run(self, gaps: Iterable[tuple[int, int]], emit: Emit, stopping: Callable[[], bool]) -> None:
        """Do the positions of the gaps. emit: gets each event and the number of its worker.

        An error of a worker is raised here, after the others have stored what they have done.
        """
        todo = deque(gaps)
        error: BaseException | None = None
        ending = False
        try:
            for number in range(min(self._count, len(todo))):
                self._start(number)
            while self._workers:
                idle = not todo and not any(worker.tasks for worker in self._workers)
                if not ending and (idle or error is not None or stopping()):
                    ending = True
                    for worker in self._workers:
                        self._send(worker, None)
                for worker in self._workers:
                    if worker.wants and todo and not ending:
                        self._feed(worker, *todo.popleft())
                for worker in self._speaking():
                    error = self._listen(worker, emit) or error
                    if worker.gone:
                        self._bury(worker, todo, emit, ending)
        finally:
            self._kill()
        if error is not None:
            raise error

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, self._payload, number, self._threads),
            name=f"minexp-{number}",
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(number, process, ours))

    def _feed(self, worker: _Worker, start: int, stop: int) -> None:
        task = Task(self._source.part(start, stop), start, stop)
        worker.tasks.append(task)
        worker.wants = False
        self._send(worker, task)

    def _send(self, worker: _Worker, message: Task | None) -> None:
        with contextlib.suppress(OSError):  # it is dead, which is noticed where it is listened to
            worker.pipe.send(message)

    def _speaking(self) -> list[_Worker]:
        ready = wait([worker.pipe for worker in self._workers], timeout=0.2)
        return [worker for worker in self._workers if worker.pipe in ready]

    def _listen(self, worker: _Worker, emit: Emit) -> BaseException | None:
        """Take what the worker has said; the error that made it end."""
        error = None
        try:
            while worker.pipe.poll():
                message = worker.pipe.recv()
                if isinstance(message, _Failed):
                    error = message.error
                elif isinstance(message, _Ready):
                    worker.ready, self._failed_starts = True, 0
                elif isinstance(message, _Wanted):
                    worker.wants = True
                else:
                    if isinstance(message, Finished):
                        worker.tasks = [task for task in worker.tasks if task.start != message.start]
                    emit(message, worker.number)
        except (EOFError, OSError):  # it ended, perhaps in the middle of a word
            worker.gone = True
        return error

    def _bury(self, worker: _Worker, todo: deque[tuple[int, int]], emit: Emit, ending: bool) -> None:
        """Take over what a worker left, and replace it unless all is done."""
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join()
        code = worker.process.exitcode
        if code == 0:
            return
        for task in worker.tasks:
            sweep(self._job.directory, range(task.start, task.stop).__contains__)
            for shard in self._store.orphans(task.start, task.stop):
                emit(shard, worker.number)
        emit(Lost(), worker.number)
        if worker.ready:
            self.deaths += 1
        else:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise MinexpError(
                    f"workers die while they start (exit code {code}): where memory is short, use fewer --workers"
                )
        if ending:
            return
        gaps = [gap for task in worker.tasks for gap in self._store.gaps(task.start, task.stop)]
        if gaps and worker.ready:  # it died on the first of them
            gaps[:1] = self._suspect(*gaps[0], worker, emit)
        todo.extendleft(reversed(gaps))
        self._start(worker.number)

    def _suspect(self, start: int, stop: int, worker: _Worker, emit: Emit) -> list[tuple[int, int]]:
        """A gap on which a worker died, as tasks: halved when workers keep dying on it, given up when it is one row."""
        self._died[start] = self._died.get(start, 0) + 1
        if self._died[start] < DEATHS:
            return [(start, stop)]
        del self._died[start]
        if stop - start > 1:
            middle = (start + stop) // 2
            return [(start, middle), (middle, stop)]
        code = worker.process.exitcode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        entry = next(self._source.part(start, stop)._entries(0, 1))  # decoded, it might end this process too
        row = {"id": entry.id, "uri": entry.uri, "truth": self._job.truths(entry.label)}
        row |= error_row(f"ends every process that works on it ({reason})")
        job = self._job
        emit(write_shard(job.directory, job.table, job.run, start, [by_column([row])]), worker.number)
        return []

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()


def _serve(pipe: Connection, payload: bytes, number: int, threads: int) -> None:
    """A worker's life."""
    # The parent decides when to stop; a signal to the whole group is its to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    _keep_freed_memory()
    lock, over, inbox = threading.Lock(), threading.Event(), queue.Queue[Task | None]()

    def say(message: object) -> None:
        with lock:
            pipe.send(message)

    def listen() -> None:
        try:
            while (task := pipe.recv()) is not None:
                inbox.put(task)
        except (EOFError, OSError):
            # The parent is gone: another job may have begun, so that nothing may be written any more.
            os._exit(1)
        over.set()
        inbox.put(None)

    def tasks() -> Iterator[Task]:
        say(_Wanted())
        while (task := inbox.get()) is not None:
            yield task
            say(_Wanted())

    threading.Thread(target=listen, name="listen", daemon=True).start()
    try:
        work(*_made(payload, number, say), tasks(), say, over.is_set)
    except DeviceError:
        os._exit(_BROKEN)
    except BaseException as error:
        say(_Failed(_sendable(error)))


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: given back and taken again with every batch, its pages cost a fifth of the time."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most it may be


def _made(payload: bytes, number: int, say: Callable[[object], None]) -> tuple[Job, Unit]:
    try:
        job: Job = pickle.loads(payload)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"{_UNSENT} ({one_line(error)}): {_WAY_OUT}") from error
    unit = job.unit(number)
    say(_Ready())
    return job, unit


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
