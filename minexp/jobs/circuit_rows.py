"""Circuits as rows of a store, and back. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..circuit.circuit import Circuit, Edge, Interval, Layer, Node, Test
from .unit import Row

_ABOUT = ("label", "label_name", "mode", "level", "universe", "size", "passes", "seconds")
_TESTED = (
    *("full", "empty", "faithfulness", "completeness", "inside_drop", "outside_drop"),
    *("elsewhere", "cpr", "cmd"),
)
_RANDOM = ("random_faithfulness", "random_drop")


def row_of(circuit: Circuit) -> Row:
    """A tested circuit's row, but for where its image came from; a figure that is not finite is null."""
    test = circuit.test
    assert test is not None
    row: Row = {"status": "read", **{name: getattr(circuit, name) for name in _ABOUT}}
    row |= {"ablation": test.ablation, "metric": test.metric}
    row |= {name: _finite(getattr(test, name)) for name in _TESTED}
    for name in _RANDOM:
        if (interval := getattr(test, name)) is not None:
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    row |= {"sizes": list(test.sizes), "curve": [_finite(value) for value in test.curve]}
    row |= {"nodes": [asdict(node) for node in circuit.nodes]}
    row |= {"edges": [asdict(edge) for edge in circuit.edges]}
    return row | {"notes": list(circuit.notes)}


def circuit_of(row: Mapping[str, Any], run: Mapping[str, Any]) -> Circuit:
    """The circuit of a row whose status is read. run: what its job recorded about itself."""
    figures: dict[str, Any] = {name: row[name] for name in _TESTED}
    figures |= {name: math.nan if figures[name] is None else figures[name] for name in _TESTED[:6]}
    controls = run["settings"]["controls"]
    for name in _RANDOM:
        if row[name] is not None:
            figures[name] = Interval(row[name], row[f"{name}_low"], row[f"{name}_high"], controls)
    test = Test(
        ablation=row["ablation"],
        metric=row["metric"],
        **figures,
        sizes=tuple(row["sizes"]),
        curve=tuple(math.nan if value is None else value for value in row["curve"]),
    )
    return Circuit(
        **{name: row[name] for name in _ABOUT},
        model=run["model"],
        fingerprint=run["classifier"],
        layers=tuple(Layer(**layer) for layer in run["layers"]),
        nodes=tuple(Node(**node) for node in row["nodes"]),
        edges=tuple(Edge(**edge) for edge in row["edges"]),
        test=test,
        notes=tuple(row["notes"]),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
