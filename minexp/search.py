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
from .repair import Masks, growth_order, local_order, threshold_masks

Effort = Literal["fast", "refined", "minimal"]
EFFORTS: tuple[Effort, ...] = ("fast", "refined", "minimal")
# Sets of the predicate's draws that have to agree. One that tries many masks finds some that suit the draws by chance.
REPEATS = {"fast": 1, "refined": 2, "minimal": 6}
# A masker's masks hold on average; a quarter more pixels spares most of them a repair, and evaluations with it.
START = 1.25
GROW = 1.1  # the least an enlarged mask gains


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
    ) -> None:
        self.judge = judge.stricter(REPEATS[effort])
        self.x, self.label, self.masker, self.effort = x, logits.argmax(1), masker, effort
        self.published = None if preset != "paper" else PRESETS["paper"]
        if refinement is None:
            refinement = Refinement(steps=60 if effort == "minimal" else 120)
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
        return Masks.cat([self._find(part) for part in index.split(self.judge.micro_batch)])

    def _find(self, index: Tensor) -> Masks:
        x, label = self.x[index], self.label[index]
        p = None if self.masker is None else self.masker.probabilities(x)
        if self.effort == "fast":
            assert p is not None
            self.order[index] = local_order(p)
            least = ((p > 0.5).flatten(1).sum(1) * START).ceil().long()
            return threshold_masks(self.judge, x, label, self.order[index], at_least=least, bisections=0)
        if self.published is not None:
            found = paper.optimise(self.judge, x, objective=self.published)
            self.order[index] = growth_order(found.masks)
            return found
        numbers = torch.tensor([zlib.crc32(i.numpy().tobytes()) % 2**20 for i in x.cpu()])
        start = None if p is None else torch.logit(p, 1e-4)
        found = refine(self.judge, x, self.refinement, start=start, numbers=numbers)
        self.order[index] = growth_order(found.masks)
        return self._reduce(self.judge, x, label, found)

    def _reduce(self, judge: Judge, x: Tensor, label: Tensor, found: Masks) -> Masks:
        if self.effort != "minimal":
            return found
        return minimise(judge, x, label, found, self.minimisation)

    def enlarge(self, index: Tensor, masks: Tensor, attempt: int) -> tuple[Judge, Masks]:
        """For images ``index`` [n] whose masks [n,1,H,W] fresh draws contradict: larger ones that hold on more draws.

        Also the judge they satisfy, with 2**attempt times the draws.
        """
        judge = self.judge.stricter(2**attempt)
        x, label = self.x[index], self.label[index]
        at_least = (masks.flatten(1).sum(1) * GROW).ceil().long()
        order = torch.where(masks, 1 + self.order[index], self.order[index])
        larger = threshold_masks(judge, x, label, order, at_least=at_least, bisections=0)
        return judge, self._reduce(judge, x, label, larger)
