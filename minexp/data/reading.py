"""Rows of a store, from shards whose page checksums are verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RequestError
from .catalogue import read_manifest, read_shards
from .shard import Shard, open_shard
from .table import Table
from .tables import EXPLANATIONS


def iter_store(
    directory: str | Path, columns: Sequence[str] | None = None, table: Table = EXPLANATIONS
) -> Iterator[pa.Table]:
    """All rows, or only some columns of them, shard by shard in the source's order; page checksums are verified.

    Raises RequestError when there is no store of that kind or no such column, VerifyError when a shard is damaged.
    """
    directory = Path(directory)
    read_manifest(directory, table)
    if columns is not None and (unknown := [name for name in columns if name not in table.columns]):
        raise RequestError(f"the store has no column {unknown[0]!r}: it has {', '.join(table.columns)}")
    chosen = list(table.columns if columns is None else columns)
    for listed in read_shards(directory):
        rows = open_shard(directory / listed.name, lambda shard: shard.read(columns=chosen))
        yield rows.select(chosen).replace_schema_metadata(None)


def read_store(
    directory: str | Path, columns: Sequence[str] | None = None, table: Table = EXPLANATIONS
) -> pa.Table:
    """`iter_store` as one table."""
    parts = list(iter_store(directory, columns, table))
    fields = [table.schema.field(name) for name in (table.columns if columns is None else columns)]
    return pa.concat_tables([pa.schema(fields).empty_table(), *parts])


def read_rows(
    directory: str | Path,
    positions: Sequence[int],
    table: Table = EXPLANATIONS,
    *,
    columns: Sequence[str] | None = None,
    shards: Sequence[Shard] | None = None,
) -> list[dict[str, Any]]:
    """Rows at the given places of `read_store`, in the order asked, reading only the row groups they lie in.

    columns: some of them, in place of whole rows. shards: those listed at another time, to whose rows the places refer.
    """
    directory = Path(directory)
    if shards is None:
        read_manifest(directory, table)
        shards = read_shards(directory)
    wanted = sorted(set(positions))
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for listed in shards:
        here = [position - start for position in wanted if start <= position < start + listed.rows]
        if here:
            picked = open_shard(directory / listed.name, partial(_pick, offsets=here, columns=columns))
            found.update((start + offset, row) for offset, row in picked.items())
        start += listed.rows
    if missing := [position for position in wanted if position not in found]:
        raise IndexError(f"the store has {start} rows, no row {missing[0]}")
    return [found[position] for position in positions]


def _pick(
    shard: pq.ParquetFile, offsets: list[int], columns: Sequence[str] | None
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for group in range(shard.num_row_groups):
        count = shard.metadata.row_group(group).num_rows
        here = [offset - start for offset in offsets if start <= offset < start + count]
        if here:
            rows = shard.read_row_group(group, columns=columns).take(here).to_pylist()
            found |= {start + offset: row for offset, row in zip(here, rows, strict=True)}
        start += count
    return found
