"""From probabilities to the smallest threshold mask that satisfies the predicate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .certify import Judge

REPAIR_STEPS = 6  # bisections between a failing mask and keep-all
TIGHTEN_STEPS = 4  # bisections below a mask that holds


@dataclass(frozen=True)
class Masks:
    """Hard masks [B,1,H,W], whether the predicate holds for each, the threshold that gave it, evaluations spent."""

    masks: Tensor
    holds: Tensor
    threshold: Tensor
    evaluations: Tensor


def threshold_masks(
    judge: Judge,
    x: Tensor,
    label: Tensor,
    p: Tensor,
    *,
    tighten: bool = False,
    threshold: float = 0.5,
    at_least: Tensor | None = None,
) -> Masks:
    """Threshold p [B,1,H,W] at 0.5; where the predicate fails there, lower the threshold by bisection until it holds.

    The candidates of one image are its probabilities' own level sets, halved in log-area; keep-all, which
    always keeps the top class, is the last resort. ``tighten`` also bisects upwards where 0.5 holds already.
    at_least [B]: begin with the level sets of that many pixels instead.
    """
    h, w = p.shape[2:]
    flat = p.flatten(1)
    ranked = flat.sort(1, descending=True).values
    first = flat > threshold if at_least is None else _level_set(flat, ranked, at_least.clamp(1, h * w))
    count = first.sum(1)
    ok, spent = judge.holds(x, label, first.view(p.shape))
    everything = torch.full_like(count, h * w)
    high = torch.where(ok, count, everything)  # a size that holds
    low = torch.where(
        ok, (count // 4).clamp_min(1), count.clamp_min(1)
    )  # a size that fails, or is not tried below
    holds = torch.ones_like(ok)  # keep-all keeps the top class by definition
    failing = (~ok).nonzero().flatten()
    if judge.predicate.kind == "score" and len(failing):  # that even the whole image may fail: then say so
        whole = torch.ones(len(failing), 1, h, w, dtype=torch.bool, device=x.device)
        holds[failing], extra = judge.holds(x[failing], label[failing], whole)
        spent[failing] += extra
    for step in range(max(REPAIR_STEPS, TIGHTEN_STEPS if tighten else 0)):
        searched = (holds & ~ok) if step < REPAIR_STEPS else torch.zeros_like(ok)
        if tighten and step < TIGHTEN_STEPS:
            searched |= ok
        searched &= high > low + 1
        index = searched.nonzero().flatten()
        if not len(index):
            break
        middle = (low[index].double() * high[index].double()).sqrt().round().long()
        middle = torch.minimum(torch.maximum(middle, low[index] + 1), high[index] - 1)
        candidate = _level_set(flat[index], ranked[index], middle)
        passed, extra = judge.holds(x[index], label[index], candidate.view(-1, 1, h, w))
        spent[index] += extra
        high[index] = torch.where(passed, middle, high[index])
        low[index] = torch.where(passed, low[index], middle)
    masks = torch.where((ok & (high == count))[:, None], first, _level_set(flat, ranked, high))
    level = ranked.gather(1, (high - 1).clamp_min(0)[:, None])[:, 0]
    if at_least is None:
        level = torch.where(ok & (high == count), torch.full_like(level, threshold), level)
    return Masks(masks.view(p.shape), holds, level, spent)


def _level_set(flat: Tensor, ranked: Tensor, size: Tensor) -> Tensor:
    """The pixels at least as probable as the size-th: [B,HW] bool."""
    return flat >= ranked.gather(1, (size - 1).clamp_min(0)[:, None])


def growth_order(masks: Tensor) -> Tensor:
    """Scores [B,1,H,W] in (0, 1] by which masks [B,1,H,W] grow: 1 inside, less the further a pixel lies outside."""
    score, reached = masks.float(), masks.float()
    for _ in range(max(masks.shape[2:])):
        reached = F.max_pool2d(reached, 3, 1, 1)
        score = score + reached
    return score / score.flatten(1).amax(1).clamp_min(1)[:, None, None, None]
