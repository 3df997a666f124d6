"""Repair: the smallest level set that holds, found by bisection, and every evaluation counted."""

from dataclasses import replace

import pytest
import torch
from tiny_models import (
    SIDE,
    TARGET,
    counted,
    filters,
    noise_images,
    red_images,
    red_pixel,
)
from tiny_models import (
    one_thread as one_thread,
)
from torch import Tensor

from minexp.backgrounds import Backgrounds
from minexp.classifier import Classifier
from minexp.judge import Judge
from minexp.predicate import Predicate
from minexp.repair import GUIDED, SPARING, local_order, threshold_masks

PIXELS = SIDE * SIDE


def judge(classifier: Classifier, predicate: Predicate, mean: float = 0.0) -> Judge:
    return Judge(classifier, predicate, Backgrounds(torch.full((3,), mean), noise_images(4, seed=50)))


def ranked(rank: int, top: float = 0.45, seed: int = 0) -> Tensor:
    """Probabilities [1,1,H,W], all different, from ``top`` down to 0, the decisive pixel the rank-th largest."""
    values = torch.linspace(top, 0, PIXELS)
    order = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(seed))
    decisive = TARGET[0] * SIDE + TARGET[1]
    place = int((order == decisive).nonzero())
    order[place], order[rank - 1] = order[rank - 1].clone(), order[place].clone()
    p = torch.empty(PIXELS)
    p[order] = values
    return p.view(1, 1, SIDE, SIDE)


def levels(p: Tensor) -> list[Tensor]:
    """All level sets of p [1,1,H,W], smallest first."""
    return [p >= value for value in p.unique(sorted=True).flip(0)]


@pytest.mark.parametrize("kind", ["top1", "score", "robust"])
def test_repair_ends_near_the_smallest_level_set_that_holds(kind: str) -> None:
    ranks = [1, 2, 3, 5, 9, 17, 40, 100, 200, 255, 256]
    x, label = red_images(len(ranks)), torch.ones(len(ranks), dtype=torch.long)
    p = torch.cat([ranked(rank, seed=rank) for rank in ranks])
    found = threshold_masks(judge(red_pixel(), Predicate(kind, tau=0.9)), x, label, p)
    assert found.holds.all()
    for rank, mask, threshold, values in zip(ranks, found.masks, found.threshold, p, strict=True):
        size = int(mask.sum())
        # 6 bisections of 8 octaves leave an eighth of an octave, and sizes are whole
        assert rank <= size <= max(rank + 1, rank * 2 ** (8 / 64) + 1), (rank, size)
        assert mask[0, TARGET[0], TARGET[1]]
        assert torch.equal(mask, values >= threshold)


def test_repair_finds_exactly_the_smallest_level_set_when_there_are_few() -> None:
    """Nested squares about the decisive pixel: twelve level sets, of which the first three miss it."""
    rows = (torch.arange(SIDE) - 3).abs()
    distance = torch.maximum(rows[:, None], rows[None, :])  # from (3, 3); the decisive pixel is 6 away
    p = 0.49 * (1 - distance / 20.0)[None, None]
    bound, x = judge(red_pixel(), Predicate("top1")), red_images(1)
    smallest = next(m for m in levels(p) if m[0, 0, TARGET[0], TARGET[1]])
    found = threshold_masks(bound, x, torch.tensor([1]), p)
    assert torch.equal(found.masks, smallest) and found.holds.all()
    assert found.threshold.item() == p[0, 0, TARGET[0], TARGET[1]].item()


def test_a_mask_that_holds_is_returned_as_it_is() -> None:
    p = ranked(40, top=1.0)
    found = threshold_masks(judge(red_pixel(), Predicate("top1")), red_images(1), torch.tensor([1]), p)
    assert torch.equal(found.masks, p > 0.5)
    assert found.threshold.tolist() == [0.5] and found.holds.all() and found.evaluations.tolist() == [1]


@pytest.mark.parametrize("predicate", [Predicate("top1"), Predicate(rho=1.0, draws=20)])
def test_keep_all_always_keeps_the_top_class(predicate: Predicate) -> None:
    classifier, x = filters(), noise_images(16)
    label = classifier.logits(x).argmax(1)
    nothing = torch.zeros(16, 1, SIDE, SIDE)  # one level set: keep-all
    found = threshold_masks(judge(classifier, predicate, 0.5), x, label, nothing)
    assert found.holds.all()
    repaired = found.masks.flatten(1).sum(1)
    assert set(repaired.tolist()) <= {0, PIXELS} and (repaired == PIXELS).sum() > 4
    random = torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.5
    again = threshold_masks(judge(classifier, predicate, 0.5), x, label, random)
    assert again.holds.all()
    assert judge(classifier, predicate, 0.5).holds(x, label, again.masks).ok.all()


def test_a_score_that_even_the_whole_image_misses_is_reported() -> None:
    classifier, x = filters(), noise_images(12)
    logits = classifier.logits(x)
    best = logits.softmax(1).amax(1)
    tau = float(best.median())
    bound = judge(classifier, Predicate("score", tau=tau), 0.5)
    p = torch.rand(12, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.4
    found = threshold_masks(bound, x, logits.argmax(1), p)
    again = bound.holds(x, logits.argmax(1), found.masks).ok
    assert torch.equal(found.holds, again)
    assert found.holds[best >= tau].all() and not found.holds.all()
    failed = ~found.holds
    assert (found.masks[failed].flatten(1).sum(1) == PIXELS).all()


@pytest.mark.parametrize("tighten", [False, True])
@pytest.mark.parametrize(
    "predicate", [Predicate("top1"), Predicate("score", tau=0.6), Predicate(rho=0.8, draws=10)]
)
def test_evaluations_are_what_went_through_the_model(predicate: Predicate, tighten: bool) -> None:
    classifier, x = filters(), noise_images(16)
    label = classifier.logits(x).argmax(1)
    p = torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with counted(classifier) as count:
        found = threshold_masks(judge(classifier, predicate, 0.5), x, label, p, tighten=tighten)
    assert int(found.evaluations.sum()) == count.images
    assert found.evaluations.min() < found.evaluations.max()


def test_tightening_never_gives_up_what_holds() -> None:
    classifier, x = filters(), noise_images(16)
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, Predicate(rho=0.8, draws=10), 0.5)
    rng = torch.Generator().manual_seed(2)
    p = 0.3 + 0.7 * torch.rand(16, 1, SIDE, SIDE, generator=rng)
    loose = threshold_masks(bound, x, label, p)
    tight = threshold_masks(bound, x, label, p, tighten=True)
    areas, tighter = (m.masks.flatten(1).sum(1) for m in (loose, tight))
    assert (tighter <= areas).all() and (tighter < areas).any()
    assert tight.holds.all() and bound.holds(x, label, tight.masks).ok.all()
    for values, mask, threshold in zip(p, tight.masks, tight.threshold, strict=True):
        assert torch.equal(mask, values >= threshold) or threshold == 0.5


def test_the_known_pixel_is_found_by_tightening() -> None:
    p = 0.5 + ranked(4)  # all above the threshold, the decisive pixel fourth
    found = threshold_masks(
        judge(red_pixel(), Predicate("top1")), red_images(1), torch.tensor([1]), p, tighten=True
    )
    # from 256 pixels towards a quarter of them by three bisections, each a geometric mean
    assert found.holds.all() and found.masks[0, 0, TARGET[0], TARGET[1]]
    assert int(found.masks.sum()) <= PIXELS * 0.25 ** (7 / 8) + 1


def test_repair_grows_from_the_mask_outwards() -> None:
    p = torch.full((1, 1, 32, 32), 0.01)
    p[0, 0, 4:10, 4:10] = 0.9  # the mask
    p[0, 0, 28, 28] = 0.02  # a far pixel that is barely more probable than the mask's neighbours
    order = local_order(p)
    assert torch.equal(order > 0.5, p > 0.5) and torch.equal(order[p > 0.5], p[p > 0.5])
    assert order[0, 0, 7, 11] > order[0, 0, 28, 28] < order[0, 0, 11, 7]
    assert order[0, 0, 7, 10] > order[0, 0, 7, 13] > order[0, 0, 7, 20]


def test_guided_growth_goes_where_the_gradient_points() -> None:
    """The decisive pixel lies where the prior puts it last: level sets reach it last."""
    x, label = red_images(6), torch.ones(6, dtype=torch.long)
    p = torch.cat([ranked(PIXELS - rank, seed=rank) for rank in range(6)])
    p = torch.where(p > 0.44, 0.9, p)  # a few pixels of the masker's own
    bound = judge(red_pixel(), Predicate("top1"))
    levels_, guided = (threshold_masks(bound, x, label, p, settings=r) for r in (SPARING, GUIDED))
    for found in (levels_, guided):
        assert found.holds.all() and bound.holds(x, label, found.masks).ok.all()
        assert found.masks[:, 0, TARGET[0], TARGET[1]].all()
    own = (p > 0.5).flatten(1).sum(1)
    assert (guided.masks.flatten(1).sum(1) <= own + 25).all()  # a slope is averaged over 5×5 pixels
    assert levels_.masks.flatten(1).sum(1).min() > 0.9 * PIXELS
    assert (guided.masks & (p > 0.5) == (p > 0.5)).all() and (guided.threshold == 0.5).all()


@pytest.mark.parametrize("predicate", [Predicate("top1"), Predicate(rho=0.8, draws=10, early=5), Predicate()])
def test_guided_repair_counts_its_gradients_and_keeps_the_predicate(predicate: Predicate) -> None:
    classifier, x = filters(), noise_images(16)
    label = classifier.logits(x).argmax(1)
    p = torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 0.55
    bound = judge(classifier, predicate, 0.5)
    with counted(classifier) as count:
        found = threshold_masks(bound, x, label, p, settings=GUIDED)
    assert int(found.evaluations.sum()) == count.images
    assert found.holds.all() and bound.holds(x, label, found.masks).ok.all()
    assert (found.masks.flatten(1).sum(1) < PIXELS).any()


def test_an_early_pass_is_a_pass_of_all_early_draws() -> None:
    """What GUIDED accepts has no miss among the early draws; without `early`, some masks that hold do."""
    classifier, x = filters(), noise_images(40)
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, Predicate(rho=0.8, draws=10, early=5), 0.5)
    early = bound.early().expand(len(x), -1)
    p = torch.rand(40, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 0.9
    clean = []
    for settings in (GUIDED, replace(GUIDED, early=False)):
        found = threshold_masks(bound, x, label, p, settings=settings)
        passed = bound.passes(x, label, found.masks, early, torch.zeros(40, bound.checks))
        clean.append(int(passed.ok.sum()))
    assert clean[0] == 40 > clean[1]


def test_an_empty_mask_does_not_grow_pixel_by_pixel() -> None:
    x, label = red_images(4), torch.ones(4, dtype=torch.long)
    found = threshold_masks(
        judge(red_pixel(), Predicate("top1")), x, label, torch.zeros(4, 1, SIDE, SIDE), settings=GUIDED
    )
    assert found.holds.all() and found.masks[:, 0, TARGET[0], TARGET[1]].all()
    assert found.masks.flatten(1).sum(1).max() <= 25 and found.evaluations.max() <= 1 + 15 * 3
