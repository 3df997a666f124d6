"""The predicate an explanation has to satisfy, and the question it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from .errors import RequestError
from .targets import Target


class Question(Protocol):
    """What a mask is asked: what the classifier is shown of it, and what it has to answer.

    by_all: the mask of all pixels answers it for certain.
    """

    by_all: bool

    def show(self, mask: Tensor, x: Tensor, background: Tensor) -> Tensor:
        """What a mask [B,1,H,W] (bool) leaves of x [B,C,H,W]."""

    def claim(self, kept: str) -> str:
        """What a mask that answers it shows, in words; kept: when the decision is kept."""

    def margin(self, target: Target, scores: Tensor, decision: Tensor) -> Tensor:
        """By how much scores [B,K] answer it, given the decisions [B,...] of whole images: [B], > 0 where they do."""


class Sufficient:
    """Are these pixels enough for the decision?"""

    by_all = True

    def show(self, mask: Tensor, x: Tensor, background: Tensor) -> Tensor:
        return torch.where(mask, x, background)

    def claim(self, kept: str) -> str:
        return kept

    def margin(self, target: Target, scores: Tensor, decision: Tensor) -> Tensor:
        return _signed(target.kept(scores, decision), target.confidence(scores, decision))


class Necessary:
    """Does the decision go when these pixels go?"""

    by_all = False  # it may be that of an empty image, too

    def show(self, mask: Tensor, x: Tensor, background: Tensor) -> Tensor:
        return torch.where(mask, background, x)

    def claim(self, kept: str) -> str:
        return f"{kept} only with these pixels"

    def margin(self, target: Target, scores: Tensor, decision: Tensor) -> Tensor:
        return _signed(~target.kept(scores, decision), 1 - target.confidence(scores, decision))


@dataclass(frozen=True)
class Contrast(Sufficient):
    """Are these pixels enough to tell the class from one other?"""

    rival: int

    def claim(self, kept: str) -> str:
        return f"ahead of class {self.rival}"

    def margin(self, target: Target, scores: Tensor, decision: Tensor) -> Tensor:
        return scores.gather(1, decision[:, None])[:, 0] - scores[:, self.rival]


def _signed(yes: Tensor, confidence: Tensor) -> Tensor:
    """Positive where yes, and the larger the more confident; for a confidence in [0, 1] never across zero."""
    return torch.where(yes, confidence.clamp_min(1e-6), (confidence - 1).clamp_max(-1e-6))


@dataclass(frozen=True)
class Predicate:
    """When does a mask explain a decision? A deterministic function of (image, mask) for one job's backgrounds.

    kind "top1": the classifier's target is kept on the default background, by default argmax f(e) = the image's class;
    "score": its confidence, by default p_y(e), is at least tau; "robust": kept there, and on at least the share ``rho``
    of ``draws`` random backgrounds of the training families (those of which two draws differ; the mean colour is the
    default background). The draws have an order, and ``early`` of them without a miss are enough (a double sampling
    plan: Dodge and Romig 1929); ``acceptance`` says what that proves. ``repeats`` sets of draws, each new, have to
    agree: for searches that try many masks. clean: the early draws alone count, and none may fail, so that one miss
    shows that a mask does not hold. dilated: the decision has to stay as well when the mask grows by one pixel on all
    sides.
    """

    kind: Literal["top1", "score", "robust"] = "robust"
    rho: float = 0.95
    draws: int = 20
    tau: float = 0.5
    early: int = 7
    repeats: int = 1
    dilated: bool = False
    clean: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("top1", "score", "robust"):
            raise RequestError(f"unknown predicate {self.kind!r}; choose top1, score or robust")
        if not (0 < self.rho <= 1 and 0 <= self.tau <= 1 and min(self.draws, self.early, self.repeats) >= 1):
            raise RequestError(
                f"predicate with rho {self.rho}, tau {self.tau}, draws {self.draws}, early {self.early}, "
                f"repeats {self.repeats}; give 0 < rho ≤ 1, 0 ≤ tau ≤ 1, and counts of at least 1"
            )

    @property
    def misses(self) -> int:
        """How many draws of a set may fail."""
        return 0 if self.clean else math.floor((1 - self.rho) * self.draws + 1e-9)

    def acceptance(self, robust: float) -> float:
        """Probability that a mask with the class kept on the share ``robust`` of all backgrounds passes the draws."""
        if self.kind != "robust":
            return 1.0
        early = min(self.early, self.draws)
        # by misses so far, among those neither rejected nor yet accepted
        running, accepted = [1.0] + [0.0] * self.misses, 0.0
        for number in range(1, self.draws + 1):
            running = [
                robust * here + (1 - robust) * fewer
                for here, fewer in zip(running, [0.0, *running], strict=False)
            ]
            if number == early:
                accepted, running[0] = running[0], 0.0
        return float((accepted + sum(running)) ** self.repeats)

    def stricter(self, factor: int) -> Predicate:
        """The same predicate on that many times the draws: new sets of them or, without an early pass, a larger set."""
        if self.early >= self.draws:
            return replace(self, draws=self.draws * factor, early=self.early * factor)
        return replace(self, repeats=self.repeats * factor)

    def thorough(self) -> Predicate:
        """The same without an early pass: every mask that holds has been asked all draws."""
        return replace(self, early=self.draws)

    def claim(self, kept: str = "top-1 kept") -> str:
        """What it asks, in words; `kept` says when the decision is kept."""
        text = kept
        if self.kind == "score":
            text = f"p >= {self.tau:g}"
        elif self.kind == "robust":
            early = min(self.early, self.draws)
            if self.clean:
                text += f" and robust >= {self.rho:g} ({self.repeats * early} backgrounds without a miss)"
                return text + (", also dilated" if self.dilated else "")
            text += f" and robust >= {self.rho:g} on {self.draws} backgrounds"
            if self.early < self.draws:
                text += f" ({self.early} without a miss)"
            if self.repeats > 1:
                text += f", {self.repeats} times"
        return text + (", also dilated" if self.dilated else "")

    def __str__(self) -> str:
        return self.claim()
