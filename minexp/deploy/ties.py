"""Masks of two runtimes that differ by rounding alone: told from other differences, and certified by torch.

Float32 kernels round differently, so that pixels whose places in the order lie closer than that may change sides of a
mask's level. Such a mask is as good as torch's own, and what is left to check is that its certificate is true.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..certificate import Certificate
from ..certify import certify
from ..explanation import FRESH
from ..judge import Judge
from ..repair import Masks, local_order
from ..search import REPEATS

AVERAGING = 16 * 2.0**-23  # relative error of the order's moving average, beyond that of the probabilities
MOST = 1e-4  # relative error of a probability beyond which two maskers do not differ by rounding


def tied(
    p: npt.NDArray[np.floating],
    other_p: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    other: npt.NDArray[np.bool_],
    threshold: float = 0.5,
) -> bool:
    """Does the mask [H,W] of one image differ from the other runtime's by the rounding of probabilities alone?

    p, other_p [H,W]: the maskers' probabilities, which say how far rounding goes. Both masks have to be level sets of
    p's order up to that, of sizes that differ by no more than the pixels that share the level and, where p's own mask
    differs from other_p's at the threshold, by what the search makes of those.
    """
    error = float((np.abs(p - other_p) / np.minimum(p, other_p)).max()) + AVERAGING
    if error > MOST or not (mask.any() and other.any()):
        return False
    order = local_order(torch.from_numpy(p)[None, None], threshold)[0, 0].numpy()
    level = order[mask].min()
    if order[~other].max(initial=0) > order[other].min() * (1 + 2 * error):
        return False
    beside = int((np.abs(order - level) <= 2 * error * level).sum()) - 1  # the level is a pixel's own
    counts = [int((values > threshold).sum()) for values in (p, other_p)]
    first = abs(counts[0] - counts[1])
    grown = -(-first * int(mask.sum()) // max(1, counts[0])) + 2 if first else 0
    return abs(int(mask.sum()) - int(other.sum())) <= beside + grown


@torch.no_grad()
def certify_again(
    judge: Judge, x: Tensor, logits: Tensor, masks: Tensor, attempt: int, found: Certificate
) -> Certificate:
    """torch's certificate of one image's mask [1,1,H,W], found at an attempt, with what the search took as found."""
    first = judge.stricter(REPEATS["fast"])
    verdict = first.stricter(2**attempt).holds(x, judge.target.decide(logits), masks)
    nothing = torch.zeros(len(x), dtype=torch.long)
    measured = Masks(masks, verdict.ok, nothing.float(), nothing, verdict.scores, nothing)
    (certificate,) = certify(
        first, x, logits, measured, per_family=FRESH["fast"], first=attempt * FRESH["fast"]
    )
    return replace(certificate, evaluations=found.evaluations, threshold=found.threshold)
