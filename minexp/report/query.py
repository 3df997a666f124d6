"""Rows of a store by a condition in SQL, answered by DuckDB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.store import read_shards
from ..errors import RequestError, one_line


@dataclass(frozen=True, eq=False)
class Query:
    """How many rows fit the condition, and the positions of some of them, drawn at random (the same ones each time)."""

    condition: str
    matches: int
    sample: npt.NDArray[np.int64]


def ask(directory: Path, condition: str, count: int) -> Query:
    """The rows of the store for which ``condition`` holds, at most ``count`` of them. Raises RequestError."""
    try:
        import duckdb
    except ImportError:
        raise RequestError("--query needs DuckDB: pip install 'minexp[report]'") from None
    shards = read_shards(directory)
    starts = dict(
        zip(
            (shard.name for shard in shards), np.cumsum([0, *(s.rows for s in shards)]).tolist(), strict=False
        )
    )
    with duckdb.connect() as connection:
        paths = [str(directory / shard.name) for shard in shards]
        connection.read_parquet(paths, filename=True, file_row_number=True).create_view("rows")
        try:
            sql = f"select filename, file_row_number from rows where ({condition})"
            total = connection.execute(f"select count(*) from ({sql})").fetchone()
            sample = f"select * from ({sql}) using sample reservoir({int(count)} rows) repeatable (0)"
            found = connection.execute(sample).fetchall()
        except duckdb.Error as error:
            raise RequestError(
                f"--query {condition!r}: {one_line(error)}; give a condition over the store's columns, such as"
                " \"label_name = 'cat' and area > 0.3\""
            ) from error
    positions = sorted(starts[Path(name).name] + row for name, row in found)
    matches = 0 if total is None else int(total[0])
    return Query(condition, matches, np.random.default_rng(0).permutation(np.array(positions, np.int64)))
