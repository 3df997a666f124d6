"""From probabilities to the smallest threshold mask that satisfies the predicate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .judge import GRADIENT, Judge, Verdict, harder


@dataclass(frozen=True)
class Repair:
    """How a masker's mask is repaired.

    start: pixels of the first mask tried, as a multiple of those above 0.5; a masker's masks hold on average, and with
    a quarter more pixels most of them need no repair. growth: of a mask that fails, each time. bisections: then,
    between the last size that failed and the first that held. enlarge: the least that a mask gains that fresh draws
    contradict. hints: ask the checks first that the mask before failed at. again: ask for the kept pixels' scores once
    more.
    early: a miss among the predicate's early draws fails a mask; asking all of them costs more than the next mask.
    guided: grow where the classifier's gradient, on the background that the mask failed on, says that it helps.
    """

    start: float = 1.25
    growth: float = 1.4
    bisections: int = 0
    enlarge: float = 1.1
    hints: bool = True
    again: bool = False
    early: bool = False
    guided: bool = False


# Level sets alone, which is what a graph without gradients can do: exported explainers.
SPARING = Repair(start=1.0, growth=1.3)
GUIDED = Repair(start=1.0, growth=1.2, early=True, guided=True)
REPAIRS = {"guided": GUIDED, "levels": SPARING}
# The masker's own mask first, and the smallest size that holds.
THOROUGH = Repair(start=1.0, growth=1.3, bisections=3, hints=False, again=True)


SPECK = 128  # part of the image that a mask grown by gradients has at least
FAINT = 0.15  # share of a pixel outside the mask that is shown where a gradient is taken, and of one inside that is not


@dataclass(frozen=True)
class Masks:
    """Hard masks [B,1,H,W], whether the predicate holds for each, the threshold that gave it, evaluations spent.

    scores [B,K]: the classifier's, of what each mask keeps on the default background. minimal_at [B]: side in
    pixels of the cells none of which can go, 0 where that is not known. margins [B,D]: by how much they passed the
    judge's checks, where that was kept.
    """

    masks: Tensor
    holds: Tensor
    threshold: Tensor
    evaluations: Tensor
    scores: Tensor
    minimal_at: Tensor
    margins: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Masks]) -> Masks:
        """The masks of several batches as one."""
        return Masks(
            *(torch.cat(column) for column in zip(*(part._columns() for part in parts), strict=True))
        )

    def put(self, index: Tensor, other: Masks) -> Masks:
        """These masks, with those numbered ``index`` taken from ``other``."""

        def placed(mine: Tensor, theirs: Tensor) -> Tensor:
            column = mine.clone()
            column[index] = theirs
            return column

        return self._merged(other, placed)

    def smaller(self, other: Masks) -> Masks:
        """Image by image the smaller of the masks that hold, of these and as many others; evaluations add up."""
        area = other.masks.flatten(1).sum(1) < self.masks.flatten(1).sum(1)
        better = other.holds & (area | ~self.holds)

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(better.view(-1, *[1] * (mine.dim() - 1)), theirs, mine)

        best = self._merged(other, chosen)
        return replace(best, evaluations=self.evaluations + other.evaluations)

    def of(self, index: Tensor) -> Masks:
        """Those of the images numbered ``index`` alone."""
        return self._merged(self, lambda mine, _: mine[index])

    def first(self, number: int) -> Masks:
        """Those of the first images alone."""
        return self._merged(self, lambda mine, _: mine[:number])

    def _merged(self, other: Masks, merge: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        """Column by column; margins only where both know them of the same checks."""
        columns = (merge(*pair) for pair in zip(self._columns(), other._columns(), strict=True))
        merged = Masks(*columns)
        mine, theirs = self.margins, other.margins
        if mine is None or theirs is None or mine.shape[1] != theirs.shape[1]:
            return merged
        return replace(merged, margins=merge(mine, theirs))

    def _columns(self) -> list[Tensor]:
        """All but the margins, which are about one judge's predicate."""
        return [getattr(self, field.name) for field in fields(Masks) if field.name != "margins"]


def threshold_masks(
    judge: Judge,
    x: Tensor,
    decision: Tensor,
    p: Tensor,
    *,
    tighten: bool = False,
    threshold: float = 0.5,
    at_least: Tensor | None = None,
    settings: Repair | None = None,
) -> Masks:
    """Threshold p [B,1,H,W] at 0.5; where the predicate fails there, lower the threshold until it holds.

    The candidates of one image are its probabilities' own level sets (`settings.guided`: its mask, grown by gradients):
    growing by a constant factor, then bisected in log-area; keep-all, which always keeps the decision, is the last
    resort. ``tighten`` also bisects below masks that hold at 0.5.
    at_least [B]: begin with the level sets of that many pixels instead. settings: of the search, by default THOROUGH.
    """
    settings = THOROUGH if settings is None else settings
    h, w = p.shape[2:]
    flat = p.flatten(1).clone() if settings.guided else p.flatten(1)
    ranked = flat.sort(1, descending=True).values
    first = flat > threshold if at_least is None else _level_set(flat, ranked, at_least.clamp(1, h * w))
    count = first.sum(1)

    asked = judge.cleaner() if settings.early else judge

    def ask(index: Tensor, masks: Tensor, hints: Tensor | None) -> Verdict:
        return asked.holds(x[index], decision[index], masks, hints=hints)

    verdict = ask(torch.arange(len(x), device=x.device), first.view(p.shape), None)
    ok, spent, scores = verdict.ok, verdict.spent, verdict.scores.clone()
    # what one mask failed at, the next one is asked first
    hints = harder(verdict.margins) if settings.hints else torch.zeros_like(verdict.margins)
    everything = torch.full_like(count, h * w)
    high = torch.where(ok, count, everything)  # a size that holds
    low = torch.where(ok, (count // 4), count)  # a size that fails, or is not tried below
    holds = torch.ones_like(ok)  # keep-all keeps the decision by definition
    failing = (~ok).nonzero().flatten()
    certain = judge.question.by_all and judge.predicate.kind != "score"
    if not certain and len(failing):  # that even the whole image may fail: then say so
        whole = torch.ones(len(failing), 1, h, w, dtype=torch.bool, device=x.device)
        verdict = judge.holds(x[failing], decision[failing], whole)
        holds[failing], scores[failing] = verdict.ok, verdict.scores
        spent[failing] += verdict.spent

    def attempt(index: Tensor, size: Tensor) -> Tensor:
        """Try level sets of these sizes; the bounds move. Which of them hold?"""
        candidate = _level_set(flat[index], ranked[index], size)
        tried = ask(index, candidate.view(-1, 1, h, w), hints[index] if settings.hints else None)
        spent[index] += tried.spent
        hints[index] = harder(tried.margins, hints[index])
        scores[index] = torch.where(tried.ok[:, None], tried.scores, scores[index])
        high[index] = torch.where(tried.ok, size, high[index])
        low[index] = torch.where(tried.ok, low[index], size)
        return tried.ok

    # More pixels are not always better (they may bring rival evidence): the first size upwards that holds is taken.
    growing = (holds & ~ok).nonzero().flatten()
    least = h * w // SPECK if settings.guided else 1  # a masker's mask may be empty
    while len(growing):
        size = torch.maximum((low[growing] * settings.growth).ceil().long(), low[growing] + 1).clamp_min(
            least
        )
        growing, size = growing[size < h * w], size[size < h * w]
        if len(growing) and settings.guided:
            mask = _level_set(flat[growing], ranked[growing], low[growing]) & (low[growing] > 0)[:, None]
            mask = mask.view(-1, 1, h, w)
            check = hints[growing].argmax(1)
            helpful = _helpful(judge, x[growing], decision[growing], mask, p[growing], check)
            flat[growing] = helpful.flatten(1)
            ranked[growing] = flat[growing].sort(1, descending=True).values
            spent[growing] += GRADIENT
        if len(growing):
            growing = growing[~attempt(growing, size)]
    for _ in range(settings.bisections):
        searched = holds if tighten else holds & ~ok
        index = (searched & (high > low + 1)).nonzero().flatten()
        if len(index):
            middle = (low[index].clamp_min(1).double() * high[index].double()).sqrt().round().long()
            attempt(index, torch.minimum(torch.maximum(middle, low[index] + 1), high[index] - 1))
    whole = (holds & ~ok & (high == h * w)).nonzero().flatten()
    if len(whole) and certain and not settings.again:
        scores[whole] = judge.logits(x[whole])
        spent[whole] += 1
    margins = -hints if settings.hints else None
    masks = torch.where((ok & (high == count))[:, None], first, _level_set(flat, ranked, high))
    level = ranked.gather(1, (high - 1).clamp_min(0)[:, None])[:, 0]
    if settings.guided:  # what grew by gradients is no level set of p, but for the mask it grew from
        level = torch.where(ok, level, torch.full_like(level, threshold))
    if at_least is None:
        level = torch.where(ok & (high == count), torch.full_like(level, threshold), level)
    return Masks(masks.view(p.shape), holds, level, spent, scores, torch.zeros_like(spent), margins)


def _level_set(flat: Tensor, ranked: Tensor, size: Tensor) -> Tensor:
    """The pixels at least as probable as the size-th: [B,HW] bool."""
    return flat >= ranked.gather(1, (size - 1).clamp_min(0)[:, None])


def _helpful(judge: Judge, x: Tensor, decision: Tensor, mask: Tensor, prior: Tensor, check: Tensor) -> Tensor:
    """Scores [B,1,H,W] to grow masks [B,1,H,W] by: 1 inside; outside, what a pixel helps at the check [B] they failed.

    prior [B,1,H,W]: of the pixels; where two help alike, the more probable one comes first.
    """
    behind = judge.backgrounds_of(x, check)
    # a little of everything is shown: at the mask's own edge the classifier often no longer sees what is missing
    slope = judge.slope(x, decision, FAINT + (1 - 2 * FAINT) * mask, behind)
    side = 2 * max(1, min(x.shape[2:]) // 64) + 1
    for _ in range(2):
        slope = F.avg_pool2d(slope, side, 1, side // 2, count_include_pad=False)
    gain = slope.clamp_min(0) / slope.flatten(1).amax(1).clamp_min(1e-12)[:, None, None, None]
    return torch.where(mask, 1.0, (gain + 1e-6) * (0.1 + prior.clamp(0, 1)) / 1.2)


def local_order(p: Tensor, threshold: float = 0.5) -> Tensor:
    """Probabilities [B,1,H,W] whose values outside the mask are averaged with those around them.

    Trained masks are nearly binary: far outside, p says nothing, and a mask repaired by it scatters over the image.
    Averaged over an eighth of the image, the level sets below the threshold grow from the mask outwards.
    """
    side = 2 * max(1, min(p.shape[2:]) // 8) + 1
    around = p
    for _ in range(2):
        for kernel in ((side, 1), (1, side)):  # a square's mean is that of its rows' means
            padding = (kernel[0] // 2, kernel[1] // 2)
            around = F.avg_pool2d(around, kernel, 1, padding, count_include_pad=False)
    return torch.where(p > threshold, p, threshold * (p + around) / (1 + threshold))


def growth_order(masks: Tensor) -> Tensor:
    """Scores [B,1,H,W] in (0, 1] by which masks [B,1,H,W] grow: 1 inside, less the further a pixel lies outside."""
    score, reached = masks.float(), masks.float()
    for _ in range(max(masks.shape[2:])):
        reached = F.max_pool2d(reached, 3, 1, 1)
        score = score + reached
    return score / score.flatten(1).amax(1).clamp_min(1)[:, None, None, None]
