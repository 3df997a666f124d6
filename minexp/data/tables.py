"""The kinds of rows that stores hold: explanations of images, and circuits."""

from __future__ import annotations

import pyarrow as pa

from .table import Table

_ORIGIN = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    ("error", pa.string()),
    ("truth", pa.int32()),
    ("label", pa.int32()),
    ("label_name", pa.string()),
)

EXPLANATIONS = Table(
    "minexp.explanations/2",
    "explanations",
    "minexp explain",
    pa.schema(
        [
            *_ORIGIN,
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
            # JSON object: family -> share of its backgrounds with the class kept
            ("robust_families", pa.string()),
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
    ),
    statuses=("certified", "uncertified", "error"),
    means=("area", "kept", "robust_train", "robust_heldout", "evaluations"),
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
CIRCUITS = Table(
    "minexp.circuits/2",
    "circuits",
    "minexp circuit",
    pa.schema(
        [
            *_ORIGIN,
            *((name, pa.string()) for name in ("mode", "level", "ablation", "metric")),
            *((name, pa.float32()) for name in _FIGURES),
            ("universe", pa.int32()),
            ("sizes", pa.list_(pa.float32())),
            ("curve", pa.list_(pa.float32())),
            ("nodes", pa.list_(_NODE)),
            ("edges", pa.list_(_EDGE)),
            ("notes", pa.list_(pa.string())),
        ]
    ),
    statuses=("read", "error"),
    means=(
        *("size", "edges", "faithfulness", "cpr", "cmd", "inside_drop", "random_drop", "elsewhere"),
        "passes",
    ),
    shard_rows=(16, 64),  # a row may take a minute, and has thousands of edges
)
TABLES = {table.format: table for table in (EXPLANATIONS, CIRCUITS)}
COLUMNS = EXPLANATIONS.columns
