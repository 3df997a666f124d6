"""Per-image optimisation of the mask, many images at once, from a masker's output or from keep-all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import DEFAULT, FAMILIES, FROM_IMAGE, TRAINING
from .judge import EXACT, GRADIENT, Judge, repeated
from .masker import KEEP_ALL, straight_through
from .objective import PRESETS, Objective, Target, evaluate_on, make_target
from .repair import GUIDED, Masks, threshold_masks

# A descent of few steps begins with the weights that a long one ends with.
_OBJECTIVE = replace(PRESETS["default"], soft=0.5, area=30.0)
_REPAIR = replace(GUIDED, early=False)
CELLS = 32  # of the grid, along the image's shorter side
WARM, COLD = 16, 30  # steps from a masker's output, and from keep-all


@dataclass(frozen=True)
class Refinement:
    """How to optimise: ``steps`` of Adam at rate ``lr`` on logits of one cell per ``stride`` pixels.

    steps: by default WARM from a masker's output, COLD from keep-all.
    stride: by default so many that the shorter side has CELLS cells. A step shows the explanation on one background,
    the training families in turn, and takes of the objective the terms that are about it: for as many evaluations,
    masks end smaller and more robust than when each step shows the default background and a random one.
    The last step's mask is kept, repaired where the predicate fails. check: every so many steps try hard masks against
    the predicate, smaller level sets at the end, too, and keep the smallest that held: such masks are smaller, and hold
    on fewer backgrounds that were not asked. More steps give smaller masks yet, for other classes as well, until they
    prove little (`controls.wrong_class`).
    """

    steps: int | None = None
    lr: float = 0.5
    stride: int | None = None
    check: int = 0
    objective: Objective = _OBJECTIVE

    def length(self, start: Tensor | None) -> int:
        """Steps of a descent that begins with the logits ``start``, or with keep-all."""
        return self.steps or (COLD if start is None else WARM)

    def grid(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns of cells for images [..., H, W]."""
        h, w = shape[-2:]
        stride = max(1, min(h, w) // CELLS) if self.stride is None else self.stride
        return max(2, -(-h // stride)), max(2, -(-w // stride))


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
    if b < EXACT:  # a descent enlarges what kernels for few images round differently
        begin = None if start is None else repeated(start)
        return refine(judge, repeated(x), settings, start=begin, numbers=repeated(numbers)).first(b)
    steps = settings.length(start)
    with judge.classifier.frozen():
        target = make_target(judge.classifier, x, settings.objective, reused=True)
        best: Masks | None = None
        for step, p in enumerate(descend(judge, x, target, settings, start, numbers)):
            hard, last = step >= settings.objective.soft * steps, step + 1 == steps
            if settings.check and hard and not last and (step + 1) % settings.check == 0:
                tried = _tried(judge, x, target.decision, p)
                best = tried if best is None else best.smaller(tried)
        final = threshold_masks(judge, x, target.decision, p, tighten=bool(settings.check), settings=_REPAIR)
        best = final if best is None else best.smaller(final)
    return replace(best, evaluations=best.evaluations + GRADIENT * steps + 1)  # one: the target's


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
    grid = settings.grid(x.shape)
    if start is None:
        coarse = torch.full((b, 1, *grid), KEEP_ALL, device=x.device)
    else:
        coarse = F.interpolate(start.clamp(-4, 4), size=grid, mode="area")
    coarse = coarse.clone().requires_grad_(True)
    moments = [torch.zeros_like(coarse), torch.zeros_like(coarse)]
    weight = torch.full((b,), objective.area, device=x.device)
    low, high = objective.dual_range
    background = judge.backgrounds.default(x)
    steps = settings.length(start)
    for step in range(steps):
        hard = step >= objective.soft * steps
        p = torch.sigmoid(F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False))
        mask = straight_through(p) if hard else p
        family = TRAINING[step % len(TRAINING)]
        behind = background if family == DEFAULT else _random_backgrounds(judge, x, numbers, step)
        terms = evaluate_on(objective, classifier, x, p, mask, target, behind, random=family != DEFAULT)
        # a sum over images: each one's gradient is its own, whatever shares the batch
        loss = terms.total(objective, weight) * b
        (gradient,) = torch.autograd.grad(loss, coarse)
        _adam(coarse, gradient, moments, step, settings.lr)
        held = terms.kept.to(weight.dtype)
        if objective.dual:
            rate = 2 * objective.dual_rate
            weight = (weight * (1 + rate * (2 * held - 1) * torch.where(held > 0, 0.5, 1.0))).clamp(low, high)
        if step + 1 < steps:
            yield p.detach()
    yield torch.sigmoid(F.interpolate(coarse.detach(), size=(h, w), mode="bilinear", align_corners=False))


def _random_backgrounds(judge: Judge, x: Tensor, numbers: Tensor, step: int) -> Tensor:
    """Backgrounds [B,C,H,W] of the step's family, for each image the draw that its number says."""
    family = TRAINING[step % len(TRAINING)]
    assert family in FAMILIES and family not in FROM_IMAGE
    picks = (numbers * 5 + step // len(TRAINING))[:, None]
    return judge.backgrounds.draw(family, x, picks, purpose="refine", pool=32)[:, 0]


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
