"""Networks whose circuits are known on paper: `exact` finds them, with the numbers worked by hand."""

import warnings

import pytest
import torch
import toy_circuits as toys
from tiny_models import one_thread as one_thread
from toy_circuits import image

import minexp
from minexp.circuit.ablation import Ablation
from minexp.circuit.baseline import make_baseline
from minexp.circuit.edges import intervene
from minexp.circuit.network import network
from minexp.circuit.ranking import rank

# Zero ablation, class 0, an image of the colour (0.75, 0.5, 0.25): m, and each edge's effect on it where it has one.
KNOWN = {
    toys.Chain: (
        2.75,
        {
            ("conv1", 0, "conv2", 0): 3.0,  # 2 * h0, counted twice
            ("conv1", 3, "conv2", 0): 0.5,
            ("conv1", 0, "conv2", 1): 0.75,  # holds k1 down, which speaks against the class
            ("conv1", 1, "conv2", 1): -0.75,  # without h1 the ReLU ends at 0: k1 falls by 0.75, not by 1.5
            ("conv2", 0, "score", 0): 3.5,
            ("conv2", 1, "score", 0): -0.75,
        },
    ),
    toys.Skip: (
        1.25,
        {
            ("stem", 0, "conv1", 0): 0.5,
            ("stem", 1, "conv1", 0): -1.0,
            ("stem", 0, "sum", 0): 0.75,  # the identity
            ("conv1", 0, "sum", 0): 0.5,  # 4 * a0, halved by the normalisation
            ("sum", 0, "score", 0): 1.25,
        },
    ),
    toys.Concat: (
        1.25,
        {
            ("first", 0, "second", 0): 0.5,
            ("first", 1, "second", 0): -1.0,
            ("first", 0, "third", 0): 0.75,
            ("second", 0, "third", 0): 0.5,
            ("third", 0, "score", 0): 1.25,
        },
    ),
    toys.Grouped: (
        3.0,
        {
            ("stem", 0, "depthwise", 0): 1.5,
            ("stem", 1, "depthwise", 1): 1.5,
            ("depthwise", 0, "grouped", 0): 1.5,
            ("depthwise", 1, "grouped", 0): 1.5,
            ("grouped", 0, "score", 0): 3.0,
        },
    ),
    toys.Gated: (
        1.125,
        {
            ("stem", 0, "squeeze", 0): 1.125,
            ("squeeze", 0, "excite", 0): 1.125,
            ("excite", 0, "out", 0): 1.125,
            ("stem", 0, "out", 0): 1.125,
            ("out", 0, "score", 0): 1.125,
        },
    ),
    toys.Attention: (
        3.0,
        {
            ("patch", 0, "head", 0): 2.25,
            ("head", 0, "sum", 0): 2.25,
            ("patch", 0, "sum", 0): 0.75,
            ("sum", 0, "score", 0): 3.0,
        },
    ),
}
# Where a gradient says something else than an ablation: the ReLU is taken to stay open.
LINEAR = {
    toys.Chain: {("conv1", 1, "conv2", 1): -1.5},
    toys.Skip: {("stem", 0, "conv1", 0): 1.5},
    toys.Concat: {("first", 0, "second", 0): 1.5},
}


def edges_of(circuit: minexp.Circuit) -> dict[tuple[str, int, str, int], float]:
    return {(e.source_layer, e.source, e.target_layer, e.target): e.effect for e in circuit.edges}


def read(model: type, **settings: object) -> minexp.Circuit:
    defaults = {"target": 0, "ablation": "zero", "metric": "logit", "size": 1.0}
    return minexp.read_circuit(toys.classifier(model()), image(), **{**defaults, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("model", KNOWN, ids=lambda model: model.__name__)
def test_every_edge_has_the_effect_worked_by_hand(model: type) -> None:
    score, edges = KNOWN[model]
    circuit = read(model)
    assert circuit.test is not None
    assert circuit.test.full == pytest.approx(score) and circuit.test.empty == pytest.approx(0)
    assert edges_of(circuit) == pytest.approx(edges)
    assert edges_of(read(model, mode="gradient")) == pytest.approx(edges | LINEAR.get(model, {}))


@pytest.mark.parametrize("model", KNOWN, ids=lambda model: model.__name__)
def test_the_circuit_is_the_units_on_the_way_and_no_others(model: type) -> None:
    score, edges = KNOWN[model]
    members = {(source, unit) for source, unit, _, _ in edges}
    everything = read(model)
    circuit = read(model, size=len(members) / everything.universe)
    assert {(node.layer, node.unit) for node in circuit.nodes} == members
    test = circuit.test
    assert test is not None
    assert test.faithfulness == pytest.approx(1) and test.completeness == pytest.approx(0, abs=1e-6)
    assert test.inside_drop == pytest.approx(score) and test.outside_drop == pytest.approx(0, abs=1e-6)
    assert test.curve[-1] == pytest.approx(1)
    for node in everything.nodes:  # alone, a unit outside does nothing and one inside does something
        assert node.effect is not None
        assert (abs(node.effect) > 1e-6) == ((node.layer, node.unit) in members)


@pytest.mark.parametrize("model", KNOWN, ids=lambda model: model.__name__)
def test_into_a_linear_rest_an_edge_does_what_its_score_says(model: type) -> None:
    classifier = toys.classifier(model())
    net = network(classifier)
    x = image()[None]
    baseline = make_baseline(net, "zero", reference=None, blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(net, x, torch.zeros(1, dtype=torch.long), baseline)
    sites = {site.name: site for site in net.sites}
    last = net.parents(net.scores)[0].name  # the score is linear in what comes last
    edges = {edge: effect for edge, effect in KNOWN[model][1].items() if edge[2] in (last, "score")}
    asked = [(sites[s], i, sites.get(t), o) for s, i, t, o in edges]
    assert intervene(ablation, 0, asked).tolist() == pytest.approx(list(edges.values()))


@pytest.mark.parametrize("model", [toys.Either, toys.Both], ids=lambda model: model.__name__)
def test_units_that_stand_in_for_each_other_are_found_together(model: type) -> None:
    net = network(toys.classifier(model()))
    baseline = make_baseline(net, "zero", reference=None, blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(net, image()[None], torch.zeros(1, dtype=torch.long), baseline)
    assert net.nodes == 4 and float(ablation.full) == pytest.approx(3) and float(ablation.empty) == 0
    keep = rank(ablation, "pruned").keep(2)
    assert keep.tolist() == [[True, False, True, False]]
    assert ablation.faithfulness(keep).tolist() == [1] and ablation.faithfulness(~keep).tolist() == [0]
    if model is toys.Either:  # nothing falls when one unit goes, so each alone seems to do nothing
        for found in (rank(ablation, "gradient"), rank(ablation, "pruned", necessity=0.0)):
            assert ablation.faithfulness(~found.keep(2)).tolist() == [1]


def test_layers_and_kinds() -> None:
    kinds = {layer.name: (layer.kind, layer.units) for layer in read(toys.Gated).layers}
    assert kinds == {
        "stem": ("channel", 2),
        "squeeze": ("neuron", 1),
        "excite": ("gate", 2),
        "out": ("channel", 2),
    }
    kinds = {layer.name: (layer.kind, layer.units) for layer in read(toys.Attention).layers}
    assert kinds == {"patch": ("channel", 3), "head": ("head", 2), "sum": ("channel", 3)}


def test_a_model_that_cannot_be_traced_has_its_stages_as_layers() -> None:
    classifier = toys.classifier(toys.Untraceable())
    with pytest.warns(UserWarning, match=r"Untraceable cannot be traced by torch.export .*stages as layers"):
        circuit = minexp.read_circuit(
            classifier, image(), target=0, ablation="zero", metric="logit", size=1.0
        )
    assert circuit.level == "stage" and [layer.kind for layer in circuit.layers] == ["stage", "stage"]
    assert any("cannot be traced" in note for note in circuit.notes)
    stages = {**KNOWN[toys.Chain][1], ("conv1", 1, "conv2", 1): -1.5}  # tapped before the ReLU
    assert edges_of(circuit) == pytest.approx(stages)
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        again = minexp.read_circuit(
            classifier, image(), target=0, ablation="zero", metric="logit", size=1.0, mode="gradient"
        )
    assert edges_of(again) == pytest.approx(stages)


def test_the_published_readout_shows_its_faults() -> None:
    circuit = read(toys.Chain, mode="paper", fan_in=1)
    assert any("without their sign" in note for note in circuit.notes)
    edges = edges_of(circuit)
    norm = 4.0  # of a constant map of 4 × 4: the value times 4
    assert edges["conv1", 0, "conv2", 0] == pytest.approx(2 * 0.75 * norm)
    assert edges["conv1", 1, "conv2", 1] == pytest.approx(3 * 0.5 * norm)
    assert edges["conv2", 0, "score", 0] == pytest.approx(2 * 1.75)
    assert all(effect > 0 for effect in edges.values())
