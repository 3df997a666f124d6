"""What ablated units become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import RequestError
from .network import Network, Place
from .sites import Site

Kind = Literal["mean", "zero", "resample", "blank"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DONORS = 16  # reference images that resampled activations are taken from


@dataclass(frozen=True, eq=False)
class Baseline:
    """Values that stand in for ablated units, for one image at each site, or for several donors (resample).

    mean: over reference images, position by position. zero. resample: the activations of one reference image.
    blank: those of an image with every pixel removed. Under zero and mean a unit that is kept, but whose inputs are
    all ablated, computes something no image led to; under blank and resample it is what the baseline says.
    """

    kind: Kind
    values: dict[Place, Tensor]
    donors: int = 1

    def at(self, site: Site, value: Tensor, donors: Tensor) -> Tensor:
        """The baseline to set beside a value [n, each, ...]; donors [n]: which one each row takes."""
        if self.kind == "zero":
            return torch.zeros_like(value[:1])
        kept = self.values[site.place].unflatten(0, (-1, site.each))
        return kept if self.donors == 1 else kept[donors]


@torch.no_grad()
def make_baseline(
    net: Network, kind: Kind, *, reference: Tensor | None, blank: Tensor, micro_batch: int = 32
) -> Baseline:
    """A network's baseline. reference: images [M,C,H,W] in [0,1]; blank [1,C,1,1]: the colour of removed pixels.

    Raises RequestError for an unknown kind, or without the reference images that mean and resample rest on.
    """
    if kind not in KINDS:
        raise RequestError(f"unknown ablation {kind!r}; choose {', '.join(KINDS)}")
    places = [site.place for site in net.sites]
    if kind == "zero":
        return Baseline(kind, {})
    if kind == "blank":
        x = blank.expand(1, -1, *net.input_shape[1:]).contiguous()
        return Baseline(kind, net.run({net.image: x}, places))
    if reference is None or len(reference) < 2:
        raise RequestError(
            f"{kind} ablation needs at least 2 reference images; give them, or choose blank or zero"
        )
    if kind == "resample":
        chosen = reference[:: max(1, len(reference) // DONORS)][:DONORS]
        return Baseline(kind, net.run({net.image: chosen}, places), len(chosen))
    sums: dict[Place, Tensor] = {}
    for x in reference.split(micro_batch):
        values = net.run({net.image: x}, places)
        for site in net.sites:
            total = values[site.place].unflatten(0, (-1, site.each)).sum(0, dtype=torch.float64)
            sums[site.place] = total + sums.get(site.place, 0)
    dtype = reference.dtype
    return Baseline(kind, {place: (total / len(reference)).to(dtype) for place, total in sums.items()})
