"""The kinds of rows a store can hold: explanations of images, and circuits."""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import VerifyError


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of a store and what has to hold for its rows.

    format: its name and version on disk; content, command: what it holds and what writes it, for messages.
    normalise: a row as it is stored, or ValueError; problems: what does not verify in the ``checked`` columns.
    """

    format: str
    content: str
    command: str
    schema: pa.Schema
    checked: tuple[str, ...]
    normalise: Callable[[Mapping[str, Any]], dict[str, Any]]
    problems: Callable[[Mapping[str, Any]], list[str]]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(self.schema.names)


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


STATUSES = ("certified", "uncertified", "error")
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error", pa.string()),
        ("truth", pa.int32()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        ("conf", pa.float32()),
        ("label_masked", pa.int32()),
        ("conf_masked", pa.float32()),
        ("conf_complement", pa.float32()),
        ("conf_empty", pa.float32()),
        ("kept", pa.bool_()),
        ("area", pa.float32()),
        ("components", pa.int32()),
        ("border_share", pa.float32()),
        ("threshold", pa.float32()),
        ("robust_train", pa.float32()),
        ("robust_train_low", pa.float32()),
        ("robust_train_high", pa.float32()),
        ("robust_train_n", pa.int32()),
        ("robust_heldout", pa.float32()),
        ("robust_heldout_low", pa.float32()),
        ("robust_heldout_high", pa.float32()),
        ("robust_heldout_n", pa.int32()),
        ("robust_other", pa.float32()),
        ("robust_other_n", pa.int32()),
        (
            "robust_families",
            pa.string(),
        ),  # JSON object: family -> share of its backgrounds with the class kept
        ("dilation_kept", pa.bool_()),
        ("minimal_at", pa.int32()),
        ("predicate", pa.string()),
        ("evaluations", pa.int32()),
        ("ms", pa.float32()),
        ("h", pa.int32()),
        ("w", pa.int32()),
        ("mask", pa.binary()),
        ("mask_crc32", pa.int64()),
    ]
)


def _explanation_problems(row: Mapping[str, Any]) -> list[str]:
    if row["status"] not in STATUSES:
        return [f"unknown status {row['status']!r}"]
    if row["mask"] is None:
        return [] if row["status"] == "error" else ["no mask"]
    if zlib.crc32(row["mask"]) != row["mask_crc32"]:
        return ["the mask does not match its checksum"]
    if row["h"] is None or row["w"] is None or len(row["mask"]) != (row["h"] * row["w"] + 7) // 8:
        return [f"a mask of {len(row['mask'])} bytes is not {row['h']} x {row['w']} pixels"]
    area = unpack_mask(row["mask"], row["h"], row["w"]).mean()
    if row["area"] is not None and abs(area - row["area"]) > 1e-5:
        return [f"the mask covers {area:.5f} of the image, the row says {row['area']:.5f}"]
    return []


def _explanation(row: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(row)
    if out.get("status") not in STATUSES:
        raise ValueError(f"status is {out.get('status')!r}: one of {', '.join(STATUSES)}")
    mask = out.get("mask")
    if isinstance(mask, np.ndarray):
        out["h"], out["w"] = mask.shape
        out["mask"] = mask = pack_mask(mask)
    if mask is not None and out.get("mask_crc32") is None:
        out["mask_crc32"] = zlib.crc32(mask)
    if isinstance(out.get("robust_families"), Mapping):
        out["robust_families"] = json.dumps(out["robust_families"])
    return out


EXPLANATIONS = Table(
    "minexp.explanations/1",
    "explanations",
    "minexp explain",
    SCHEMA,
    ("id", "status", "area", "h", "w", "mask", "mask_crc32"),
    _explanation,
    _explanation_problems,
)

_NODE = pa.struct(
    [
        pa.field("layer", pa.string(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # -1: a residual stream's unit, which is no node
        ("score", pa.float32()),
        ("effect", pa.float32()),
        ("needed", pa.float32()),
    ]
)
_EDGE = pa.struct(
    [
        pa.field("source_layer", pa.string(), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
        pa.field("target_layer", pa.string(), nullable=False),  # "score": a link to the class score
        pa.field("target", pa.int32(), nullable=False),
        ("effect", pa.float32()),
        ("change", pa.float32()),
    ]
)
_FIGURES = (
    *("size", "full", "empty", "faithfulness", "completeness", "inside_drop", "outside_drop"),
    *("random_faithfulness", "random_faithfulness_low", "random_faithfulness_high"),
    *("random_drop", "random_drop_low", "random_drop_high", "elsewhere", "cpr", "cmd", "passes", "seconds"),
)
_CIRCUIT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error", pa.string()),
        ("truth", pa.int32()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        ("mode", pa.string()),
        ("level", pa.string()),
        ("ablation", pa.string()),
        ("metric", pa.string()),
        *((name, pa.float32()) for name in _FIGURES),
        ("universe", pa.int32()),
        ("sizes", pa.list_(pa.float32())),
        ("curve", pa.list_(pa.float32())),
        ("nodes", pa.list_(_NODE)),
        ("edges", pa.list_(_EDGE)),
    ]
)


def _circuit(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("status") not in ("read", "error"):
        raise ValueError(f"status is {row.get('status')!r}: read or error")
    return dict(row)


def _circuit_problems(row: Mapping[str, Any]) -> list[str]:
    if row["status"] == "error":
        return []
    if row["status"] != "read":
        return [f"unknown status {row['status']!r}"]
    if row["nodes"] is None or row["edges"] is None:
        return ["no nodes or no edges"]
    there = {(node["layer"], node["unit"]) for node in row["nodes"]} | {("score", 0)}
    ends = {(e["source_layer"], e["source"]) for e in row["edges"]} | {
        (e["target_layer"], e["target"]) for e in row["edges"]
    }
    if not ends <= there:
        return [f"an edge ends at {min(ends - there)}, which is no node"]
    return []


CIRCUITS = Table(
    "minexp.circuits/1",
    "circuits",
    "minexp circuit",
    _CIRCUIT_SCHEMA,
    ("id", "status", "nodes", "edges"),
    _circuit,
    _circuit_problems,
)
TABLES = {table.format: table for table in (EXPLANATIONS, CIRCUITS)}
