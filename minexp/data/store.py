"""Results on disk: one row an image, in Parquet shards that any reader opens as they are.

A shard appears under its name only when it is whole, every page carries a checksum, and the manifest carries each
shard's digest. The job's fingerprint keeps the rows of different jobs apart.
"""

import hashlib
import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RequestError, VerifyError
from .files import replacing, write_text
from .tables import EXPLANATIONS, STATUSES, TABLES, Table, pack_mask, unpack_mask

__all__ = [
    "COLUMNS",
    "MANIFEST",
    "SCHEMA",
    "STATUSES",
    "StoreWriter",
    "pack_mask",
    "read_rows",
    "read_run",
    "read_store",
    "unpack_mask",
    "verify_store",
]

SCHEMA, COLUMNS = EXPLANATIONS.schema, EXPLANATIONS.columns
MANIFEST = "manifest.json"
_ROW_GROUP = 256  # rows: small enough to fetch one picture's mask cheaply, large enough to compress


class StoreWriter:
    """Append rows to a directory of shards, or go on where an earlier run of the same job stopped.

    run: JSON-able facts about the job; ``run["fingerprint"]`` identifies model, masker, data and settings.
    table: what kind of rows. resume: with False, an existing store in ``directory`` is replaced.
    Raises RequestError when the directory holds another job or another process is writing to it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        run: Mapping[str, Any],
        table: Table = EXPLANATIONS,
        rows_per_shard: int = 1024,
        resume: bool = True,
    ) -> None:
        if rows_per_shard < 1:
            raise RequestError(f"rows_per_shard is {rows_per_shard}: give at least 1")
        if not run.get("fingerprint"):
            raise ValueError("run needs a fingerprint")
        self.directory = Path(directory)
        self.rows_per_shard = rows_per_shard
        self._run, self._table = dict(run), table
        about = {"minexp.format": table.format, "minexp.run": json.dumps(self._run)}
        self._schema = table.schema.with_metadata(about)
        self._buffer: list[dict[str, Any]] = []
        self._shards: list[dict[str, Any]] = []
        self._closed = False
        if self.directory.exists() and not self.directory.is_dir():
            raise RequestError(f"{self.directory} is a file: give another --out, a directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._release = _lock(self, self.directory)
        try:
            self._open(resume)
        except BaseException:
            self._release()
            raise

    def _open(self, resume: bool) -> None:
        manifest = self.directory / MANIFEST
        for stray in self.directory.glob(".shard-*.partial.parquet"):
            stray.unlink()  # a shard that a killed run never finished
        if not resume:
            manifest.unlink(missing_ok=True)
            for path in _shard_paths(self.directory):
                path.unlink()
        if manifest.exists():
            there = _read_manifest(self.directory, self._table)
            if there["run"].get("fingerprint") != self._run["fingerprint"]:
                raise RequestError(
                    f"{self.directory} holds the {self._table.content} of another job (another model, masker, data or"
                    " settings): give another --out, or --no-resume to replace them"
                )
            self._shards = self._adopt(there["shards"])
        elif _shard_paths(self.directory):
            raise RequestError(
                f"{self.directory} holds shards without {MANIFEST}: give another --out, or --no-resume to replace them"
            )
        self._write_manifest()

    def _adopt(self, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The shards on disk: those the manifest lists, and one renamed just before a crash kept it off the list."""
        known = {shard["name"]: shard for shard in listed}
        shards = []
        for index, path in enumerate(_shard_paths(self.directory)):
            if path.name != _shard_name(index):
                raise VerifyError(
                    f"{self.directory / _shard_name(index)} is missing: start over with --no-resume"
                )
            shards.append(known.pop(path.name) if path.name in known else _describe(path))
        if known:
            raise VerifyError(f"{self.directory / next(iter(known))} is missing: start over with --no-resume")
        return shards

    @property
    def rows_done(self) -> int:
        """Rows safely on disk; sources are ordered, so the job goes on at this position."""
        return sum(shard["rows"] for shard in self._shards)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows: dicts over the table's columns, null where absent."""
        if self._closed:
            raise ValueError("the store is closed")
        self._buffer.extend(map(self._normalised, rows))
        while len(self._buffer) >= self.rows_per_shard:
            self._flush(self.rows_per_shard)

    def _normalised(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(row) - set(self._table.columns)):
            raise ValueError(f"the store has no column {unknown[0]!r}")
        return self._table.normalise(row)

    def close(self) -> None:
        """Put the remaining rows on disk, in a last and smaller shard."""
        if self._closed:
            return
        try:
            if self._buffer:
                self._flush(len(self._buffer))
        finally:
            self._closed = True
            self._release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an interruption: every buffered row is complete, and keeping it saves its work.
        self.close()

    def _flush(self, count: int) -> None:
        table = pa.Table.from_pylist(self._buffer[:count], schema=self._schema)
        path = self.directory / _shard_name(len(self._shards))
        with replacing(path) as temporary:
            pq.write_table(
                table, temporary, compression="zstd", row_group_size=_ROW_GROUP, write_page_checksum=True
            )
            shard = {**_describe(temporary), "name": path.name}
        del self._buffer[:count]
        self._shards.append(shard)
        self._write_manifest()

    def _write_manifest(self) -> None:
        content = {
            "format": self._table.format,
            "run": self._run,
            "rows": self.rows_done,
            "shards": self._shards,
        }
        write_text(self.directory / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_store(
    directory: str | Path, columns: Sequence[str] | None = None, table: Table = EXPLANATIONS
) -> pa.Table:
    """All rows, or only some columns of them, in the order they were written; page checksums are verified.

    Raises RequestError when there is no store of that kind, VerifyError when a shard is damaged.
    """
    paths = _stored_shards(Path(directory), table)
    if columns is not None and (unknown := [name for name in columns if name not in table.columns]):
        raise RequestError(f"the store has no column {unknown[0]!r}: it has {', '.join(table.columns)}")
    chosen = list(table.columns if columns is None else columns)
    empty = pa.schema([table.schema.field(name) for name in chosen]).empty_table()
    parts = [_open_shard(path, lambda shard: shard.read(columns=chosen)).select(chosen) for path in paths]
    return pa.concat_tables([empty, *(part.replace_schema_metadata(None) for part in parts)])


def read_rows(
    directory: str | Path, positions: Sequence[int], table: Table = EXPLANATIONS
) -> list[dict[str, Any]]:
    """Whole rows at the given positions, in the order asked, reading only the row groups they lie in."""
    wanted = sorted(set(positions))
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for path in _stored_shards(Path(directory), table):
        rows_here = _open_shard(path, lambda shard: shard.metadata.num_rows)
        here = [position - start for position in wanted if start <= position < start + rows_here]
        if here:
            picked = _open_shard(path, lambda shard, here=here: dict(_pick(shard, here)))
            found.update((start + offset, row) for offset, row in picked.items())
        start += rows_here
    if missing := [position for position in wanted if position not in found]:
        raise IndexError(f"the store has {start} rows, no row {missing[0]}")
    return [found[position] for position in positions]


def _pick(shard: pq.ParquetFile, offsets: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    start = 0
    for group in range(shard.num_row_groups):
        count = shard.metadata.row_group(group).num_rows
        here = [offset - start for offset in offsets if start <= offset < start + count]
        if here:
            rows = shard.read_row_group(group).take(here).to_pylist()
            yield from ((start + offset, row) for offset, row in zip(here, rows, strict=True))
        start += count


def read_run(directory: str | Path, table: Table = EXPLANATIONS) -> dict[str, Any]:
    """What the job recorded about itself. Raises RequestError when there is no store of that kind."""
    run: dict[str, Any] = _read_manifest(Path(directory), table)["run"]
    return run


def verify_store(directory: str | Path) -> list[str]:
    """Check digests, page checksums, masks, counts and duplicates; one line a problem, none when all is well."""
    directory = Path(directory)
    manifest = _read_manifest(directory)
    table = TABLES[manifest["format"]]
    problems: list[str] = []
    listed = {shard["name"]: shard for shard in manifest["shards"]}
    present = {path.name: path for path in _shard_paths(directory)}
    problems += [f"{name}: missing" for name in listed if name not in present]
    problems += [f"{name}: not listed in {MANIFEST}" for name in present if name not in listed]
    if sum(shard["rows"] for shard in listed.values()) != manifest["rows"]:
        problems.append(f"{MANIFEST}: counts {manifest['rows']} rows, its shards sum to another number")
    seen: Counter[str] = Counter()
    for name, path in present.items():
        if name in listed and _digest(path) != listed[name]["sha256"]:
            problems.append(f"{name}: its content does not match the digest in {MANIFEST}")
        problems += _verify_shard(path, table, listed.get(name), manifest["run"]["fingerprint"], seen)
    problems += [f"id {name!r}: stored {count} times" for name, count in seen.items() if count > 1]
    return problems


def _verify_shard(
    path: Path, kind: Table, listed: Mapping[str, Any] | None, fingerprint: str, seen: Counter[str]
) -> list[str]:
    problems = []
    rows = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            run = json.loads((shard.schema_arrow.metadata or {}).get(b"minexp.run", b"{}"))
            if run.get("fingerprint") != fingerprint:
                problems.append(f"{path.name}: belongs to another job")
            if tuple(shard.schema_arrow.names) != kind.columns:
                return [*problems, f"{path.name}: its columns are not the store's"]
            for group in range(shard.num_row_groups):
                # The other columns are read for their checksums alone.
                table = shard.read_row_group(group)
                for row in table.select(list(kind.checked)).to_pylist():
                    rows += 1
                    seen[row["id"]] += 1
                    problems += [
                        f"{path.name}: id {row['id']!r}: {problem}" for problem in kind.problems(row)
                    ]
    except (pa.ArrowException, OSError, ValueError) as error:
        return [*problems, f"{path.name}: cannot be read: {_one_line(error)}"]
    if listed is not None and rows != listed["rows"]:
        problems.append(f"{path.name}: {rows} rows, {MANIFEST} lists {listed['rows']}")
    return problems


def _open_shard(path: Path, use: Any) -> Any:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            return use(shard)
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"{path} is damaged: {_one_line(error)}") from error


def _stored_shards(directory: Path, table: Table) -> list[Path]:
    return [directory / shard["name"] for shard in _read_manifest(directory, table)["shards"]]


def _read_manifest(directory: Path, table: Table | None = None) -> dict[str, Any]:
    """The manifest of a store of that kind, or of any kind that this version knows."""
    wanted = EXPLANATIONS if table is None else table
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (
            not content["run"]["fingerprint"]
            or content["rows"] < 0
            or not isinstance(content["shards"], list)
        ):
            raise ValueError("its fields are not those of a manifest")
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(
            f"no {wanted.content} in {directory} ({MANIFEST} is not there):"
            f" write them with {wanted.command} --out {directory}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"{path} is damaged: {_one_line(error)}") from error
    there = TABLES.get(content.get("format"))
    if there is None:
        raise RequestError(
            f"{path} is of format {content.get('format')!r}: this version reads {wanted.format}"
        )
    if table is not None and there is not table:
        raise RequestError(
            f"{directory} holds {there.content}, no {table.content}: give the directory of those"
        )
    result: dict[str, Any] = content
    return result


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def _shard_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.parquet"), key=lambda path: (len(path.name), path.name))


def _describe(path: Path) -> dict[str, Any]:
    return {
        "name": path.name,
        "rows": _open_shard(path, lambda s: s.metadata.num_rows),
        "sha256": _digest(path),
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _lock(owner: object, directory: Path) -> Callable[[], object]:
    """Hold the directory for this process, where the file system knows locks: two writers would double rows.

    Returns what releases it; it is also released when ``owner`` goes.
    """
    try:
        import fcntl
    except ImportError:
        return lambda: None
    handle = os.open(directory, os.O_RDONLY)
    release = weakref.finalize(owner, os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release()
        raise RequestError(
            f"another process is writing to {directory}: wait for it, or give another --out"
        ) from None
    except OSError:
        release()  # a file system without locks
    return release
