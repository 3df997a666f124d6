"""Explanations on disk: one row an image, in Parquet shards that any reader opens as they are.

A store is a directory: `manifest.json` says which job it belongs to and how its positions are divided, and never
changes; each process of the job appends to a journal of its own the shards it has written, with digest and tally; a
shard's name is the run of positions it holds, and appears only when the file is whole. A job's fingerprint keeps the
rows of different jobs apart. What is missing is what no shard covers.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RequestError, VerifyError
from .catalogue import (
    MANIFEST,
    Manifest,
    clear,
    journal,
    journals,
    read_manifest,
    read_run,
    read_shards,
    shard_files,
    sweep,
)
from .files import replacing
from .lock import LOCK, Part, hold
from .reading import iter_store, read_rows, read_store
from .shard import Shard, Tally, describe, shard_range, write_shard
from .table import Columns, Table, by_column, pack_mask, unpack_mask
from .tables import COLUMNS, EXPLANATIONS
from .verify import verify_store

__all__ = [
    "COLUMNS",
    "EXPLANATIONS",
    "MANIFEST",
    "Columns",
    "Manifest",
    "Store",
    "StoreWriter",
    "iter_store",
    "pack_mask",
    "read_manifest",
    "read_rows",
    "read_run",
    "read_shards",
    "read_store",
    "unpack_mask",
    "verify_store",
]


class Store:
    """A store as one process of its job writes it.

    run: JSON-able facts about the job; ``run["fingerprint"]`` identifies model, masker, data and settings. rows: how
    many there will be. part: (i, n) of a job that n processes divide among themselves. resume: with False, what is in
    ``directory`` is replaced. Raises RequestError when the directory holds another job or another process writes to it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        run: Mapping[str, Any],
        rows: int | None,
        table: Table = EXPLANATIONS,
        shard_rows: int | None = None,
        part: Part = (0, 1),
        resume: bool = True,
    ) -> None:
        if not run.get("fingerprint"):
            raise ValueError("run needs a fingerprint")
        self.directory, self.table, self.part = Path(directory), table, part
        if self.directory.exists() and not self.directory.is_dir():
            raise RequestError(f"{self.directory} is a file: give another --out, a directory")
        if part[1] > 1 and not resume:
            raise RequestError(
                f"--no-resume would take the other parts' rows too: remove {self.directory}, or leave out --shard"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._release = hold(self, self.directory, part)
        self._closed = False
        try:
            new = Manifest(table.format, dict(run), rows, shard_rows or _size(rows, table))
            self.manifest = self._manifest(new, resume)
            sweep(self.directory, self._mine)
            self._shards = self._adopted()
            self.resumed = self.rows_done
            self._journal = journal(self.directory, part)
            self._rewrite_journal()
        except BaseException:
            self._release()
            raise

    def _manifest(self, new: Manifest, resume: bool) -> Manifest:
        """The manifest of the job as it was begun, or of this one where there is none."""
        if not resume:
            clear(self.directory)
        if (self.directory / MANIFEST).exists():
            there = read_manifest(self.directory)
            if there.run["fingerprint"] == new.run["fingerprint"] and there.format == new.format:
                return there
            if read_shards(self.directory) or shard_files(self.directory):
                raise RequestError(
                    f"{self.directory} holds the {self.table.content} of another job (another model, masker, data or"
                    " settings): give another --out, or --no-resume to replace them"
                )
            clear(self.directory)  # begun and never got to a row
        elif shard_files(self.directory):
            raise RequestError(
                f"{self.directory} holds shards without {MANIFEST}: give another --out, or --no-resume to replace them"
            )
        new.write(self.directory)
        return new

    def _adopted(self) -> dict[str, Shard]:
        """This part's shards by name: those a journal lists, and those renamed just before a crash kept them off it.

        A shard whose rows are all in others (written by a process that outlived its job) is removed.
        """
        listed = {shard.name: shard for shard in read_shards(self.directory) if self._mine(shard.start)}
        found = {name for name in shard_files(self.directory) if self._mine(shard_range(name)[0])}
        for name in sorted(listed.keys() - found):
            warnings.warn(f"{self.directory / name} is missing: its rows are made again", stacklevel=4)
        kept, end = {}, 0
        for name in sorted(found, key=lambda name: (shard_range(name)[0], -shard_range(name)[1])):
            stop = shard_range(name)[1]
            if stop <= end:
                (self.directory / name).unlink()
                continue
            shard = listed.get(name)
            if shard is None or not shard.tally.sums.keys() >= set(
                self.table.means
            ):  # of a version with fewer means
                shard = describe(self.directory / name, self.table)
            kept[name] = shard
            end = max(end, stop)
        return kept

    def _mine(self, position: int) -> bool:
        return position // self.manifest.shard_rows % self.part[1] == self.part[0]

    @property
    def rows_done(self) -> int:
        """Rows of this part that are safely on disk."""
        return sum(shard.rows for shard in self._shards.values())

    @property
    def rows(self) -> int:
        """Rows that this part is to have."""
        return sum(stop - start for start, stop in self._cells())

    @property
    def shards(self) -> list[Shard]:
        """What is on disk of this part, in the source's order."""
        return sorted(self._shards.values(), key=lambda shard: shard.start)

    @property
    def tally(self) -> Tally:
        """Of the rows that are on disk."""
        return sum((shard.tally for shard in self.shards), Tally())

    def _cells(self) -> Iterator[tuple[int, int]]:
        size, rows = self.manifest.shard_rows, self.manifest.rows or 0
        for start in range(self.part[0] * size, rows, self.part[1] * size):
            yield start, min(start + size, rows)

    def missing(self) -> list[tuple[int, int]]:
        """The runs of positions (start, stop) of this part that no shard covers; none is longer than a shard."""
        shards = [(shard.start, shard.stop) for shard in self.shards]
        gaps, place = [], 0
        for start, stop in self._cells():
            while place < len(shards) and shards[place][1] <= start:
                place += 1
            last = place
            while last < len(shards) and shards[last][0] < stop:
                last += 1
            gaps += uncovered(start, stop, shards[place:last])
        return gaps

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The runs of positions between two that no shard covers."""
        here = [
            (shard.start, shard.stop) for shard in self.shards if shard.start < stop and shard.stop > start
        ]
        return uncovered(start, stop, here)

    def record(self, shard: Shard) -> None:
        """Enter a shard that `write_shard` has put into the directory."""
        self._shards[shard.name] = shard
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(shard.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def orphans(self, start: int, stop: int) -> Iterator[Shard]:
        """Shards between two positions that a process wrote and died before it could say so; not yet recorded."""
        for name in sorted(shard_files(self.directory) - self._shards.keys()):
            first, last = shard_range(name)
            if start <= first and last <= stop:
                yield describe(self.directory / name, self.table)

    def close(self) -> None:
        """Let others write. What never got to a row leaves nothing behind, so that a corrected request finds no job."""
        if self._closed:
            return
        self._closed = True
        if self.part[1] == 1 and self.manifest.rows and not self._shards:
            clear(self.directory)
            (self.directory / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.directory.rmdir()
        self._release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rewrite_journal(self) -> None:
        """The journal as this process knows it: without a last line that a crash cut, and with what it took in."""
        with replacing(self._journal) as temporary:
            temporary.write_text("".join(f"{shard.to_json()}\n" for shard in self.shards), encoding="utf-8")
        if self.part[1] == 1:
            for other in journals(self.directory):
                if other != self._journal:
                    other.unlink()  # of parts, whose shards are all in this one


def uncovered(start: int, stop: int, covered: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of start <= position < stop without the sorted runs ``covered``."""
    gaps = []
    for first, last in covered:
        if first > start:
            gaps.append((start, first))
        start = max(start, last)
    return gaps + ([(start, stop)] if start < stop else [])


class StoreWriter:
    """Append rows to a store whose length is not known beforehand, in one process.

    Goes on behind the rows of an earlier run of the same job; ``resume=False`` replaces them. Raises RequestError when
    the directory holds another job or another process is writing to it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        run: Mapping[str, Any],
        rows_per_shard: int = 1024,
        resume: bool = True,
        table: Table = EXPLANATIONS,
    ) -> None:
        if rows_per_shard < 1:
            raise RequestError(f"rows_per_shard is {rows_per_shard}: give at least 1")
        self._store = Store(
            directory, run=run, rows=None, table=table, shard_rows=rows_per_shard, resume=resume
        )
        self.directory, self.rows_per_shard = self._store.directory, rows_per_shard
        if gaps := self._store.gaps(0, max((shard.stop for shard in self._store.shards), default=0)):
            self._store.close()
            raise VerifyError(
                f"{self.directory} lacks the rows from {gaps[0][0]} on: start over with resume=False"
            )
        self._buffer: list[Mapping[str, Any]] = []
        self._closed = False

    @property
    def rows_done(self) -> int:
        """Rows safely on disk; the next one written gets this position."""
        return self._store.rows_done

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows: dicts over the table's columns, null where absent, as `table.by_column` takes them."""
        if self._closed:
            raise ValueError("the store is closed")
        if rows:
            self._store.table.to_arrow(by_column(rows))  # refused here rather than when the shard is full
        self._buffer.extend(rows)
        while len(self._buffer) >= self.rows_per_shard:
            self._flush(self.rows_per_shard)

    def _flush(self, count: int) -> None:
        batch = by_column(self._buffer[:count])
        store = self._store
        store.record(write_shard(self.directory, store.table, store.manifest.run, self.rows_done, [batch]))
        del self._buffer[:count]

    def close(self) -> None:
        """Put the remaining rows on disk, in a last and smaller shard."""
        if self._closed:
            return
        try:
            if self._buffer:
                self._flush(len(self._buffer))
        finally:
            self._closed = True
            self._store.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an interruption: every buffered row is complete, and keeping it saves its work.
        self.close()


def _size(rows: int | None, table: Table) -> int:
    """Rows a shard: a power of two, such that a job has about a thousand shards."""
    size, most = table.shard_rows
    while size < most and rows is not None and rows > 1024 * size:
        size *= 2
    return size
