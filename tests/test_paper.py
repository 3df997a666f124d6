"""The published recipe: its network's size, its weights, and masks that are certified as they come."""

import pytest
import torch
from tiny_models import SIDE, filters, noise_images
from tiny_models import one_thread as one_thread

from minexp import paper
from minexp.backgrounds import Backgrounds
from minexp.errors import RequestError
from minexp.explanation import explain
from minexp.judge import Judge
from minexp.objective import PRESETS
from minexp.predicate import Predicate


def test_the_network_is_the_published_one() -> None:
    model = paper.UNet()
    count = sum(p.numel() for p in model.parameters())
    assert 7.7e6 < count < 7.8e6
    assert model(torch.rand(2, 3, 72, 40)).shape == (2, 1, 72, 40)  # 16 divides neither


def test_layer_weights_are_the_deepest_taps() -> None:
    assert paper.objective_for(5).layer_weights == (1, 2, 2, 4, 8)
    assert paper.objective_for(2).layer_weights == (4, 8)
    assert paper.objective_for(7).layer_weights == (1, 1, 1, 2, 2, 4, 8)
    published = PRESETS["paper"]
    assert (published.act, published.ce, published.kl, published.area) == (10, 15, 5, 100)
    assert (published.crisp, published.tv, published.rob) == (1, 500, 100)
    assert published.soft == 0 and not published.dual


def test_masks_are_the_last_steps_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper.UNet.__init__, "__defaults__", (3, (4, 8)))
    classifier, x = filters(), noise_images(3)
    judge = Judge(classifier, Predicate("top1"), Backgrounds(torch.full((3,), 0.5), noise_images(4, seed=9)))
    found = paper.optimise(judge, x, steps=4, lr=1e-2)
    assert (
        found.evaluations.tolist() == [1 + 4 * 2 * 2 + 1] * 3
    )  # f(x), two images a step and back, the verdict
    label = judge.logits(x).argmax(1)
    assert torch.equal(found.holds, judge.holds(x, label, found.masks).ok)
    alone = paper.optimise(judge, x[1:2], steps=4, lr=1e-2)
    assert torch.equal(alone.masks, found.masks[1:2])
    longer = paper.optimise(judge, x, steps=40, lr=1e-2)
    assert not torch.equal(longer.masks, found.masks)


def test_the_preset_wants_no_masker_and_no_effort() -> None:
    with pytest.raises(RequestError, match="preset paper"):
        explain(filters(), noise_images(1), effort="minimal", preset="paper")
    with pytest.raises(RequestError, match="unknown preset"):
        explain(filters(), noise_images(1), preset="pape")


def test_it_is_reached_from_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = paper.optimise

    def short(judge: Judge, x: torch.Tensor, **options: object) -> object:
        seen.append(options["objective"])
        return real(judge, x, steps=2, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(paper, "optimise", short)
    monkeypatch.setattr(paper.UNet.__init__, "__defaults__", (3, (4, 8)))
    answer = explain(filters(), noise_images(2), preset="paper", match="cosine", background=(0.5, 0.5, 0.5))
    assert answer.masks.shape == (2, SIDE, SIDE) and seen[0].match == "cosine"  # type: ignore[attr-defined]
