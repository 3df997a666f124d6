"""`minexp bench circuit`: its peer is left out where it is not there, and fairly used where it is."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_circuit_ablation import images
from tiny_models import one_thread as one_thread

from minexp.circuit.comparison import IMAGE
from minexp.classifier import Classifier
from minexp.data import subjects

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import circuit

    return circuit


@pytest.fixture
def subject(bench: ModuleType) -> Any:
    torch.manual_seed(0)
    net = subjects.SceneNet(10, widths=(4, 4, 6, 8)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr, operator]
    size = 32
    return bench.Subject("small", Classifier(net, size=size), images(3, 1, size), images(8, 2, size))


def test_the_peer_is_left_out_where_it_is_not_installed_or_fails(
    bench: ModuleType, subject: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.relevances, "installed", lambda: False)
    assert bench._peer(subject, "logit") == {}
    assert capsys.readouterr().err == "zennit-crp left out: pip install zennit-crp\n"
    monkeypatch.setattr(bench.relevances, "installed", lambda: True)
    monkeypatch.setitem(sys.modules, "crp.attribution", None)
    assert bench._peer(subject, "logit") == {}
    assert "zennit-crp failed: ModuleNotFoundError" in capsys.readouterr().err


def test_the_peers_scores_are_its_relevances(bench: ModuleType, subject: Any) -> None:
    if not bench.relevances.installed():
        pytest.skip("zennit-crp is not installed")
    reader = subject.reader(metric="logit")
    ablation = reader.ablation(*reader.prepare(subject.x, target=3))
    model = subject.classifier.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forward = model(ablation.x)
    ranking = bench.relevances.rank_by_relevance(subject.classifier, ablation)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(ablation.x), forward) and all(p.requires_grad for p in model.parameters())
    layers = ablation.net.by_site(ranking.scores)
    assert all(torch.allclose(part.abs().sum(1), torch.ones(3), atol=1e-4) for part in layers.values())
    last, part = list(layers.items())[-1]
    h = last.split(ablation.values[last.place]).mean(2)[:3]
    known = h * model.fc.weight[ablation.label]  # of the epsilon rule at a linear layer
    assert torch.allclose(part, known / known.abs().sum(1, keepdim=True), atol=1e-3)
    line = bench._peer(subject, "logit")["zennit-crp, layers"]
    assert line.tested_on == IMAGE and line.curve[-1].mean == pytest.approx(1.0, abs=1e-3)


def test_what_circuits_do_to_other_figures_and_images(
    bench: ModuleType, subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import circuit_limits as limits

    monkeypatch.setattr(limits, "MEMBERS", 2)
    monkeypatch.setattr(limits, "CONTROLS", 2)
    rows = list(limits.limit_rows(subject))
    drops = {(r["metric"], r["circuit"], r["figure"]): r["value"] for r in rows if r["experiment"] == "drops"}
    figures = 7  # four of each test, "elsewhere" not among them, all nodes' fall, and two ratios
    assert len(drops) == 2 * 2 * len(limits.SIZES) * figures
    for (metric, circuit, figure), value in drops.items():
        if figure == "inside drop / random drop":
            inside, random = (drops[metric, circuit, f"{name} drop"] for name in ("inside", "random"))
            assert value == pytest.approx(inside / random)
    assert {r["tested on"] for r in rows if r["experiment"] == "classes"} == {"itself", "held out"}
    (ceiling,) = (r for r in rows if r["experiment"] == "ceiling")
    reader = subject.reader(metric="logit")
    ablation = reader.ablation(*reader.prepare(subject.x))
    features, count = ablation.net.ablated[-1], round(0.1 * ablation.net.nodes)
    value = features.split(ablation.values[features.place])
    base = features.split(reader.baseline.values[features.place])
    share = (value - base).mean(2) * subject.classifier.model.fc.weight.detach()[ablation.label]
    best = share.sort(dim=1, descending=True).values[:, :count].sum(1) - share.sum(1)
    expected = 1 + best / (ablation.full - ablation.empty)
    assert ceiling["value"] == pytest.approx(float(expected.mean()), abs=1e-4)
