"""One shard of a store: a run of consecutive rows in a Parquet file that is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import VerifyError, one_line
from .files import replacing
from .table import Columns, Table

ROW_GROUP = 256  # rows: small enough to fetch one picture's mask cheaply, large enough to compress
_NAME = re.compile(r"shard-(\d{10,})-(\d{10,})\.parquet")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tally:
    """Rows by status, and of some columns the sum and the number of rows that have it."""

    statuses: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table, rows: pa.Table) -> Tally:
        counts = {status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in table.statuses}
        sums = {}
        for name in table.means:
            column = rows[name]
            values = pc.list_value_length(column) if pa.types.is_list(column.type) else column
            sums[name] = (
                float(pc.sum(values.cast(pa.float64())).as_py() or 0.0),
                len(rows) - column.null_count,
            )
        return cls(counts, sums)

    def __add__(self, other: Tally) -> Tally:
        statuses = {
            k: self.statuses.get(k, 0) + other.statuses.get(k, 0) for k in {**self.statuses, **other.statuses}
        }
        sums = {}
        for name in {**self.sums, **other.sums}:
            (a, m), (b, n) = self.sums.get(name, (0.0, 0)), other.sums.get(name, (0.0, 0))
            sums[name] = (a + b, m + n)
        return Tally(statuses, sums)

    def mean(self, name: str) -> float | None:
        total, count = self.sums.get(name, (0.0, 0))
        return total / count if count else None


@dataclass(frozen=True)
class Shard:
    """The rows of the positions start <= position < stop of a job's source, as they are on disk."""

    start: int
    stop: int
    sha256: str
    tally: Tally

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        return shard_name(self.start, self.stop)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "sha256": self.sha256, **asdict(self.tally)})

    @classmethod
    def from_json(cls, line: str) -> Shard:
        """Raises ValueError, KeyError or TypeError for a line that `to_json` did not write."""
        fields = json.loads(line)
        sums = {str(name): (float(total), int(count)) for name, (total, count) in fields["sums"].items()}
        statuses = {str(name): int(count) for name, count in fields["statuses"].items()}
        return cls(*shard_range(fields["name"]), str(fields["sha256"]), Tally(statuses, sums))


def shard_name(start: int, stop: int) -> str:
    return f"shard-{start:010d}-{stop:010d}.parquet"


def shard_range(name: str) -> tuple[int, int]:
    """The positions that a file of that name holds. Raises ValueError for the name of no shard."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"{name!r} is not the name of a shard")
    return int(match[1]), int(match[2])


def is_shard(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def write_shard(
    directory: Path, table: Table, run: Mapping[str, Any], start: int, batches: Sequence[Columns | pa.Table]
) -> Shard:
    """Put consecutive rows, the first at position ``start``, on disk. May be called in any process of a job.

    A shard of the same name is of the same job and rows: it stays, and is described.
    """
    rows = pa.concat_tables([b if isinstance(b, pa.Table) else table.to_arrow(b) for b in batches])
    path = directory / shard_name(start, start + len(rows))
    if path.exists():
        return describe(path, table)
    about = {
        "minexp.format": table.format,
        "minexp.start": str(start),
        "minexp.run": json.dumps({key: value for key, value in run.items() if key != "class_names"}),
    }
    with replacing(path) as temporary:
        pq.write_table(
            rows.replace_schema_metadata(about),
            temporary,
            compression="zstd",
            row_group_size=ROW_GROUP,
            write_page_checksum=True,
        )
        digest = file_digest(temporary)
    return Shard(start, start + len(rows), digest, Tally.of(table, rows))


def describe(path: Path, table: Table) -> Shard:
    """What is in a shard file. Raises VerifyError when it is damaged or has another number of rows than its name."""
    start, stop = shard_range(path.name)
    rows = open_shard(path, lambda shard: shard.read(columns=["status", *table.means]))
    if len(rows) != stop - start:
        raise VerifyError(f"{path} holds {len(rows)} rows: its name says {stop - start}")
    return Shard(start, stop, file_digest(path), Tally.of(table, rows))


def open_shard(path: Path, use: Callable[[pq.ParquetFile], Result]) -> Result:
    """What ``use`` makes of the open file, whose page checksums are verified. Raises VerifyError."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            return use(shard)
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"{path} is damaged: {one_line(error)}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of the content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Reserve:
    """Space of the disk held for what is being computed, so that a full disk is known before the work, not after it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path: Path | None = None

    def hold(self, start: int, size: int) -> None:
        """Hold so many bytes for the rows from position ``start`` on; nothing where the system cannot.

        Raises OSError (ENOSPC, EDQUOT) when there is no such space.
        """
        self.free()
        if not hasattr(os, "posix_fallocate"):
            return
        self._path = self._directory / f".reserve-{start}-{os.getpid()}"
        try:
            with open(self._path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            self.free()
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def free(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
