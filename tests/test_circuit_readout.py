"""Reading circuits: of images, of kept pixels, of sets, in every mode; what it costs, and what is refused."""

from dataclasses import replace

import pytest
import torch
from test_circuit_ablation import images, small
from tiny_models import one_thread as one_thread
from torch import Tensor, nn

import minexp
from minexp.circuit.circuit import Circuit
from minexp.circuit.ranking import Ranking
from minexp.circuit.readout import Reader
from minexp.circuit.settings import Settings
from minexp.circuit.stability import stability
from minexp.classifier import Classifier
from minexp.errors import MinexpError, RequestError
from minexp.explanation import Explanation
from minexp.targets import Binary, MultiLabel

QUICK = {"sizes": (0.1, 0.3, 1.0), "controls": 2, "members": 3}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return small(7)


def figures(circuit: Circuit) -> tuple[object, ...]:
    assert circuit.test is not None
    edges = [(e.source_layer, e.source, e.target_layer, e.target) for e in circuit.edges]
    return [(n.layer, n.unit) for n in circuit.nodes], edges, circuit.size, circuit.label


@pytest.mark.parametrize("mode", ["exact", "gradient", "paper"])
def test_images_together_have_the_circuits_they_have_alone(classifier: Classifier, mode: str) -> None:
    x = images(3)
    reader = Reader(classifier, Settings(mode=mode, **QUICK), reference=images(8, 2))  # type: ignore[arg-type]
    together = reader.single(*reader.prepare(x))
    for image, circuit in zip(x, together, strict=True):
        alone = minexp.read_circuit(classifier, image, reference=images(8, 2), mode=mode, **QUICK)
        assert figures(alone) == figures(circuit)
        assert alone.test is not None and circuit.test is not None
        assert alone.test.curve == pytest.approx(circuit.test.curve, abs=1e-5)
        assert [e.effect for e in alone.edges] == pytest.approx([e.effect for e in circuit.edges], abs=1e-5)


def test_the_edges_are_among_the_nodes_and_no_more_than_asked(classifier: Classifier) -> None:
    circuit = minexp.read_circuit(classifier, images(1)[0], size=0.5, fan_in=2, **QUICK)
    there = {(n.layer, n.unit) for n in circuit.nodes} | {("score", 0)}
    incoming: dict[tuple[str, int], int] = {}
    for e in circuit.edges:
        assert (e.source_layer, e.source) in there and (e.target_layer, e.target) in there
        if e.target_layer != "score":
            incoming[e.target_layer, e.target] = incoming.get((e.target_layer, e.target), 0) + 1
    assert incoming and max(incoming.values()) == 2
    assert [n.rank for n in circuit.members] == list(range(len(circuit.members)))
    measured = [n for n in circuit.nodes if n.effect is not None]
    assert [n.rank for n in measured] == [0, 1, 2]


def test_a_circuit_of_the_kept_pixels_is_for_the_class_of_the_image(classifier: Classifier) -> None:
    x = images(1)
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[:, 4:9, 4:9] = True
    explanation = Explanation(masks, x, torch.full((1, 3, 1, 1), 0.5), (None,), 0.0)  # type: ignore[arg-type]
    circuit = minexp.read_circuit(classifier, x, explanation, metric="logit", **QUICK)
    label = int(classifier.logits(x).argmax())
    kept = explanation.kept_images()
    assert circuit.label == label and circuit.label_name == str(label)
    assert circuit.test is not None and circuit.test.ablation == "blank"
    with torch.no_grad():
        assert circuit.test.full == pytest.approx(float(classifier.logits(kept)[0, label]), abs=1e-4)
        blank = classifier.logits(torch.full((1, 3, 16, 16), 0.5))[0, label]
    assert circuit.test.empty == pytest.approx(float(blank), abs=1e-4)
    other = minexp.read_circuit(classifier, x, explanation, target=(label + 1) % 5, **QUICK)
    assert other.label == (label + 1) % 5
    with pytest.raises(
        RequestError, match=r"explanation of images \[1, 3, 16, 16\] for images \[2, 3, 16, 16\]"
    ):
        minexp.read_circuit(classifier, images(2), explanation)


def test_a_set_has_one_circuit_with_its_stability(classifier: Classifier) -> None:
    x = images(9)
    circuit = minexp.read_circuit(classifier, x, size=0.2, **QUICK)
    assert circuit.images == 9 and circuit.test is not None and circuit.test.ablation == "mean"
    assert circuit.stability is not None and 0 < circuit.stability.low <= circuit.stability.mean <= 1
    reader = Reader(classifier, Settings(size=0.2, **QUICK), reference=x)  # type: ignore[arg-type]
    single = reader.single(*reader.prepare(x))
    assert circuit.test.full == pytest.approx(sum(c.test.full for c in single if c.test) / 9, abs=1e-4)
    classes = {c.label for c in single}
    assert circuit.label_name == (f"{len(classes)} classes" if len(classes) > 1 else str(classes.pop()))
    one_class = minexp.read_circuit(classifier, x, target=2, size=0.2, **QUICK)
    assert (one_class.label, one_class.label_name) == (2, "2")


def test_stability_is_one_where_the_images_agree_and_low_where_they_do_not() -> None:
    key = torch.arange(20.0).expand(6, 20)
    agree = stability(Ranking("gradient", key, key), 5, seed=0)
    assert (agree.mean, agree.low, agree.high, agree.n) == (1, 1, 1, 100)
    random = torch.rand(6, 200, generator=torch.Generator().manual_seed(0))
    assert stability(Ranking("gradient", random, random), 5, seed=0).mean < 0.7


@pytest.mark.parametrize(("mode", "passes"), [("gradient", 5.0), ("paper", 5.0)])
def test_the_quick_modes_take_few_passes(classifier: Classifier, mode: str, passes: float) -> None:
    circuit = minexp.read_circuit(classifier, images(1)[0], mode=mode, **QUICK)
    assert 0 < circuit.passes <= passes
    exact = minexp.read_circuit(classifier, images(1)[0], mode="exact", **QUICK)
    assert exact.passes > passes


def test_a_circuit_keeps_the_probability_of_classes_and_the_logit_of_other_outputs() -> None:
    model = small(7).model
    for target, metric in ((None, "log_prob"), (Binary(), "log_prob"), (MultiLabel(), "logit")):
        if isinstance(target, Binary):
            model = nn.Sequential(small(7).model, nn.Linear(5, 1))
        given = {} if target is None else {"target": target}
        classifier = Classifier(model.eval(), size=16, **given)  # type: ignore[arg-type]
        assert Reader(classifier, Settings()).metric == metric
        assert Reader(classifier, Settings(metric="margin")).metric == "margin"


def test_the_published_mode_reads_stages_and_says_what_to_think_of_it() -> None:
    classifier = small(7, size=32)
    circuit = minexp.read_circuit(classifier, images(1, size=32)[0], mode="paper", size=0.5, **QUICK)
    assert circuit.level == "stage" and [layer.name for layer in circuit.layers] == list(classifier.taps)
    assert sum("mode paper" in note for note in circuit.notes) == 3
    per_layer = {layer.name: 0 for layer in circuit.layers}
    for node in circuit.members:
        per_layer[node.layer] += 1
    assert per_layer == {layer.name: layer.units // 2 for layer in circuit.layers}  # the same share of each
    assert all(e.effect > 0 for e in circuit.edges) and 0 < len(circuit.links) <= 3
    order = [layer.name for layer in circuit.layers]
    for e in circuit.edges:
        if e.target_layer != "score":
            assert order.index(e.target_layer) == order.index(e.source_layer) + 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": "guess"}, "unknown mode 'guess'; choose exact, gradient, paper"),
        ({"level": "block"}, "unknown level 'block'; choose layer or stage"),
        ({"rank_by": "luck"}, "unknown ranking 'luck'; choose pruned"),
        ({"ablation": "none"}, "unknown ablation 'none'"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"necessity": -1.0}, "necessity -1.0; give a weight of at least 0"),
        ({"sizes": ()}, "give shares of the nodes"),
        ({"sizes": (0.1, 1.5)}, "sizes 0.1, 1.5; give shares of the nodes, above 0 and at most 1"),
        ({"size": 0.0}, "give shares of the nodes"),
        ({"fan_in": 0}, "fan_in is at least 1"),
        ({"target": 5}, "class 5: the model has the classes 0 to 4"),
    ],
)
def test_refused_with_the_way_out(classifier: Classifier, changes: dict[str, object], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        minexp.read_circuit(classifier, images(1)[0], **{**QUICK, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [torch.rand(3, 8, 8), torch.rand(0, 3, 16, 16), torch.zeros(3, 16, 16).int()])
def test_images_that_do_not_fit(classifier: Classifier, x: Tensor) -> None:
    with pytest.raises(RequestError, match=r"give float \[3, 16, 16\] in \[0,1\]"):
        minexp.read_circuit(classifier, x)


def test_scores_that_are_not_finite() -> None:
    broken = small(8)
    with torch.no_grad():
        broken.model.fc.bias[0] = torch.nan
    with pytest.raises(MinexpError, match="NaN or infinite scores"):
        minexp.read_circuit(broken, images(1)[0])


def test_settings_are_checked_when_changed() -> None:
    assert (
        replace(Settings(), mode="paper").by == "energy" and Settings(rank_by="integrated").by == "integrated"
    )
    with pytest.raises(RequestError, match="unknown mode"):
        replace(Settings(), mode="x")  # type: ignore[arg-type]
