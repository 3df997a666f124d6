"""How circuits are read and tested."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import RequestError
from .ablation import Metric
from .baseline import Kind
from .examine import SIZES
from .network import Level
from .ranking import NECESSITY, By

Mode = Literal["exact", "gradient", "paper"]
RANKED_BY: dict[Mode, By] = {"exact": "pruned", "gradient": "gradient", "paper": "energy"}


@dataclass(frozen=True)
class Settings:
    """How circuits are read and tested.

    mode: exact (nodes by pruning, edges by ablating their source), gradient (both to first order, from one forward
    and backward pass) or paper (as published). level: every layer, or the tapped stages alone (paper: always).
    rank_by: how nodes are ordered, in place of the mode's own way. necessity: weight, in pruning, of what
    m loses without the circuit, beside what the circuit keeps of it. ablation: what units outside become; None: mean
    where there are reference images, else blank. metric: the figure a circuit has to keep; None: log_prob, or the logit
    where the model's outputs are no classes that rule each other out. sizes: shares of
    the nodes that are tested. size: that of the circuit; None: the smallest of the sizes that is 0.8 faithful. fan_in:
    edges kept into each unit. stream_units: units drawn of each residual stream. controls: random circuits of the same
    size; curve_controls: of each size. members: nodes, the first in rank, whose own effect is measured.
    Raises RequestError for values that mean nothing.
    """

    mode: Mode = "exact"
    level: Level = "layer"
    rank_by: By | None = None
    necessity: float = NECESSITY
    ablation: Kind | None = None
    metric: Metric | None = None
    sizes: tuple[float, ...] = SIZES
    size: float | None = None
    fan_in: int = 4
    stream_units: int = 8
    controls: int = 20
    curve_controls: int = 0
    members: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise RequestError(f"unknown mode {self.mode!r}; choose {', '.join(get_args(Mode))}")
        shares = (*self.sizes, *(() if self.size is None else (self.size,)))
        if not self.sizes or not all(0 < share <= 1 for share in shares):
            raise RequestError(
                f"sizes {', '.join(map(str, shares))}; give shares of the nodes, above 0 and at most 1"
            )
        if not 0 <= self.necessity < math.inf:
            raise RequestError(f"necessity {self.necessity}; give a weight of at least 0")
        if self.fan_in < 1 or min(self.controls, self.curve_controls, self.members, self.stream_units) < 0:
            raise RequestError("fan_in is at least 1; stream_units, controls and members are at least 0")

    @property
    def by(self) -> By:
        """How nodes are ordered."""
        return self.rank_by or RANKED_BY[self.mode]
