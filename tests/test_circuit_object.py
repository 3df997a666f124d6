"""The circuit as an object: written and read again, damaged, cut down, and as a graph."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import pytest
import toy_circuits as toys
from tiny_models import one_thread as one_thread

import minexp
from minexp.circuit.circuit import Edge, Interval, Node
from minexp.errors import RequestError, VerifyError


@pytest.fixture(scope="module")
def circuit() -> minexp.Circuit:
    x = toys.image()
    reference = (x.expand(8, 3, 4, 4) * 0.1).clone()
    classifier = toys.classifier(toys.Skip(), class_names=("warm", "<cold>"))
    return minexp.read_circuit(
        classifier, x, reference=reference, target=0, size=1.0, curve_controls=2, metric="logit"
    )


def test_written_and_read_again(circuit: minexp.Circuit, tmp_path: Path) -> None:
    assert circuit.save(tmp_path / "c.json") == tmp_path / "c.json"
    again = minexp.Circuit.load(tmp_path / "c.json")
    assert [(n.layer, n.unit, n.rank) for n in again.nodes] == [
        (n.layer, n.unit, n.rank) for n in circuit.nodes
    ]
    assert [e.effect for e in again.edges] == pytest.approx([e.effect for e in circuit.edges], rel=1e-6)
    assert again.layers == circuit.layers and again.label_name == "warm"
    assert again.test is not None and circuit.test is not None
    assert again.test.random_curve[0].n == 2 and len(again.test.curve) == len(circuit.test.sizes)
    assert minexp.Circuit.from_json(again.to_json()) == again
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_what_is_not_finite_is_null_and_comes_back(circuit: minexp.Circuit) -> None:
    assert circuit.test is not None
    odd = replace(
        circuit, test=replace(circuit.test, faithfulness=math.nan, curve=(math.inf, 1.0), elsewhere=None)
    )
    text = json.dumps(odd.to_json(), allow_nan=False)
    again = minexp.Circuit.from_json(json.loads(text))
    assert again.test is not None
    assert (
        math.isnan(again.test.faithfulness)
        and math.isnan(again.test.curve[0])
        and again.test.elsewhere is None
    )


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda c: c | {"format": "minexp.circuit/9"},
            "format 'minexp.circuit/9'; this version reads minexp.circuit/1",
        ),
        (lambda c: [1, 2], "format 'list'"),
        (lambda c: _without(c, "nodes"), "nodes"),
        (lambda c: c | {"surprise": 1}, "surprise"),
        (
            lambda c: c | {"nodes": [{"layer": "stem", "unit": 99, "rank": 0, "score": 1.0}]},
            "unit 99 of stem",
        ),
        (lambda c: c | {"nodes": [{"layer": "nowhere", "unit": 0, "rank": 0, "score": 1.0}]}, "nowhere"),
        (
            lambda c: (
                c
                | {
                    "edges": [
                        {
                            "source_layer": "stem",
                            "source": 0,
                            "target_layer": "sum",
                            "target": -1,
                            "effect": 1.0,
                        }
                    ]
                }
            ),
            "sum/-1",
        ),
        (lambda c: c | {"test": {"full": 1.0}}, "empty"),
    ],
)
def test_damaged_files_say_what_is_wrong(
    circuit: minexp.Circuit, tmp_path: Path, change: Any, match: str
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(change(circuit.to_json())))
    with pytest.raises(VerifyError, match=match) as error:
        minexp.Circuit.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(circuit: minexp.Circuit, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(VerifyError, match="not JSON"):
        minexp.Circuit.load(tmp_path / "c.json")
    with pytest.raises(RequestError, match="No such file"):
        minexp.Circuit.load(tmp_path / "d.json")
    with pytest.raises(RequestError, match=r"\.json or \.graphml, not c\.pkl"):
        circuit.save(tmp_path / "c.pkl")


def test_as_a_graph(circuit: minexp.Circuit, tmp_path: Path) -> None:
    graph = circuit.to_networkx()
    assert set(graph.nodes) == {f"{n.layer}/{n.unit}" for n in circuit.nodes} | {"score/0"}
    skip = next(e for e in circuit.edges if (e.source_layer, e.source, e.target_layer) == ("stem", 0, "sum"))
    assert graph.edges["stem/0", f"sum/{skip.target}"]["effect"] == skip.effect
    assert networkx.is_directed_acyclic_graph(graph)
    circuit.save(tmp_path / "c.graphml")
    again = networkx.read_graphml(tmp_path / "c.graphml")
    assert set(again.nodes) == set(graph.nodes) and set(again.edges) == set(graph.edges)
    assert again.nodes["stem/0"]["rank"] == graph.nodes["stem/0"]["rank"]


def test_a_part_of_a_circuit_keeps_the_edges_within_it(circuit: minexp.Circuit) -> None:
    part = circuit.at(3)
    there = {(n.layer, n.unit) for n in part.nodes}
    assert [n.rank for n in part.nodes] == [0, 1, 2] and part.size == 3 / circuit.universe
    assert 0 < len(part.edges) < len(circuit.edges)
    assert all((e.source_layer, e.source) in there for e in part.edges)
    assert all(e.target_layer == "score" or (e.target_layer, e.target) in there for e in part.edges)
    assert {e.source_layer for e in part.links} == {"sum"}


def test_it_says_what_it_is(circuit: minexp.Circuit) -> None:
    text = repr(circuit)
    assert text.startswith("Circuit(warm · exact · 6 of 6 nodes (100.0%)") and "faithfulness 1.00" in text
    assert "under mean ablation" in text
    assert Node("a", 0, 0, 1.0) != Node("a", 1, 0, 1.0) and Edge("a", 0, "b", 0, 1.0).change is None
    assert Interval(0.0, -1.0, 1.0, 3).n == 3


def test_tested_again_under_another_ablation(circuit: minexp.Circuit, tmp_path: Path) -> None:
    part = circuit.at(4)
    test = part.ablate("zero", controls=3)
    assert test.ablation == "zero" and test.faithfulness == pytest.approx(1) and test.empty == 0
    assert test.random_drop is not None and test.random_drop.n == 3
    assert part.ablate(controls=0).ablation == "mean"
    circuit.save(tmp_path / "c.json")
    loaded = minexp.Circuit.load(tmp_path / "c.json")
    with pytest.raises(RequestError, match=r"minexp\.ablate_circuit\(circuit, classifier, x\)"):
        loaded.ablate()
    classifier = toys.classifier(toys.Skip())
    again = minexp.ablate_circuit(loaded.at(4), classifier, toys.image(), ablation="zero", controls=3)
    assert again.faithfulness == pytest.approx(test.faithfulness) and again.full == test.full
    with pytest.raises(RequestError, match="read from another classifier"):
        minexp.ablate_circuit(loaded, toys.classifier(toys.Chain()), toys.image())


def _drawing(circuit: minexp.Circuit, **options: Any) -> dict[str, Any]:
    """The collections of the figure's axes by what they are of: edges, a layer, the score."""
    (axes,) = circuit.plot(**options).axes
    return {collection.get_label(): collection for collection in axes.collections}


def test_a_figure_shows_every_unit_and_edge(circuit: minexp.Circuit, tmp_path: Path) -> None:
    colors = pytest.importorskip("matplotlib.colors")
    odd = tuple(replace(e, effect=-e.effect) if i % 3 == 0 else e for i, e in enumerate(circuit.edges))
    circuit = replace(circuit, edges=odd)
    drawn = _drawing(circuit)
    used = [layer.name for layer in circuit.layers if any(n.layer == layer.name for n in circuit.nodes)]
    assert set(drawn) == {*used, "edges", "score"}
    x = [drawn[name].get_offsets()[0][0] for name in [*used, "score"]]
    assert x == sorted(set(x)), "columns in the order in which layers run, the score on the right"
    for name in used:
        offsets, sizes = drawn[name].get_offsets(), drawn[name].get_sizes()
        here = [abs(n.score) for n in circuit.nodes if n.layer == name]
        assert len({tuple(o) for o in offsets.tolist()}) == len(here) == len(sizes)
        assert sorted(sizes) == pytest.approx(
            sorted(8 + 90 * s / max(abs(n.score) for n in circuit.members) for s in here)
        )
    edges = drawn["edges"]
    assert len(edges.get_paths()) == len(circuit.edges)
    minus = sum(colors.to_hex(c) == "#d2601a" for c in edges.get_edgecolor())
    assert minus == sum(e.effect < 0 for e in circuit.edges) > 0

    few = _drawing(circuit, edges=3)["edges"]
    assert len(few.get_paths()) == 3 and min(few.get_linewidths()) >= sorted(edges.get_linewidths())[-3]
    ends = {tuple(drawn[name].get_offsets()[i]) for name in used for i in range(len(drawn[name].get_sizes()))}
    assert {tuple(p.vertices[0]) for p in edges.get_paths()} <= ends
    circuit.at(2).plot().savefig(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_figure_hides_streams_that_lead_nowhere_and_needs_matplotlib(
    circuit: minexp.Circuit, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    mixed = toys.every_kind()
    drawn = _drawing(mixed)
    assert len(drawn["stream"].get_offsets()) == 1, "unit 2 has no edges"
    assert len(drawn["stream"].get_facecolor()) == 0 and len(drawn["neuron"].get_facecolor()) == 1
    corners = {name: len(c.get_paths()[0].vertices) - 1 for name, c in drawn.items() if name != "edges"}
    assert (corners["head"], corners["neuron"], corners["gate"]) == (4, 4, 3)
    assert min(corners["channel"], corners["stream"], corners["score"]) > 10, "round"
    assert drawn["stream"].get_sizes() == drawn["channel"].get_sizes() > drawn["head"].get_sizes()
    for end in ("source_layer", "target_layer"):
        edges = tuple(e for e in mixed.edges if getattr(e, end) != "stream")
        cut = _drawing(replace(mixed, edges=edges))
        assert "stream" not in cut and len(cut["edges"].get_paths()) == len(edges) - 1, "it ends there"
    broken = replace(circuit, edges=tuple(replace(e, effect=None) for e in circuit.edges))  # type: ignore[arg-type]
    assert len(_drawing(broken)["edges"].get_paths()) == len(circuit.edges)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"needs matplotlib: pip install 'minexp\[plot\]'"):
        circuit.plot()
