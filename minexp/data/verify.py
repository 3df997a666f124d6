"""Whether a store is what its job wrote: digests, page checksums, masks, counts, and no row twice."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from ..errors import one_line
from .catalogue import Manifest, read_manifest, read_shards, shard_files
from .nested import unnest
from .shard import Shard, file_digest, shard_range
from .table import Table, ones, row_lengths

_TOLD = 20  # problems of one shard that are told one by one


@dataclass
class Findings:
    """Of a store. rows: listed; bad, duplicates: of them; missing: positions of the job that have no row yet, some of
    which may be in shards that a killed process left unlisted.

    command: what wrote it, and goes on with it. problems: one line each, naming the file and, where it is known, the
    row group; none when all is well.
    """

    command: str
    rows: int = 0
    bad: int = 0
    duplicates: int = 0
    missing: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> int:
        return max(0, self.rows - self.bad - self.duplicates)


def verify_store(directory: str | Path) -> list[str]:
    """The problems of a store (`examine_store`)."""
    return examine_store(directory).problems


def examine_store(directory: str | Path, *, progress: bool = False) -> Findings:
    """Read everything once and compare. Raises RequestError when there is no store, VerifyError for a damaged index."""
    directory = Path(directory)
    manifest, listed = read_manifest(directory), read_shards(directory)
    found = Findings(manifest.table.command)
    present = shard_files(directory)
    found.rows = sum(shard.rows for shard in listed)
    if manifest.rows is not None:
        found.missing = max(0, manifest.rows - found.rows)
    if not found.missing:  # else a process was killed before it could list what it wrote: the next one does
        unlisted = sorted(present - {shard.name for shard in listed})
        found.problems += [f"{name}: not listed by any process of the job" for name in unlisted]
    found.problems += _overlaps(listed, manifest)
    hashes = []
    for shard in tqdm(listed, unit=" shards", disable=None if progress else True):
        if shard.name not in present:
            found.problems.append(f"{shard.name}: missing")
            found.bad += shard.rows
            continue
        checked = _Check(directory / shard.name, shard, manifest)
        found.problems += checked.told()
        found.bad += int(checked.bad.sum())
        hashes.append(checked.hashes)
    doubled = _doubled(directory, [s.name for s in listed if s.name in present], hashes)
    found.problems += [f"id {name!r}: stored {count} times" for name, count in doubled.items()]
    found.duplicates = sum(count - 1 for count in doubled.values())
    return found


def _overlaps(listed: list[Shard], manifest: Manifest) -> Iterator[str]:
    end, before = 0, ""
    for shard in listed:
        if shard.start < end:
            yield f"{shard.name}: holds positions that {before} holds too"
        if shard.stop > end:
            end, before = shard.stop, shard.name
    if manifest.rows is not None and end > manifest.rows:
        yield f"{before}: holds positions behind the {manifest.rows} of the job"


class _Check:
    """One shard read group by group. bad: bool [rows]; hashes: int64 of the ids that could be read."""

    def __init__(self, path: Path, listed: Shard, manifest: Manifest) -> None:
        self.path, self.table = path, manifest.table
        self.bad = np.zeros(listed.rows, bool)
        self.hashes: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._problems: list[str] = []
        digest = file_digest(path)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as shard:
                self._about(shard, listed, manifest)
                self._groups(shard)
        except (pa.ArrowException, OSError, ValueError) as error:
            self._whole(f"cannot be read: {one_line(error)}")
        if digest != listed.sha256 and not self.bad.any():
            self._whole("its content does not match its digest")

    def told(self) -> list[str]:
        more = len(self._problems) - _TOLD
        return self._problems[:_TOLD] + ([f"{self.path.name}: {more} more problems"] if more > 0 else [])

    def _whole(self, problem: str) -> None:
        self.bad[:] = True
        self._problems.append(f"{self.path.name}: {problem}")

    def _about(self, shard: pq.ParquetFile, listed: Shard, manifest: Manifest) -> None:
        metadata = shard.schema_arrow.metadata or {}
        if json.loads(metadata.get(b"minexp.run", b"{}")).get("fingerprint") != manifest.run["fingerprint"]:
            self._whole("belongs to another job")
        if metadata.get(b"minexp.start", b"").decode() != str(shard_range(self.path.name)[0]):
            self._whole("its name is not that of the rows it was written for")
        if list(shard.schema_arrow.names) != list(self.table.columns):
            raise ValueError("its columns are not the store's")
        if shard.metadata.num_rows != listed.rows:
            raise ValueError(f"it has {shard.metadata.num_rows} rows, {listed.rows} are listed")

    def _groups(self, shard: pq.ParquetFile) -> None:
        start, hashes = 0, [self.hashes]
        for group in range(shard.num_row_groups):
            stop = start + shard.metadata.row_group(group).num_rows
            try:
                rows = shard.read_row_group(group)  # all columns, for their checksums
            except (pa.ArrowException, OSError) as error:
                self.bad[start:stop] = True
                self._problems.append(f"{self.path.name}: row group {group}: {one_line(error)}")
            else:
                ids = rows["id"].to_pylist()
                hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
                for row, problem in check_rows(self.table, rows):
                    self.bad[start + row] = True
                    self._problems.append(f"{self.path.name}: row group {group}: id {ids[row]!r}: {problem}")
            start = stop
        self.hashes = np.concatenate(hashes)


def check_rows(table: Table, rows: pa.Table) -> Iterator[tuple[int, str]]:
    """The rows, by number, that contradict themselves, and how."""
    status = rows["status"].to_pylist()
    yield from ((row, f"unknown status {s!r}") for row, s in enumerate(status) if s not in table.statuses)
    if "mask" in table.columns:
        yield from _masks(rows, status)
    if "edges" in table.columns:
        yield from _circuits(rows, status)


def _circuits(rows: pa.Table, status: list[str]) -> Iterator[tuple[int, str]]:
    """Circuits without nodes or edges, with another number of nodes than they say, or with edges that end at none."""
    absent = np.asarray(pc.or_(pc.is_null(rows["nodes"]), pc.is_null(rows["edges"])).to_numpy(), bool)
    for row in np.flatnonzero(absent).tolist():
        if status[row] != "error":
            yield row, "no nodes or no edges"
    nodes, edges = unnest(rows, "nodes"), unnest(rows, "edges")
    ranked = nodes.filter(pc.greater_equal(nodes["rank"], 0))["row"].to_numpy()
    there = np.bincount(ranked, minlength=len(rows))
    said = pc.round(pc.multiply(rows["size"].cast(pa.float64()), rows["universe"])).fill_null(-1).to_numpy()
    for row in np.flatnonzero(~absent & (there != said)).tolist():
        yield row, f"{there[row]} nodes, where its size says {said[row]:.0f}"
    place = ["row", "layer", "unit"]
    ends = [edges.select(["row", f"{end}_layer", end]).rename_columns(place) for end in ("source", "target")]
    both = pa.concat_tables(ends)
    lost = both.join(nodes.select(place), place, join_type="left anti")
    lost = lost.filter(pc.or_(pc.not_equal(lost["layer"], "score"), pc.not_equal(lost["unit"], 0)))
    first = {row["row"]: row for row in lost.sort_by([(name, "descending") for name in place]).to_pylist()}
    for row in sorted(first.keys() - set(np.flatnonzero(absent).tolist())):
        yield row, f"an edge ends at {first[row]['layer']}/{first[row]['unit']}, which is no node"


def _masks(rows: pa.Table, status: list[str]) -> Iterator[tuple[int, str]]:
    masks = rows["mask"].combine_chunks()
    starts, lengths, content = row_lengths(masks)
    view = content.tobytes()
    sums = np.array([zlib.crc32(view[a : a + n]) for a, n in zip(starts, lengths, strict=True)], np.int64)
    h, w = _numbers(rows["h"], -1), _numbers(rows["w"], -1)
    area = ones(starts, lengths, content) / np.maximum(1, h * w)
    said = np.asarray(rows["area"].cast(pa.float64()).to_numpy(), np.float64)

    absent = np.asarray(masks.is_null())
    wrong = ~absent & (sums != _numbers(rows["mask_crc32"], -1))
    misfit = ~absent & ~wrong & (lengths != (h * w + 7) // 8)
    lying = ~absent & ~wrong & ~misfit & (np.abs(area - said) > 1e-5)
    for row in np.flatnonzero(absent).tolist():
        if status[row] != "error":
            yield row, "no mask"
    for row in np.flatnonzero(wrong).tolist():
        yield row, "the mask does not match its checksum"
    for row in np.flatnonzero(misfit).tolist():
        yield row, f"a mask of {lengths[row]} bytes is not {h[row]} x {w[row]} pixels"
    for row in np.flatnonzero(lying).tolist():
        yield row, f"the mask covers {area[row]:.5f} of the image, the row says {said[row]:.5f}"


def _numbers(column: Any, absent: int) -> npt.NDArray[np.int64]:
    return np.asarray(column.cast(pa.int64()).fill_null(absent).to_numpy(), np.int64)


def _doubled(directory: Path, names: list[str], hashes: list[npt.NDArray[np.int64]]) -> dict[str, int]:
    """Ids stored more than once, found by their hashes, so that millions of rows need little memory."""
    if not hashes:
        return {}
    ordered = np.sort(np.concatenate(hashes))
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return {}
    seen: Counter[str] = Counter()
    for name, of_shard in zip(names, hashes, strict=True):
        if np.isin(of_shard, twice).any():
            with pq.ParquetFile(directory / name) as shard:
                seen.update(shard.read(columns=["id"])["id"].to_pylist())
    return {name: count for name, count in seen.items() if count > 1}
