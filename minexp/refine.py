"""Per-image optimisation of the mask, many images at once, from a masker's output or from keep-all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import FAMILIES, FROM_IMAGE, TRAINING
from .judge import Judge
from .masker import KEEP_ALL, straight_through
from .objective import PRESETS, Objective, Target, evaluate_terms, make_target
from .repair import Masks, threshold_masks

_OBJECTIVE = replace(PRESETS["default"], soft=0.5)


@dataclass(frozen=True)
class Refinement:
    """How to optimise: ``steps`` of Adam at rate ``lr`` on logits of one cell per ``stride`` pixels.

    Hard masks are tried against the predicate every ``check`` steps.
    """

    steps: int = 120
    lr: float = 0.25
    stride: int = 4
    check: int = 15
    objective: Objective = _OBJECTIVE


def refine(
    judge: Judge,
    x: Tensor,
    settings: Refinement = Refinement(),
    *,
    start: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Masks:
    """Smallest hard mask found for each image of x [B,C,H,W] that satisfies the judge's predicate.

    start: logits [B,1,H,W] to begin from (a masker's), else keep-all. numbers [B]: what the random
    backgrounds of an image are drawn by, so that the answer does not depend on the batch.
    An image's area weight is its own dual variable. A gradient step counts as two evaluations.
    """
    b = len(x)
    numbers = torch.zeros(b, dtype=torch.long) if numbers is None else numbers.cpu()
    if b == 1:  # kernels for one image round differently, and a descent enlarges that: it goes beside a copy
        twice = [None if t is None else torch.cat([t, t]) for t in (x, start, numbers)]
        assert twice[0] is not None
        pair = refine(judge, twice[0], settings, start=twice[1], numbers=twice[2])
        return Masks(*(getattr(pair, field.name)[:1] for field in fields(Masks)))
    best: Masks | None = None
    with judge.classifier.frozen():
        target = make_target(judge.classifier, x, settings.objective, reused=True)
        for step, p in enumerate(descend(judge, x, target, settings, start, numbers)):
            hard = step >= settings.objective.soft * settings.steps
            if hard and (step + 1) % settings.check == 0 and step + 1 < settings.steps:
                best = _keep_smaller(best, _tried(judge, x, target.decision, p))
        best = _keep_smaller(best, threshold_masks(judge, x, target.decision, p, tighten=True))
    # a gradient step is two images forward and as much again backward; the target is one more forward
    return replace(best, evaluations=best.evaluations + 2 * 2 * settings.steps + 1)


def descend(
    judge: Judge,
    x: Tensor,
    target: Target,
    settings: Refinement,
    start: Tensor | None,
    numbers: Tensor,
) -> Iterator[Tensor]:
    """The mask's probabilities [B,1,H,W] after each step but the last, and at the end."""
    classifier, objective = judge.classifier, settings.objective
    b, _, h, w = x.shape
    grid = (max(2, -(-h // settings.stride)), max(2, -(-w // settings.stride)))
    if start is None:
        coarse = torch.full((b, 1, *grid), KEEP_ALL, device=x.device)
    else:
        coarse = F.interpolate(start.clamp(-4, 4), size=grid, mode="area")
    coarse = coarse.clone().requires_grad_(True)
    moments = [torch.zeros_like(coarse), torch.zeros_like(coarse)]
    weight = torch.full((b,), objective.area, device=x.device)
    low, high = objective.dual_range
    background = judge.backgrounds.default(x)
    for step in range(settings.steps):
        hard = step >= objective.soft * settings.steps
        p = torch.sigmoid(F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False))
        mask = straight_through(p) if hard else p
        random = _random_backgrounds(judge, x, numbers, step)
        terms = evaluate_terms(objective, classifier, x, p, mask, target, background, random)
        # a sum over images: each one's gradient is its own, whatever shares the batch
        loss = terms.total(objective, weight) * b
        (gradient,) = torch.autograd.grad(loss, coarse)
        _adam(coarse, gradient, moments, step, settings.lr)
        held = (terms.kept & terms.robust).to(weight.dtype)
        if objective.dual:
            rate = 2 * objective.dual_rate
            weight = (weight * (1 + rate * (2 * held - 1) * torch.where(held > 0, 0.5, 1.0))).clamp(low, high)
        if step + 1 < settings.steps:
            yield p.detach()
    yield torch.sigmoid(F.interpolate(coarse.detach(), size=(h, w), mode="bilinear", align_corners=False))


def _random_backgrounds(judge: Judge, x: Tensor, numbers: Tensor, step: int) -> Tensor:
    """One training-family background an image, the families in turn."""
    out = torch.empty_like(x)
    families = (numbers + step) % len(TRAINING)
    for index, family in enumerate(TRAINING):
        assert family in FAMILIES and family not in FROM_IMAGE
        slots = (families == index).nonzero().flatten()
        if len(slots):
            picks = (numbers[slots] * 5 + step // len(TRAINING))[:, None]
            where = slots.to(x.device)
            out[where] = judge.backgrounds.draw(family, x[where], picks, purpose="refine", pool=32)[:, 0]
    return out


def _adam(value: Tensor, gradient: Tensor, moments: list[Tensor], step: int, lr: float) -> None:
    """Adam (Kingma and Ba, arXiv 1412.6980) element by element: no norm ties the images of a batch together."""
    first, second = moments
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
    unbiased = first / (1 - 0.9 ** (step + 1))
    scale = (second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
    with torch.no_grad():
        value -= lr * unbiased / scale


def _tried(judge: Judge, x: Tensor, decision: Tensor, p: Tensor) -> Masks:
    mask = p > 0.5
    verdict = judge.holds(x, decision, mask)
    level = torch.full((len(x),), 0.5, device=x.device)
    return Masks(mask, verdict.ok, level, verdict.spent, verdict.scores, torch.zeros_like(verdict.spent))


def _keep_smaller(best: Masks | None, tried: Masks) -> Masks:
    """Image by image the smaller of the masks that hold; evaluations add up."""
    if best is None:
        return tried
    area = tried.masks.flatten(1).sum(1) < best.masks.flatten(1).sum(1)
    better = tried.holds & (area | ~best.holds)
    return Masks(
        torch.where(better[:, None, None, None], tried.masks, best.masks),
        best.holds | tried.holds,
        torch.where(better, tried.threshold, best.threshold),
        best.evaluations + tried.evaluations,
        torch.where(better[:, None], tried.scores, best.scores),
        torch.where(better, tried.minimal_at, best.minimal_at),
    )
