"""Minimisation: brute force finds no cell that could go, batches tie nothing together, every evaluation is counted."""

from dataclasses import replace

import pytest
import torch
from tiny_models import SIDE, TARGET, counted, filters, noise_images, red_images, red_pixel
from tiny_models import one_thread as one_thread
from torch import Tensor
from trained_tiles import tiles

from minexp.backgrounds import POOL, RANDOM, Backgrounds
from minexp.classifier import Classifier
from minexp.explanation import explain
from minexp.judge import Judge
from minexp.minimise import Minimisation, minimise, single_cells
from minexp.predicate import Necessary, Predicate
from minexp.refine import Refinement
from minexp.repair import GUIDED, Masks, threshold_masks

ROBUST = Predicate(rho=0.8, draws=10, early=5)


def judge(classifier: Classifier, predicate: Predicate = ROBUST, mean: float = 0.5) -> Judge:
    return Judge(classifier, predicate, Backgrounds(torch.full((3,), mean), noise_images(4, seed=50)))


def everything(bound: Judge, x: Tensor) -> Masks:
    """Keep-all, which always holds."""
    n, scores = len(x), bound.logits(x)
    whole = torch.ones(n, 1, SIDE, SIDE, dtype=torch.bool)
    zeros = torch.zeros(n, dtype=torch.long)
    return Masks(whole, torch.ones(n, dtype=torch.bool), torch.zeros(n), zeros, scores, zeros)


def label_of(bound: Judge, x: Tensor) -> Tensor:
    return bound.logits(x).argmax(1)


@pytest.mark.parametrize("cell", [1, 3, 4])
@pytest.mark.parametrize(
    "predicate", [Predicate("top1"), ROBUST, replace(ROBUST, repeats=2, dilated=True)], ids=str
)
def test_no_single_cell_can_go(predicate: Predicate, cell: int) -> None:
    """Cell by cell, draw by draw: a brute-force check that shares nothing with the search but the predicate."""
    classifier, x = filters(), noise_images(8)
    bound = judge(classifier, predicate)
    label = label_of(bound, x)
    found = minimise(bound, x, label, everything(bound, x), Minimisation(cell=cell))
    assert found.minimal_at.tolist() == [cell] * 8
    assert bound.holds(x, label, found.masks).ok.all()
    assert torch.allclose(found.scores, bound.logits(torch.where(found.masks, x, 0.5)), atol=1e-5)
    smaller = 0
    for b in range(8):
        mask = found.masks[b, 0]
        assert not mask.all()
        for top in range(0, SIDE, cell):
            for left in range(0, SIDE, cell):
                lacking = mask.clone()
                lacking[top : top + cell, left : left + cell] = False
                if torch.equal(lacking, mask):
                    continue
                smaller += 1
                one = lacking[None, None]
                assert not bound.holds(x[b : b + 1], label[b : b + 1], one).ok.item(), (b, top, left)
    assert sum(len(masks) for masks in single_cells(found.masks, cell)) == smaller


def test_the_known_pixel_is_all_that_is_left() -> None:
    bound = judge(red_pixel(), Predicate(), 0.0)
    x = red_images(3)
    found = minimise(bound, x, torch.ones(3, dtype=torch.long), everything(bound, x), Minimisation(cell=1))
    assert found.masks.flatten(1).sum(1).tolist() == [1, 1, 1]
    assert found.masks[:, 0, TARGET[0], TARGET[1]].all() and found.minimal_at.tolist() == [1, 1, 1]


def test_an_answer_does_not_depend_on_its_batch() -> None:
    classifier, x = filters(), noise_images(9)
    bound = judge(classifier)
    label = label_of(bound, x)
    whole = minimise(bound, x, label, everything(bound, x), Minimisation(cell=2))
    assert len({tuple(m.flatten().tolist()) for m in whole.masks}) == 9
    for size in (1, 4):
        for first in range(0, 9, size):
            part = slice(first, first + size)
            found = minimise(bound, x[part], label[part], everything(bound, x[part]), Minimisation(cell=2))
            for name in ("masks", "evaluations", "minimal_at"):
                assert torch.equal(getattr(found, name), getattr(whole, name)[part]), name


@pytest.mark.parametrize("ahead", [1, 6])
def test_evaluations_are_what_went_through_the_model(ahead: int) -> None:
    classifier, x = filters(), noise_images(6)
    bound = judge(classifier)
    start, label = everything(bound, x), label_of(bound, x)
    with counted(classifier) as count:
        found = minimise(bound, x, label, start, Minimisation(cell=2, levels=2, ahead=ahead))
    assert int(found.evaluations.sum()) == count.images


def test_trying_ahead_changes_no_answer() -> None:
    classifier, x = filters(), noise_images(6)
    bound = judge(classifier)
    label, start = label_of(bound, x), everything(bound, x)
    one, many = (minimise(bound, x, label, start, Minimisation(cell=2, ahead=n)) for n in (1, 8))
    assert torch.equal(one.masks, many.masks) and torch.equal(one.minimal_at, many.minimal_at)
    chosen = Minimisation().lookahead(torch.device("cpu")), Minimisation().lookahead(torch.device("cuda"))
    assert chosen == (1, 4) and Minimisation(ahead=2).lookahead(torch.device("cpu")) == 2


def test_a_budget_is_kept_and_what_it_left_is_finished_later() -> None:
    classifier, x = filters(), noise_images(6)
    bound = judge(classifier)
    label, start = label_of(bound, x), everything(bound, x)
    most = 1 + bound.predicate.draws  # of one candidate, the last to be begun
    short = minimise(bound, x, label, start, Minimisation(cell=2, max_evals=60, ahead=1))
    assert (short.evaluations <= 60 + most).all() and (short.minimal_at == 0).any()
    assert bound.holds(x, label, short.masks).ok.all()
    rest = minimise(bound, x, label, short, Minimisation(cell=2))
    assert (rest.minimal_at == 2).all() and (rest.masks <= short.masks).all()
    assert (rest.evaluations > short.evaluations).all()


def test_what_does_not_hold_is_left_alone() -> None:
    classifier, x = filters(), noise_images(4)
    bound = judge(classifier)
    start = everything(bound, x)
    start = replace(start, holds=torch.tensor([True, False, True, False]))
    found = minimise(bound, x, label_of(bound, x), start, Minimisation(cell=4))
    assert found.masks.flatten(1).all(1).tolist() == [False, True, False, True]
    assert found.minimal_at.tolist() == [4, 0, 4, 0]
    assert found.evaluations[[1, 3]].tolist() == [0, 0]


def test_a_necessary_set_loses_no_cell_either() -> None:
    classifier, x = filters(), noise_images(12)
    backgrounds = Backgrounds(torch.full((3,), 0.9), noise_images(4, seed=50))
    bound = Judge(classifier, Predicate("top1"), backgrounds, question=Necessary())
    label = label_of(bound, x)
    start = everything(bound, x)
    start = replace(start, holds=bound.holds(x, label, start.masks).ok)
    found = minimise(bound, x, label, start, Minimisation(cell=2))
    assert start.holds.any()
    for b in start.holds.nonzero().flatten().tolist():
        shown = torch.where(found.masks[b], torch.tensor(0.9), x[b])[None]
        assert classifier.logits(shown).argmax() != label[b]
        for lacking in single_cells(found.masks[b : b + 1], 2)[0]:
            assert classifier.logits(torch.where(lacking, torch.tensor(0.9), x[b])[None]).argmax() == label[b]


def plainly_holds(
    classifier: Classifier,
    predicate: Predicate,
    backgrounds: Backgrounds,
    x: Tensor,
    label: Tensor,
    masks: Tensor,
) -> list[bool]:
    """The predicate for masks [n,H,W] of one image [1,C,H,W]: every draw a forward pass, then its rules as written."""
    total = predicate.repeats * predicate.draws
    pool = max(POOL, -(-total // len(RANDOM)))
    shown = [backgrounds.default(x)]
    for number in range(total):
        pick = torch.tensor([[number // len(RANDOM)]])
        family = RANDOM[number % len(RANDOM)]
        shown.append(backgrounds.draw(family, x, pick, purpose="predicate", pool=pool)[:, 0])
    kept = torch.stack(
        [classifier.logits(torch.where(masks[:, None], x, one)).argmax(1) == label for one in shown], 1
    )
    verdicts = []
    for plain, *draws in kept.tolist():
        sets = [draws[first : first + predicate.draws] for first in range(0, total, predicate.draws)]
        late = [not predicate.clean and sum(s) >= 0.95 * len(s) for s in sets]
        early = [all(s[: predicate.early]) for s in sets]
        verdicts.append(plain and all(map(any, zip(early, late, strict=True))))
    return verdicts


def test_the_minimal_masks_of_a_trained_classifier_lose_no_cell_either() -> None:
    """Fifty images, every cell of every mask."""
    subject, x, cell = tiles().classifier, tiles().x[:50], 4
    backgrounds = Backgrounds(torch.full((3,), 0.5), tiles().x[50:66])
    found = explain(
        subject,
        x,
        effort="minimal",
        backgrounds=backgrounds,
        refinement=Refinement(steps=15),
        minimisation=Minimisation(cell=cell),
        fresh=1,
    )
    predicates = {str(p): p for p in (Predicate(clean=True).stricter(n) for n in (3, 5, 9))}
    label, tried = subject.logits(x).argmax(1), 0
    for b, certificate in enumerate(found.certificates):
        assert certificate.minimal_at == cell
        predicate, mask = predicates[certificate.predicate], found.masks[b]
        lacking = []
        for top in range(0, mask.shape[0], cell):
            for left in range(0, mask.shape[1], cell):
                less = mask.clone()
                less[top : top + cell, left : left + cell] = False
                if not torch.equal(less, mask):
                    lacking.append(less)
        whole, *less_each = plainly_holds(
            subject, predicate, backgrounds, x[b : b + 1], label[b], torch.stack([mask, *lacking])
        )
        assert whole and not any(less_each), b
        tried += len(lacking)
    assert tried > 100


def test_what_a_search_knows_of_its_masks_is_not_asked_again() -> None:
    """A repaired mask brings by how much it passed; from one that does not, the same is found for more."""
    classifier, x = filters(), noise_images(8)
    bound = judge(classifier).cleaner()
    label = label_of(bound, x)
    order = torch.rand(x[:, :1].shape, generator=torch.Generator().manual_seed(0))
    start = threshold_masks(bound, x, label, order, settings=GUIDED)
    asked = ~start.masks.flatten(1).all(1)  # all pixels hold without being asked
    assert asked.sum() > 4
    assert start.margins is not None and start.margins.shape == (8, bound.checks)
    fewer = minimise(bound, x, label, start, Minimisation(cell=4))
    more = minimise(bound, x, label, replace(start, margins=None), Minimisation(cell=4))
    assert torch.equal(fewer.masks[asked], more.masks[asked]) and fewer.margins is None
    assert ((more.evaluations - fewer.evaluations)[asked] == bound.early().sum()).all()
    other = bound.stricter(2)  # of another predicate they say nothing
    assert other.holds(x, label, minimise(other, x, label, everything(other, x)).masks).ok.all()
    assert minimise(other, x, label, replace(everything(other, x), margins=start.margins)).minimal_at.all()


def test_few_cells_of_several_sizes_are_tried_without_weighing_them() -> None:
    """A gradient costs as much as trying a cell or two; it tells cells apart that hold alike many pixels."""
    classifier, x = filters(), noise_images(3)
    bound = judge(classifier, Predicate("top1"))
    label, start = label_of(bound, x), everything(bound, x)
    weighed = []

    class Counting(Judge):
        def slope(self, x: Tensor, *others: Tensor) -> Tensor:
            weighed.append(len(x))
            return super().slope(x, *others)

    counting = Counting(classifier, bound.predicate, bound.backgrounds)
    uneven = start.masks.clone()
    uneven[0, :, : SIDE // 4, : SIDE // 4] = False
    uneven[1, :, SIDE // 2 :] = uneven[1, :, :, SIDE // 2 :] = False  # one cell
    minimise(counting, x, label, replace(start, masks=uneven), Minimisation(cell=SIDE // 2))
    assert weighed == [1, 1]  # the last image, on two backgrounds
    minimise(counting, x, label, start, Minimisation(cell=SIDE // 8))
    assert weighed[2:] == [3, 3]
