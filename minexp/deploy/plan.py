"""The stages of a fast explanation as plain data: which evaluations are asked, in which order, and what follows.

Made from the torch path's own objects and constants, and all that the explainer graph knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

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
class Sets:
    """The random backgrounds a predicate asks for: ``repeats`` sets of ``draws``.

    Of each set ``misses`` may fail, and its first ``early`` are enough when none does.
    """

    repeats: int
    draws: int
    early: int
    misses: int


@dataclass(frozen=True)
class Number:
    """One number of an image that has to stay, in place of the class with the highest score.

    of: what becomes of the scores before ``column`` is taken. keep: the share of the whole image's number that has to
    be left, or tolerance: by how much it may fall; where ``both_ways``, it may rise by no more either.
    """

    column: int
    of: Literal["softmax", "sigmoid", "scores"]
    keep: float
    tolerance: float | None = None
    both_ways: bool = False


@dataclass(frozen=True)
class Plan:
    """The search for a mask and its certificate.

    kind, rho, tau, dilated: the predicate's. sets: its random backgrounds, at the first attempt and at each
    enlargement. fresh: draws a family in the certificate, of ``families``. wave: evaluations of an image asked at
    once. threshold: of the probabilities; start, growth, bisections, enlarge, hints: of the repair (`minexp.repair`).
    text: the predicate in words. number: what is explained where it is not the class with the highest score.
    """

    kind: Literal["top1", "score", "robust"]
    rho: float
    tau: float
    dilated: bool
    sets: tuple[Sets, ...]
    families: tuple[str, ...]
    fresh: int
    wave: int
    threshold: float
    start: float
    growth: float
    bisections: int
    enlarge: float
    hints: bool
    text: str
    number: Number | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """What `dataclasses.asdict` made of a plan. Raises TypeError or KeyError for anything else."""
        sets = tuple(Sets(**one) for one in fields["sets"])
        number = None if fields["number"] is None else Number(**fields["number"])
        return cls(**{**fields, "sets": sets, "families": tuple(fields["families"]), "number": number})

    @property
    def settings(self) -> dict[str, Any]:
        """The constants of the graph that may be set to other values once it is written, by name."""
        given: dict[str, Any] = {"minexp.threshold": np.float32(self.threshold)}
        if self.kind == "score":
            given["minexp.tau"] = np.float32(self.tau)
        if self.kind == "robust":
            given["minexp.misses"] = np.array([[sets.misses] for sets in self.sets], np.float32)
            given["minexp.needed"] = np.int64(self.needed)
        return given

    @property
    def plain(self) -> tuple[Check, ...]:
        """Checks on the default background that a mask has to pass."""
        return (Check("mask"), Check("dilated")) if self.dilated else (Check("mask"),)

    @property
    def predicate(self) -> tuple[Check, ...]:
        """Checks of a mask, in their order: the plain ones, then the draws, the families in turn."""
        draws = max(s.repeats * s.draws for s in self.sets) if self.kind == "robust" else 0
        random = (Check("mask", RANDOM[n % len(RANDOM)], n // len(RANDOM)) for n in range(draws))
        return (*self.plain, *random)

    @property
    def certificate(self) -> tuple[Check, ...]:
        """Checks of the mask found: two probes, then the fresh draws, numbered from the image's own first."""
        probes = (Check("complement"), Check("dilated"))
        return (*probes, *(Check("mask", family, n) for family in self.families for n in range(self.fresh)))

    @property
    def pools(self) -> dict[tuple[str, str], int]:
        """How many draws of (purpose, family) there are."""
        asked = max(check.number for check in self.predicate) + 1
        random = RANDOM if len(self.predicate) > len(self.plain) else ()
        return {("predicate", family): asked for family in random} | {
            ("certificate", family): POOL for family in self.families
        }

    @property
    def needed(self) -> int:
        """Fresh training draws that have to keep the class lest they contradict the predicate."""
        n = self.fresh * sum(family in RANDOM for family in self.families)
        if self.kind != "robust":
            return 0
        return next((hits for hits in range(n + 1) if wilson(hits, n)[1] >= self.rho), n + 1)
