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

    A mask is optimised for that class as a refinement is for the first, cut at the same number of pixels, and has to
    satisfy the same predicate. Masks that pass for any class are adversarial patterns, not explanations: few should.
    """
    numbers = torch.arange(len(x)) if numbers is None else numbers.cpu()
    with judge.classifier.frozen():
        target = make_target(judge.classifier, x, replace(settings.objective, act=0), reused=True)
        rival = target.logits.topk(2, 1).indices[:, 1]
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
