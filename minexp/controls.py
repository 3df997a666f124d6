"""Controls: could a mask of the same size, found with the same effort, prove something that is not so?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .judge import Judge
from .objective import make_target
from .refine import Refinement, descend

_SETTINGS = Refinement()


def wrong_class(
    judge: Judge,
    x: Tensor,
    masks: Tensor,
    settings: Refinement = _SETTINGS,
    *,
    numbers: Tensor | None = None,
) -> Tensor:
    """For each image of x [B,C,H,W]: can as many pixels as masks [B,1,H,W] keep prove the second-best class? [B] bool.

    Where no pixel at all satisfies the predicate for that class, as for one that means "nothing here", it is no rival:
    the third-best takes its place. A mask is optimised for the rival as a refinement is for the first class, cut at the
    same number of pixels, and has to satisfy the same predicate. Masks that pass for any class are adversarial
    patterns, not explanations: few should.
    """
    numbers = torch.arange(len(x)) if numbers is None else numbers.cpu()
    with judge.classifier.frozen():
        target = make_target(judge.classifier, x, replace(settings.objective, act=0), reused=True)
        rival = _rival(judge, x, target.logits)
        # the rival takes the label's place in the scores that are to be matched as well
        logits = target.logits.clone()
        logits.scatter_(1, rival[:, None], target.logits.gather(1, target.decision[:, None]))
        logits.scatter_(1, target.decision[:, None], target.logits.gather(1, rival[:, None]))
        wrong = replace(target, decision=rival, logits=logits)
        settings = replace(settings, objective=replace(settings.objective, act=0))
        *_, p = descend(judge, x, wrong, settings, None, numbers)
        flat = p.flatten(1)
        rank = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        mask = (rank < masks.flatten(1).sum(1, keepdim=True)).view_as(masks)
        return judge.holds(x, rival, mask).ok


def _rival(judge: Judge, x: Tensor, logits: Tensor) -> Tensor:
    """The best class [B] but the first that images [B,C,H,W] without a pixel do not have already."""
    best = logits.topk(min(3, logits.shape[1]), 1).indices
    nothing = torch.zeros_like(x[:, :1], dtype=torch.bool)
    vacuous = judge.holds(x, best[:, 1], nothing).ok
    return torch.where(vacuous, best[:, -1], best[:, 1])
