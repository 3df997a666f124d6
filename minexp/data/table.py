"""What a table of rows is: columns, the states of a row, and rows brought into that shape."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import VerifyError

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Table:
    """A kind of store. format: its name and version on disk; content, command: what it holds and what writes it, for
    messages; schema: has `id` and `status`; statuses: the first is that of a good row; means: columns whose means a
    job's summary gives, of lists the mean length; shard_rows: fewest and most rows a shard, as few are lost with a
    process and many are opened quickly.
    """

    format: str
    content: str
    command: str
    schema: pa.Schema
    statuses: tuple[str, ...]
    means: tuple[str, ...] = ()
    shard_rows: tuple[int, int] = (256, 8192)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    def to_arrow(self, columns: Mapping[str, Any]) -> pa.Table:
        """Columns of equal length (arrays or lists; None is null) with those absent as nulls.

        Raises ValueError for a column or a status that the table does not know.
        """
        if unknown := sorted(set(columns) - set(self.columns)):
            raise ValueError(f"the store has no column {unknown[0]!r}")
        if wrong := sorted(set(map(str, columns["status"])) - set(self.statuses)):
            raise ValueError(f"status is {wrong[0]!r}: one of {', '.join(self.statuses)}")
        count = len(columns["status"])
        return pa.table(
            [
                _array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type)
                for f in self.schema
            ],
            schema=self.schema,
        )


def pack_mask(mask: npt.NDArray[np.bool_]) -> bytes:
    """Bits of a boolean mask [H, W], row by row, most significant bit first; the last byte is filled with zeros."""
    if mask.ndim != 2:
        raise ValueError(f"a mask has shape [H, W], not {list(mask.shape)}")
    return np.packbits(np.asarray(mask, dtype=bool).reshape(-1)).tobytes()


def unpack_mask(packed: bytes, h: int, w: int) -> npt.NDArray[np.bool_]:
    """The boolean mask [h, w] that :func:`pack_mask` packed."""
    if len(packed) != (h * w + 7) // 8:
        raise VerifyError(f"a mask of {len(packed)} bytes cannot be {h} x {w} pixels")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=h * w).reshape(h, w).astype(bool)


def row_lengths(
    column: pa.BinaryArray,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Where the values of a binary column begin, how long they are (null: 0), and the bytes they lie in; no copy."""
    if not len(column):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
    _, offsets, content = column.buffers()
    places = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype(
        np.int64
    )
    data = np.zeros(0, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    return places[:-1], np.diff(places), data


def ones(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """How many bits are set in each value that `row_lengths` describes."""
    counts, some = np.zeros(len(starts), np.int64), lengths > 0
    if some.any():
        used = content[starts[0] : starts[-1] + lengths[-1]]
        counts[some] = np.add.reduceat(popcount(used), starts[some] - starts[0], dtype=np.int64)
    return counts


_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def popcount(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """How many bits are set in each byte."""
    return np.bitwise_count(values) if hasattr(np, "bitwise_count") else _POPCOUNT[values]


def by_column(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows (dicts, null where absent) as columns of objects.

    ``mask`` may be a bool array [H, W] or packed bytes; h, w and its checksum are filled in where they are absent.
    """
    whole = [_whole(row) for row in rows]
    return {
        name: objects([row.get(name) for row in whole])
        for name in dict.fromkeys(n for row in whole for n in row)
    }


def objects(values: Sequence[Any]) -> npt.NDArray[np.object_]:
    """A one-dimensional array of the values as they are, whatever their own shape."""
    return np.fromiter(values, dtype=object, count=len(values))


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(row)
    mask = out.get("mask")
    if isinstance(mask, np.ndarray):
        out["h"], out["w"] = mask.shape
        out["mask"] = mask = pack_mask(mask)
    if mask is not None and out.get("mask_crc32") is None:
        out["mask_crc32"] = zlib.crc32(mask)
    if isinstance(out.get("robust_families"), Mapping):
        out["robust_families"] = json.dumps(out["robust_families"])
    return out


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and values.dtype != object:
        return pa.array(values).cast(kind)
    return pa.array(list(values), kind)
