"""The search for masks at the effort asked for: threshold and repair, refinement, minimisation."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from . import paper
from .judge import Judge
from .masker import Masker
from .minimise import Minimisation, minimise
from .objective import PRESETS, Match
from .refine import Refinement, refine
from .repair import GUIDED, SPECK, Masks, Repair, growth_order, local_order, threshold_masks

Effort = Literal["fast", "refined", "minimal"]
EFFORTS: tuple[Effort, ...] = ("fast", "refined", "minimal")
# Sets of the predicate's draws that have to agree. One that tries many masks finds some that suit the draws by chance.
REPEATS = {"fast": 1, "refined": 1, "minimal": 3}
FAR = 1.6  # times a masker's pixels: where a descent from there ends larger, it is worth another one


def held_to(judge: Judge, effort: Effort, more: int = 0) -> Judge:
    """The judge that an effort's masks satisfy, with ``more`` sets of draws.

    minimal tries many masks that fail: one miss has to be enough to show that they do.
    """
    return (judge.cleaner() if effort == "minimal" else judge).stricter(REPEATS[effort] + more)


class Search:
    """One batch's search: x [B,C,H,W], logits [B,K] of the whole images; a micro-batch at a time."""

    def __init__(
        self,
        judge: Judge,
        x: Tensor,
        logits: Tensor,
        masker: Masker | None,
        effort: Effort,
        refinement: Refinement | None = None,
        minimisation: Minimisation | None = None,
        preset: str = "default",
        match: Match | None = None,
        repair: Repair | None = None,
    ) -> None:
        self.asked, self.judge = judge, held_to(judge, effort)
        self.x, self.decision = x, judge.target.decide(logits)
        self.masker, self.effort, self.repair = masker, effort, repair or GUIDED
        self.published = None if preset != "paper" else PRESETS["paper"]
        if refinement is None:
            refinement = Refinement()
            if preset == "kl":
                refinement = replace(refinement, objective=replace(PRESETS[preset], soft=0.5))
        if match is not None:
            refinement = replace(refinement, objective=replace(refinement.objective, match=match))
            self.published = self.published and replace(self.published, match=match)
        self.refinement = refinement
        self.minimisation = minimisation or Minimisation()
        self.order = torch.zeros_like(x[:, :1])

    def find(self) -> Masks:
        """Masks that satisfy the predicate, where any do."""
        index = torch.arange(len(self.x), device=self.x.device)
        return Masks.cat(list(self.judge.micro_batch.run(self._find, index)))

    def _find(self, index: Tensor) -> Masks:
        x, decision = self.x[index], self.decision[index]
        if self.effort == "fast":
            assert self.masker is not None
            p = self.masker.probabilities(x)
            self.order[index] = local_order(p)
            return self._threshold(self.judge, x, decision, self.order[index], p)
        if self.published is not None:
            found = paper.optimise(self.judge, x, objective=self.published)
            self.order[index] = growth_order(found.masks)
            return found
        found = self._refine(x, _numbers(x))
        self.order[index] = growth_order(found.masks)
        return self._reduce(self.judge, x, decision, found)

    def _refine(self, x: Tensor, numbers: Tensor) -> Masks:
        """Descents from the masker's output; from keep-all as well, where that ends far from it: a wrong place."""
        if self.masker is None:
            return refine(self.judge, x, self.refinement, numbers=numbers)
        p = self.masker.probabilities(x)
        found = refine(self.judge, x, self.refinement, start=torch.logit(p, eps=1e-3), numbers=numbers)
        pixels = (p > 0.5).flatten(1).sum(1).clamp_min(x[0, 0].numel() // SPECK)
        far = (found.masks.flatten(1).sum(1) > FAR * pixels).nonzero().flatten()
        if not len(far):
            return found
        again = refine(self.judge, x[far], self.refinement, numbers=numbers[far.cpu()])
        return found.put(far, found.of(far).smaller(again))

    def _threshold(self, judge: Judge, x: Tensor, decision: Tensor, order: Tensor, p: Tensor) -> Masks:
        least = None
        if self.repair.start != 1:
            least = ((p > 0.5).flatten(1).sum(1) * self.repair.start).ceil().long()
        return threshold_masks(judge, x, decision, order, at_least=least, settings=self.repair)

    def _reduce(self, judge: Judge, x: Tensor, decision: Tensor, found: Masks) -> Masks:
        if self.effort != "minimal":
            return found
        return minimise(judge, x, decision, found, self.minimisation)

    def enlarge(self, index: Tensor, masks: Tensor, attempt: int) -> tuple[Judge, Masks]:
        """For images ``index`` [n] whose masks [n,1,H,W] fresh draws contradict: larger ones that hold on more draws.

        Also the judge they satisfy, with twice the sets of draws or half as many more, and so on.
        """
        judge = held_to(self.asked, self.effort, (2**attempt - 1) * ((REPEATS[self.effort] + 1) // 2))
        x, decision = self.x[index], self.decision[index]
        at_least = (masks.flatten(1).sum(1) * self.repair.enlarge).ceil().long()
        order = torch.where(masks, 1 + self.order[index], self.order[index])
        larger = threshold_masks(judge, x, decision, order, at_least=at_least, settings=self.repair)
        return judge, self._reduce(judge, x, decision, larger)


def _numbers(x: Tensor) -> Tensor:
    """What the backgrounds of each image of x [B,C,H,W] are drawn by: [B], its own whatever shares its batch."""
    return torch.tensor([zlib.crc32(image.numpy().tobytes()) % 2**20 for image in x.cpu()])
