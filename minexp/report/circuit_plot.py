"""A circuit as a matplotlib figure: layers as columns in the order in which they run, the class score on the right."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..circuit.circuit import SCORE
from ..errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..circuit.circuit import Circuit, Edge, Node

PLUS, MINUS, INK = "#2457d6", "#d2601a", "#1b1f24"  # as on the page of circuits
MARKERS = {"head": "s", "neuron": "D", "gate": "^"}  # other kinds: a circle
Unit = tuple[str, int]
CLASS: Unit = (SCORE, 0)


def plot_circuit(circuit: Circuit, edges: int) -> Figure:
    """The figure that `Circuit.plot` gives, which says what is drawn and what is raised."""
    try:
        from matplotlib.collections import PathCollection
        from matplotlib.figure import Figure
        from matplotlib.path import Path
    except ImportError as error:
        raise RequestError("Circuit.plot needs matplotlib: pip install 'minexp[plot]'") from error

    nodes, weights = _drawn(circuit)
    strongest = sorted(weights, key=lambda edge: -weights[edge])[: max(0, edges)]
    columns = _columns(circuit, nodes, weights)
    at = {CLASS: (float(len(columns)), 0.5)}
    for column, (_, units) in enumerate(columns):
        at |= {unit: (float(column), (i + 0.5) / len(units)) for i, unit in enumerate(units)}

    height = 1.8 + min(7.0, max(2.4, 0.2 * max((len(units) for _, units in columns), default=1)))
    figure = Figure(figsize=(2.4 + 1.1 * len(columns), height), layout="constrained")
    axes = figure.add_subplot()
    curves = []
    for edge in strongest:
        (x, y), (u, v) = at[edge.source_layer, edge.source], at[edge.target_layer, edge.target]
        bend = 0.45 * (u - x)
        curves.append(Path([(x, y), (x + bend, y), (u - bend, v), (u, v)], [Path.MOVETO, *3 * [Path.CURVE4]]))
    lines = PathCollection(
        curves,
        facecolors="none",
        edgecolors=[_colour(edge.effect) for edge in strongest],
        linewidths=[0.4 + 2.4 * math.sqrt(weights[edge]) for edge in strongest],
        alpha=[0.15 + 0.6 * weights[edge] for edge in strongest],
        label="edges",
        zorder=1,
    )
    axes.add_collection(lines)
    for layer, units in columns:
        kind = next(known.kind for known in circuit.layers if known.name == layer)
        here = [nodes[unit] for unit in units]
        colours = [_colour(node.score) for node in here]
        shares = _shares([node.score for node in here], _largest(circuit, kind))
        axes.scatter(
            [at[unit][0] for unit in units],
            [at[unit][1] for unit in units],
            s=[8 + 90 * share for share in shares],
            marker=MARKERS.get(kind, "o"),
            facecolors="none" if kind == "stream" else colours,
            edgecolors=colours,
            label=layer,
            zorder=2,
        )
    axes.scatter(*at[CLASS], s=70, color=INK, label=SCORE, zorder=2)
    beside = (9.0, 0.0)
    axes.annotate(
        circuit.label_name, at[CLASS], beside, textcoords="offset points", va="center", weight="bold"
    )
    _finish(axes, circuit, [layer for layer, _ in columns], len(strongest), len(weights))
    return figure


def _drawn(circuit: Circuit) -> tuple[dict[Unit, Node], dict[Edge, float]]:
    """Nodes, and units of streams with an edge on both sides; edges among them, each with its weight.

    A weight is the share of the strongest effect into the same layer: so layers of small numbers show their structure.
    """
    sources = {(edge.source_layer, edge.source) for edge in circuit.edges}
    targets = {(edge.target_layer, edge.target) for edge in circuit.edges}
    units = {(node.layer, node.unit): node for node in circuit.nodes}
    nodes = {
        unit: node for unit, node in units.items() if node.rank >= 0 or (unit in sources and unit in targets)
    }
    ends = nodes.keys() | {CLASS}
    groups: dict[str, list[Edge]] = defaultdict(list)
    for edge in circuit.edges:
        if (edge.source_layer, edge.source) in nodes and (edge.target_layer, edge.target) in ends:
            groups[edge.target_layer].append(edge)
    weights: dict[Edge, float] = {}
    for group in groups.values():
        sizes = [_size(edge.effect) for edge in group]
        weights |= zip(group, _shares(sizes, max(sizes)), strict=True)
    return nodes, weights


def _columns(
    circuit: Circuit, nodes: dict[Unit, Node], weights: dict[Edge, float]
) -> list[tuple[str, list[Unit]]]:
    """Layers with their units from below, which are ordered by where their edges lead: fewer edges cross."""
    place: dict[Unit, float] = {CLASS: 0.5}
    ahead: dict[Unit, list[tuple[Unit, float]]] = defaultdict(list)
    for edge, weight in weights.items():
        ahead[edge.source_layer, edge.source].append(((edge.target_layer, edge.target), weight))
    columns = []
    for layer in reversed(circuit.layers):
        units = [unit for unit in nodes if unit[0] == layer.name]
        mean = {}
        for unit in units:
            total = sum(weight for _, weight in ahead[unit])
            led = sum(weight * place.get(target, 0.5) for target, weight in ahead[unit])
            mean[unit] = led / total if total else 0.0
        units.sort(key=lambda unit: (mean[unit], _size(nodes[unit].score)))
        place |= {unit: (i + 0.5) / len(units) for i, unit in enumerate(units)}
        if units:
            columns.append((layer.name, units))
    return columns[::-1]


def _finish(axes: Any, circuit: Circuit, layers: list[str], drawn: int, known: int) -> None:
    axes.set(xlim=(-0.4, len(layers) + 0.2), ylim=(-0.03, 1.03), yticks=[])
    axes.set_xticks(range(len(layers)), layers, rotation=40, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    text = f"{circuit.label_name} · {circuit.mode} · {len(circuit.members)} of {circuit.universe} nodes"
    text += f" · {drawn} of {known} edges"
    if circuit.test is not None:
        text += f" · faithfulness {circuit.test.faithfulness:.2f} ({circuit.test.ablation} ablation)"
    axes.set_xlabel(f"{text}\nblue: for the class, orange: against it", fontsize=8, color=INK)


def _largest(circuit: Circuit, kind: str) -> float:
    """The largest score of what is sized together: nodes, or what streams carry."""
    carried = kind == "stream"
    return max((_size(node.score) for node in circuit.nodes if (node.rank < 0) == carried), default=0.0)


def _shares(values: Sequence[float], largest: float) -> list[float]:
    return [_size(value) / largest if largest else 0.0 for value in values]


def _size(value: float | None) -> float:
    """Of what a file has: a figure that was not finite counts as 0."""
    return abs(value) if value is not None and math.isfinite(value) else 0.0


def _colour(value: float | None) -> str:
    return MINUS if value is not None and value < 0 else PLUS
