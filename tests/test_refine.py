"""Refinement: the known pixel is found, nothing ties an image to its batch, every evaluation is counted."""

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
    state,
)
from tiny_models import (
    one_thread as one_thread,
)
from torch import Tensor

from minexp.backgrounds import Backgrounds
from minexp.classifier import Classifier
from minexp.judge import Judge
from minexp.objective import Objective
from minexp.predicate import Predicate
from minexp.refine import COLD, WARM, Refinement, _adam, refine
from minexp.repair import Masks
from minexp.search import FAR, Search, _numbers

OBJECTIVE = Objective(area=4.0, dual_rate=0.1, soft=0.5)
ROBUST = Predicate(rho=0.8)
SHORT = Refinement(steps=16, lr=0.4, stride=2, check=3, objective=OBJECTIVE)


def judge(classifier: Classifier, predicate: Predicate = ROBUST, mean: float = 0.5) -> Judge:
    return Judge(classifier, predicate, Backgrounds(torch.full((3,), mean), noise_images(4, seed=50)))


def test_the_known_pixel_is_found() -> None:
    bound = judge(red_pixel(), Predicate(rho=0.95), 0.0)
    objective = replace(OBJECTIVE, act=0.0, tv=0.1)
    found = refine(bound, red_images(3), Refinement(steps=80, stride=2, objective=objective))
    assert found.holds.all()
    assert found.masks[:, 0, TARGET[0], TARGET[1]].all()
    assert found.masks.flatten(1).sum(1).max() <= 24  # of 256; a 2×2 cell with its slopes covers up to 16
    rows, cols = found.masks[:, 0].any(0).nonzero().unbind(1)
    assert (rows - TARGET[0]).abs().max() <= 4 and (cols - TARGET[1]).abs().max() <= 4


@pytest.mark.parametrize("start", [False, True])
def test_an_answer_does_not_depend_on_its_batch(start: bool) -> None:
    x, numbers = noise_images(9), torch.arange(9) * 7
    logits = torch.randn(9, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) if start else None

    def run(bound: Judge, part: slice) -> Masks:
        begin = None if logits is None else logits[part]
        return refine(bound, x[part], SHORT, start=begin, numbers=numbers[part])

    whole = run(judge(filters()), slice(None))
    assert len({tuple(m.flatten().tolist()) for m in whole.masks}) > 4
    for size in (1, 3, 7):
        bound = judge(filters())
        parts = [run(bound, slice(i, i + size)) for i in range(0, 9, size)]
        for name in ("masks", "holds", "evaluations"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name


def test_evaluations_are_what_went_through_the_model() -> None:
    classifier, x = filters(), noise_images(6)
    with counted(classifier) as count:
        found = refine(judge(classifier), x, SHORT)
    assert int(found.evaluations.sum()) == count.images


def test_whatever_is_found_holds() -> None:
    classifier, x = filters(), noise_images(12)
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier)
    found = refine(bound, x, SHORT)
    assert found.holds.all() and bound.holds(x, label, found.masks).ok.all()
    assert (found.masks.flatten(1).sum(1) < SIDE * SIDE).any()


def test_more_steps_give_smaller_masks_than_none_to_speak_of() -> None:
    classifier, x = filters(), noise_images(8)
    areas = [
        refine(judge(classifier), x, replace(SHORT, steps=steps)).masks.float().mean().item()
        for steps in (1, 40)
    ]
    assert areas[1] < areas[0]


def masks_of(sizes: list[int], holds: list[bool]) -> Masks:
    masks = torch.zeros(len(sizes), 1, 4, 4, dtype=torch.bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask.view(-1)[:size] = True
    n = torch.ones(len(sizes), dtype=torch.long)
    levels = torch.tensor([float(s) for s in sizes])
    return Masks(masks, torch.tensor(holds), levels, n, levels[:, None], n)


def test_the_smaller_mask_that_holds_is_kept() -> None:
    first = masks_of([5, 5, 5, 5, 5], [True, True, False, False, True])
    second = masks_of([3, 3, 9, 3, 9], [True, False, True, False, True])
    best = first.smaller(second)
    assert best.masks.flatten(1).sum(1).tolist() == [3, 5, 9, 5, 5]
    assert best.holds.tolist() == [True, True, True, False, True]
    assert best.threshold.tolist() == [3, 5, 9, 5, 5]
    assert best.evaluations.tolist() == [2] * 5


def test_margins_stay_with_their_masks() -> None:
    first, second = (
        replace(masks_of([a, b], [True, True]), margins=torch.full((2, 3), float(a)))
        for a, b in ((5, 3), (4, 6))
    )
    assert first.smaller(second).margins.tolist() == [[4.0] * 3, [5.0] * 3]
    assert first.put(torch.tensor([1]), second.of(torch.tensor([0]))).margins.tolist() == [
        [5.0] * 3,
        [4.0] * 3,
    ]
    assert first.first(1).margins.shape == (1, 3)
    other = replace(second, margins=torch.zeros(2, 4))  # of another predicate
    assert first.smaller(other).margins is None and first.put(torch.arange(2), other).margins is None


def test_a_descent_from_a_wrong_place_is_made_again_from_keep_all() -> None:
    classifier, x = filters(), noise_images(8)
    bound, logits = judge(classifier), classifier.logits(noise_images(8))

    class Misplaced:
        """Half of the images' masks are all pixels, half are a corner that decides nothing."""

        def probabilities(self, x: Tensor) -> Tensor:
            p = torch.full_like(x[:, :1], 0.99)
            p[4:] = 0.01
            p[4:, :, -3:, :3] = 0.99
            return p

    settings = replace(SHORT, steps=None, check=0)
    search = Search(bound, x, logits, Misplaced(), "refined", settings)  # type: ignore[arg-type]
    with counted(classifier) as count:
        found = search.find()
    assert found.holds.all() and int(found.evaluations.sum()) == count.images
    start = torch.logit(Misplaced().probabilities(x), eps=1e-3)
    warm = refine(bound, x, settings, start=start, numbers=_numbers(x))
    cold = refine(bound, x, settings, numbers=_numbers(x))
    assert torch.equal(found.masks[:4], warm.masks[:4])
    assert (found.evaluations - warm.evaluations).tolist() == [0] * 4 + cold.evaluations[4:].tolist()
    areas = [m.masks[4:].flatten(1).sum(1) for m in (found, warm, cold)]
    assert (areas[1] > FAR * 9).all() and torch.equal(areas[0], torch.minimum(*areas[1:]))


def test_adam_is_adam() -> None:
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(4, 1, 3, 3, generator=rng)
    theirs = value.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([theirs], lr=0.3, betas=(0.9, 0.99), eps=1e-8)
    mine, moments = value.clone(), [torch.zeros_like(value), torch.zeros_like(value)]
    for step in range(12):
        gradient = torch.randn(value.shape, generator=rng)
        theirs.grad = gradient.clone()
        optimiser.step()
        _adam(mine, gradient, moments, step, 0.3)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_a_start_from_logits_is_where_it_starts() -> None:
    """With no step to speak of, the mask is the start's."""
    start = torch.full((2, 1, SIDE, SIDE), -4.0)
    start[:, :, 2:10, 6:14] = 4.0
    bound = judge(red_pixel(), Predicate("top1"), 0.0)
    found = refine(bound, red_images(2), replace(SHORT, steps=1, lr=0.0), start=start)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[1:11, 5:15] = True  # interpolation may round the corners of the square
    assert found.holds.all() and not (found.masks[:, 0] & ~inside).any()


def test_a_descent_from_a_maskers_output_is_shorter() -> None:
    bound, x = judge(red_pixel(), Predicate("top1"), 0.0), red_images(2)
    settings = replace(SHORT, steps=None, check=0)
    cold = refine(bound, x, settings)
    warm = refine(bound, x, settings, start=torch.full((2, 1, SIDE, SIDE), 4.0))
    saved = (cold.evaluations - warm.evaluations - 2 * (COLD - WARM)).abs()
    assert (saved < 20).all() and settings.length(None) == COLD > settings.length(x) == WARM
    assert replace(settings, steps=7).length(None) == replace(settings, steps=7).length(x) == 7


@pytest.mark.parametrize("throws", [False, True])
def test_the_model_is_as_it_was_afterwards(throws: bool) -> None:
    classifier = filters()
    model = classifier.model.train().requires_grad_(True)
    model.conv.weight.requires_grad_(False)
    before = state(model)
    if throws:

        def fail(*_: Tensor, **_options: object) -> None:
            raise ValueError("broken on purpose")

        bound = judge(classifier)
        bound.backgrounds.draw = fail  # type: ignore[assignment, method-assign]
        with pytest.raises(ValueError, match="on purpose"):
            refine(bound, noise_images(2), SHORT)
    else:
        refine(judge(classifier), noise_images(2), SHORT)
    assert state(model) == before
