"""The stages of a fast explanation as plain data: which evaluations are asked, in which order, and what follows.

Made from the torch path's own objects and constants, and all that the explainer graph knows of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..families import POOL, RANDOM
from ..intervals import wilson

Shown = Literal["image", "mask", "complement", "dilated"]
DEFAULT = "default"  # the background of one colour


@dataclass(frozen=True)
class Check:
    """One evaluation: what is shown of the image, on draw ``number`` of a family of backgrounds."""

    shown: Shown
    background: str = DEFAULT
    number: int = 0


@dataclass(frozen=True)
class Plan:
    """The search for a mask and its certificate.

    kind, rho, tau: the predicate's. draws, misses: how many backgrounds it asks for and how many may fail, at the
    first attempt and at each enlargement. fresh: draws a family in the certificate, of ``families``. wave:
    evaluations of an image asked at once. threshold: of the probabilities; growth, bisections: of a mask that fails;
    enlarge: of a mask that fresh draws contradict. texts: the predicate in words, an attempt each.
    """

    kind: Literal["top1", "score", "robust"]
    rho: float
    tau: float
    draws: tuple[int, ...]
    misses: tuple[int, ...]
    families: tuple[str, ...]
    fresh: int
    wave: int
    threshold: float
    growth: float
    bisections: int
    enlarge: float
    texts: tuple[str, ...]

    @property
    def predicate(self) -> tuple[Check, ...]:
        """Checks of a mask, in the order asked: the default background, then the draws of the last attempt."""
        draws = max(self.draws) if self.kind == "robust" else 0
        random = (Check("mask", RANDOM[n % len(RANDOM)], n // len(RANDOM)) for n in range(draws))
        return (Check("mask"), *random)

    @property
    def certificate(self) -> tuple[Check, ...]:
        """Checks of the mask found: three probes, then the fresh draws, numbered from the image's own first."""
        probes = (Check("mask"), Check("complement"), Check("dilated"))
        return (*probes, *(Check("mask", family, n) for family in self.families for n in range(self.fresh)))

    @property
    def pools(self) -> dict[tuple[str, str], int]:
        """How many draws of (purpose, family) there are."""
        asked = max(check.number for check in self.predicate) + 1
        predicate = {("predicate", family): asked for family in RANDOM if len(self.predicate) > 1}
        return predicate | {("certificate", family): POOL for family in self.families}

    @property
    def needed(self) -> int:
        """Fresh training draws that have to keep the class lest they contradict the predicate."""
        n = self.fresh * sum(family in RANDOM for family in self.families)
        if self.kind != "robust":
            return 0
        return next((hits for hits in range(n + 1) if wilson(hits, n)[1] >= self.rho), n + 1)
