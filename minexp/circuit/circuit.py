"""A circuit: which units carry a class score, what runs between them, and how that was tested."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..data.files import replacing, write_text
from ..errors import RequestError, VerifyError

if TYPE_CHECKING:
    import networkx
    from matplotlib.figure import Figure

FORMAT = "minexp.circuit/1"
SCORE = "score"  # the layer that stands for the class score


@dataclass(frozen=True)
class Layer:
    """A layer: its kind is channel, neuron, head, gate, stage, or stream, whose units only carry what others wrote."""

    name: str
    kind: str
    units: int


@dataclass(frozen=True)
class Node:
    """A unit. rank: 0 for the first into the circuit. score: as its mode scores it, signed.

    effect: fall of m when this unit alone is ablated; needed: faithfulness lost when the circuit lacks it; None
    where not measured. Units of a stream are drawn but are no nodes: rank -1.
    """

    layer: str
    unit: int
    rank: int
    score: float
    effect: float | None = None
    needed: float | None = None


@dataclass(frozen=True)
class Edge:
    """From unit to unit. effect: what the edge adds to m (paper: the published score, unsigned); change: of the target.

    target_layer "score", target 0: a link to the class score.
    """

    source_layer: str
    source: int
    target_layer: str
    target: int
    effect: float
    change: float | None = None


@dataclass(frozen=True)
class Interval:
    """A mean over draws with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Test:
    """What ablation says of a circuit. Scores m; f(C) = (m(C) - m(none)) / (m(all) - m(none)).

    faithfulness: f of the circuit, everything outside ablated (1: all of the score); completeness: f of the rest, the
    circuit ablated (0: nothing left). inside_drop, outside_drop: fall of m when the inside, the outside is
    ablated. random_*: the same of circuits with as many random units in each layer. elsewhere: what the
    circuit does for this class on other images, on the scale of f: near the faithfulness, it keeps the class
    whatever the image shows. sizes (shares of the nodes), curve (f), random_curve; cpr: area under the curve,
    cmd: area between it and 1, over the sizes.
    """

    __test__ = False  # for pytest

    ablation: str
    metric: str
    full: float
    empty: float
    faithfulness: float
    completeness: float
    inside_drop: float
    outside_drop: float
    random_faithfulness: Interval | None = None
    random_drop: Interval | None = None
    elsewhere: float | None = None
    sizes: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()
    random_curve: tuple[Interval, ...] = ()
    cpr: float | None = None
    cmd: float | None = None


class Subject(Protocol):
    """What a circuit was read from, to test it on."""

    def ablate(self, circuit: Circuit, kind: str | None, controls: int) -> Test:
        """The circuit's test under an ablation."""


@dataclass(frozen=True)
class Circuit:
    """What `read_circuit` found for one image, or for a set of images together.

    nodes: by rank; streams behind them. edges: the strongest into each node, links to the class score among them.
    universe: nodes the network has. size: the share of them in the circuit. passes: forward and backward passes
    that the readout took, for an image; notes: what a reader has to know, such as the caveats of mode paper.
    """

    mode: str
    level: str
    label: int
    label_name: str
    model: str
    fingerprint: str
    layers: tuple[Layer, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    universe: int
    size: float
    images: int = 1
    test: Test | None = None
    stability: Interval | None = None
    passes: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    subject: Subject | None = field(default=None, repr=False, compare=False)

    @property
    def members(self) -> tuple[Node, ...]:
        """The nodes without what streams carry."""
        return tuple(node for node in self.nodes if node.rank >= 0)

    @property
    def links(self) -> tuple[Edge, ...]:
        """The edges into the class score."""
        return tuple(edge for edge in self.edges if edge.target_layer == SCORE)

    def at(self, count: int) -> Circuit:
        """The circuit of the first so many nodes, with the edges among them; its test is of the whole one."""
        nodes = tuple(node for node in self.nodes if node.rank < count)
        there = {(node.layer, node.unit) for node in nodes} | {(SCORE, 0)}
        edges = tuple(
            edge
            for edge in self.edges
            if (edge.source_layer, edge.source) in there and (edge.target_layer, edge.target) in there
        )
        return replace(self, nodes=nodes, edges=edges, size=min(count, len(self.members)) / self.universe)

    def ablate(self, kind: str | None = None, *, controls: int = 20) -> Test:
        """Test the circuit again: mean, zero, resample or blank ablation, against so many random circuits.

        The images are those it was read from. Raises RequestError for a circuit from a file (`minexp.ablate_circuit`
        takes one with a classifier and images).
        """
        if self.subject is None:
            raise RequestError(
                "a circuit from a file has no images: minexp.ablate_circuit(circuit, classifier, x)"
            )
        return self.subject.ablate(self, kind, controls)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads; a figure that is not finite becomes None."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "subject"}
        return {"format": FORMAT, **_plain(content)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Circuit:
        """Raises VerifyError for what is not a circuit of this format."""
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else type(content).__name__
            raise VerifyError(f"a circuit of format {found!r}; this version reads {FORMAT}")
        try:
            return _circuit({key: value for key, value in content.items() if key != "format"})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise VerifyError(
                f"a circuit with fields that do not fit: {' '.join(str(error).split())}"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write .json, which `load` reads again, or .graphml for graph programs."""
        path = Path(path)
        if path.suffix == ".json":
            write_text(path, json.dumps(self.to_json(), allow_nan=False, indent=1) + "\n")
        elif path.suffix == ".graphml":
            import networkx

            with replacing(path) as temporary:
                networkx.write_graphml(self.to_networkx(), temporary)
        else:
            raise RequestError(f"a circuit is saved as .json or .graphml, not {path.name}")
        return path

    @staticmethod
    def load(path: str | Path) -> Circuit:
        """Read what `save` wrote as .json. Raises RequestError where there is none, VerifyError where it is damaged."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror}; give the .json of a circuit") from error
        except (ValueError, RecursionError) as error:
            raise VerifyError(f"{path} is not JSON ({' '.join(str(error).split())[:100]})") from error
        try:
            return Circuit.from_json(content)
        except VerifyError as error:
            raise VerifyError(f"{path}: {error}") from None

    def to_networkx(self) -> networkx.DiGraph:
        """A directed graph whose nodes are "layer/unit"; attributes as in Node and Edge, without what is None."""
        import networkx

        graph = networkx.DiGraph(mode=self.mode, model=self.model, label=self.label_name, size=self.size)
        for node in self.nodes:
            graph.add_node(f"{node.layer}/{node.unit}", **_attributes(node))
        graph.add_node(f"{SCORE}/0", layer=SCORE, unit=0)
        for edge in self.edges:
            ends = f"{edge.source_layer}/{edge.source}", f"{edge.target_layer}/{edge.target}"
            graph.add_edge(*ends, **_attributes(edge))
        return graph

    def plot(self, *, edges: int = 300) -> Figure:
        """A matplotlib figure: layers as columns as they run, the class score on the right, signs as colours.

        A unit's size is its score. At most so many ``edges`` are drawn, the strongest; their width is |effect| beside
        that of the strongest into the same layer. Raises RequestError where matplotlib is not installed.
        """
        from ..report.circuit_plot import plot_circuit

        return plot_circuit(self, edges)

    def __repr__(self) -> str:
        what = f"{self.label_name} · {self.mode} · {len(self.members)} of {self.universe} nodes ({self.size:.1%})"
        text = f"Circuit({what}, {len(self.edges)} edges"
        if self.test is not None:
            text += f", faithfulness {self.test.faithfulness:.2f} under {self.test.ablation} ablation"
        return text + ")"


def _attributes(item: Node | Edge) -> dict[str, Any]:
    return {key: value for key, value in asdict(item).items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _circuit(content: dict[str, Any]) -> Circuit:
    test, stability = content.pop("test", None), content.pop("stability", None)
    lists = {"layers": Layer, "nodes": Node, "edges": Edge}
    parts: dict[str, Any] = {
        name: tuple(kind(**item) for item in content.pop(name)) for name, kind in lists.items()
    }
    circuit = Circuit(
        **content | {"notes": tuple(content.pop("notes", ()))},
        **parts,
        test=None if test is None else _test(test),
        stability=None if stability is None else Interval(**stability),
    )
    known = {layer.name: layer.units for layer in circuit.layers} | {SCORE: 1}
    for node in circuit.nodes:
        if not 0 <= node.unit < known[node.layer]:
            raise ValueError(f"unit {node.unit} of {node.layer}")
    for edge in circuit.edges:
        if not (0 <= edge.source < known[edge.source_layer] and 0 <= edge.target < known[edge.target_layer]):
            raise ValueError(f"edge {edge.source_layer}/{edge.source} to {edge.target_layer}/{edge.target}")
    return circuit


def _test(content: dict[str, Any]) -> Test:
    changes: dict[str, Any] = {}
    for name in ("random_faithfulness", "random_drop"):
        changes[name] = None if content.get(name) is None else Interval(**content[name])
    changes["random_curve"] = tuple(Interval(**item) for item in content.get("random_curve", ()))
    changes |= {name: tuple(map(_number, content.get(name, ()))) for name in ("sizes", "curve")}
    for name in ("full", "empty", "faithfulness", "completeness", "inside_drop", "outside_drop"):
        changes[name] = _number(content[name])
    return Test(**content | changes)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def area(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Mean of a piecewise linear curve over the range of sizes."""
    if len(sizes) < 2:
        return math.nan
    steps = [(b - a) * (u + v) / 2 for a, b, u, v in zip(sizes, sizes[1:], values, values[1:], strict=False)]
    return sum(steps) / (sizes[-1] - sizes[0])
