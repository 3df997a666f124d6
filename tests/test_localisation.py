"""On mosaics whose deciding tile is known: trained masks find it, and the schedule from soft to hard is why."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import one_thread as one_thread
from trained_tiles import masker, share_inside, tiles

from minexp.backgrounds import Backgrounds
from minexp.judge import Judge
from minexp.objective import Objective, make_target
from minexp.predicate import Predicate
from minexp.refine import Refinement, descend, refine


def test_the_classifier_is_worth_explaining() -> None:
    subject = tiles()
    right = subject.classifier.logits(subject.x).argmax(1) == subject.labels
    assert right.float().mean() > 0.95


def test_a_fitted_masker_finds_the_deciding_tile() -> None:
    subject = tiles()
    masks = (masker().probabilities(subject.x) > 0.5)[:, 0].numpy()
    inside = share_inside(masks, subject.truth)[subject.decided]
    assert (inside > 0.5).mean() >= 0.9  # chance: 0.11
    assert masks.mean() < 0.2
    assert masks[~subject.decided].mean() < masks[subject.decided].mean()  # "none" has no tile to show


def most_inside(soft: float, *, dual: bool = False) -> float:
    """Share of masks as they leave the descent that lie mostly in the deciding tile. dual: no fixed area weight."""
    subject = tiles()
    chosen = np.nonzero(subject.decided)[0][:32]
    objective = Objective(
        act=0,
        ce=1.0,
        kl=0,
        area=1.0 if dual else 35.0,
        crisp=0.2,
        tv=0.1,
        rob=2.0,
        match="off",
        dual=dual,
        soft=soft,
    )
    reference = torch.from_numpy(subject.images[:32]).permute(0, 3, 1, 2).float() / 255
    judge = Judge(subject.classifier, Predicate("top1"), Backgrounds(torch.full((3,), 0.5), reference))
    settings = Refinement(steps=120, lr=0.25, stride=2, objective=objective)
    x = subject.x[chosen]
    with subject.classifier.frozen():
        target = make_target(subject.classifier, x, objective, reused=True)
        *_, p = descend(judge, x, target, settings, None, torch.arange(len(chosen)))
    return float((share_inside((p[:, 0] > 0.5).numpy(), subject.truth[chosen]) > 0.5).mean())


def test_soft_first_finds_the_tile_where_hard_from_the_start_does_not() -> None:
    soft_first, hard = most_inside(0.6), most_inside(0.0)
    assert soft_first >= 0.75
    assert hard <= 0.55  # masks vanish at once, no gradient brings them back
    assert soft_first - hard >= 0.3


def test_a_dual_area_weight_is_what_saves_thresholding_from_the_start() -> None:
    """The control's other half: it is the fixed weight that lets masks vanish, not the threshold alone."""
    assert most_inside(0.0, dual=True) >= 0.9


@pytest.mark.parametrize("kind", ["top1", "robust"])
def test_default_refinement_finds_the_tile(kind: str) -> None:
    subject = tiles()
    chosen = np.nonzero(subject.decided)[0][:16]
    judge = Judge(subject.classifier, Predicate(kind), Backgrounds(torch.full((3,), 0.5)))
    settings = Refinement(stride=2, steps=60)
    found = refine(judge, subject.x[chosen], replace(settings), numbers=torch.arange(16))
    inside = share_inside(found.masks[:, 0].numpy(), subject.truth[chosen])
    assert (inside > 0.5).mean() >= 0.7 and found.holds.all()
