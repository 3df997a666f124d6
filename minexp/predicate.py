"""The predicate an explanation has to satisfy, and the question it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .errors import RequestError


class Question(Protocol):
    """What a mask is asked: what the classifier is shown of it, and what it has to answer.

    by_all: the mask of all pixels answers it for certain.
    """

    by_all: bool

    def show(self, mask: Tensor, x: Tensor, background: Tensor) -> Tensor:
        """What a mask [B,1,H,W] (bool) leaves of x [B,C,H,W]."""

    def margin(self, scores: Tensor, label: Tensor) -> Tensor:
        """By how much scores [B,K] answer the question about the class label [B]: [B], positive where they do."""


def lead(scores: Tensor, label: Tensor) -> Tensor:
    """The label's score less the best of the others; [B], positive where the label is the top class."""
    own = scores.gather(1, label[:, None])
    return (own - scores.scatter(1, label[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


class Sufficient:
    """Are these pixels enough for the class?"""

    by_all = True

    def show(self, mask: Tensor, x: Tensor, background: Tensor) -> Tensor:
        return torch.where(mask, x, background)

    def margin(self, scores: Tensor, label: Tensor) -> Tensor:
        return lead(scores, label)


class Necessary:
    """Does the class go when these pixels go?"""

    by_all = False  # an empty image may have the class, too

    def show(self, mask: Tensor, x: Tensor, background: Tensor) -> Tensor:
        return torch.where(mask, background, x)

    def margin(self, scores: Tensor, label: Tensor) -> Tensor:
        return -lead(scores, label)


@dataclass(frozen=True)
class Contrast(Sufficient):
    """Are these pixels enough to tell the class from one other?"""

    rival: int

    def margin(self, scores: Tensor, label: Tensor) -> Tensor:
        return scores.gather(1, label[:, None])[:, 0] - scores[:, self.rival]


@dataclass(frozen=True)
class Predicate:
    """When does a mask explain a decision? A deterministic function of (image, mask) for one job's backgrounds.

    kind "top1": argmax f(e) is the image's class on the default background; "score": p_y(e) ≥ tau;
    "robust": top-1 kept, and kept on at least the share ``rho`` of ``draws`` random backgrounds of the training
    families (those of which two draws differ; the mean colour is the default background). The draws have an order,
    and ``early`` of them without a miss are enough (a double sampling plan: Dodge and Romig 1929); ``acceptance``
    says what that proves. ``repeats`` sets of draws, each new, have to agree: for searches that try many masks.
    dilated: the class has to stay as well when the mask grows by one pixel on all sides.
    """

    kind: Literal["top1", "score", "robust"] = "robust"
    rho: float = 0.95
    draws: int = 20
    tau: float = 0.5
    early: int = 7
    repeats: int = 1
    dilated: bool = False

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
        return math.floor((1 - self.rho) * self.draws + 1e-9)

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

    def __str__(self) -> str:
        text = "top-1 kept"
        if self.kind == "score":
            text = f"p >= {self.tau:g}"
        elif self.kind == "robust":
            text += f" and robust >= {self.rho:g} on {self.draws} backgrounds"
            if self.early < self.draws:
                text += f" ({self.early} without a miss)"
            if self.repeats > 1:
                text += f", {self.repeats} times"
        return text + (", also dilated" if self.dilated else "")
