"""What a class score becomes when some units are ablated and the others are kept."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import RequestError
from .baseline import Baseline
from .network import Network, Place
from .program import Edit
from .sites import Site

Metric = Literal["logit", "margin", "log_prob", "contrast"]
DRAWS = 4  # donors that a score under resampling is averaged over
RIVALS = 4  # images of other classes that a contrast is drawn with


def measure(scores: Tensor, label: Tensor, metric: Metric) -> Tensor:
    """The figure m [B] of class scores [B, K] that a circuit is to keep.

    logit: the class's score; margin: the score above the mean of the other classes; log_prob: log softmax;
    contrast: the logit, from which `Ablation` takes what the class gets on images of other classes.
    """
    if metric not in get_args(Metric):
        raise RequestError(f"unknown metric {metric!r}; choose {', '.join(get_args(Metric))}")
    picked = scores.gather(1, label.unsqueeze(1))[:, 0]
    if metric in ("logit", "contrast"):
        return picked
    if metric == "margin":
        return picked - (scores.sum(1) - picked) / max(1, scores.shape[1] - 1)
    return picked - scores.logsumexp(1)


@dataclass(frozen=True, eq=False)
class Pool:
    """Images x [M,C,H,W] with the class [M] that each is given, from which those of other classes are taken."""

    x: Tensor
    label: Tensor

    def rivals(self, label: Tensor, count: int) -> Tensor:
        """For each class the numbers of the first so many images of others [B, count]; RequestError without any."""
        rows = []
        for y in label.tolist():
            other = (self.label != y).nonzero()[:, 0]
            if not len(other):
                raise RequestError("metric contrast needs reference images of other classes; give some")
            rows.append(other[torch.arange(count, device=other.device) % len(other)])
        return torch.stack(rows)


class Ablation:
    """Images with any subset of the nodes kept and the others at their baseline.

    x [B,C,H,W] in [0,1]; label [B]: the class whose score counts. ``values``: every site's activations. ``full``
    [B]: m with every node kept. What lies before the first ablated site is not computed again. Nothing depends on
    which images are in the batch. With ``lean`` the activations are not kept. With a ``pool``, m is the score of
    the class less its mean on images of other classes, under the same ablation: metric contrast.
    """

    def __init__(
        self,
        net: Network,
        x: Tensor,
        label: Tensor,
        baseline: Baseline,
        metric: Metric = "logit",
        *,
        micro_batch: int = 32,
        seed: int = 0,
        lean: bool = False,
        pool: Pool | None = None,
    ) -> None:
        self.net, self.label, self.baseline, self.metric = net, label, baseline, metric
        self.micro_batch, self._number = micro_batch, len(x)
        self._rivals = None if pool is None else len(x) + pool.rivals(label, RIVALS)
        self.x = x if pool is None else torch.cat([x, pool.x])
        self.seeds = [zlib.crc32(image.numpy().tobytes(), seed) for image in self.x.cpu()]
        draws = DRAWS if baseline.donors > 1 else 1
        donors = [torch.randperm(baseline.donors, generator=generator(s))[:draws] for s in self.seeds]
        self._donors = torch.stack(donors).to(x.device)  # [B, draws]
        places = [net.scores] if lean else [net.scores, *(site.place for site in net.sites)]
        with torch.no_grad():
            parts = [_run_together(net, part, places) for part in self.x.split(self.micro_batch)]
        found: dict[Place, Tensor] = {place: torch.cat([part[place] for part in parts]) for place in places}
        scores = found[net.scores]
        self.alone = measure(scores[: len(x)], label, metric)  # without rivals
        self.full = self.alone
        if self._rivals is not None:
            self.full = self.alone - scores[self._rivals].gather(
                2, label.view(-1, 1, 1).expand(-1, RIVALS, 1)
            ).mean((1, 2))
        self.values = {} if lean else found

    @cached_property
    def empty(self) -> Tensor:
        """m [B] with every node ablated."""
        return self.scores(torch.zeros(len(self), self.net.nodes, dtype=torch.bool, device=self.x.device))

    def __len__(self) -> int:
        return self._number

    @torch.no_grad()
    def scores(self, keep: Tensor, rows: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """m [n] when row r of keep, bool [n, nodes], says what is kept of image rows[r] (of image r without rows).

        label [n]: of another class than the image's own.
        """
        rows = self._all(keep) if rows is None else rows
        label = self.label[rows] if label is None else label
        out = [self.full[:0]]
        for part in torch.arange(len(keep), device=rows.device).split(self._at_once):
            out.append(self._averaged(keep[part], rows[part], label[part]))
        return torch.cat(out)

    def faithfulness(self, keep: Tensor, rows: Tensor | None = None) -> Tensor:
        """(m(C) - m(none)) / (m(all) - m(none)) of each row; NaN where all and none score the same."""
        rows = self._all(keep) if rows is None else rows
        return self.relative(self.scores(keep, rows), rows)

    def relative(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Scores on the scale on which m(none) is 0 and m(all) is 1."""
        full, empty = self.full[rows], self.empty[rows]
        same = (full - empty).abs() <= 1e-5 * full.abs().maximum(empty.abs())
        return ((scores - empty) / (full - empty)).masked_fill(same, torch.nan)

    def gradient(self, factors: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """m [n] with each unit between its baseline (factor 0) and its value (1), and the derivative by the factors.

        factors [n, nodes]. Where a factor is 1 the derivative is the sum of (activation - baseline) * gradient.
        """
        rows = self._all(factors) if rows is None else rows
        scores, slopes = [], []
        for part in torch.arange(len(factors), device=rows.device).split(self._at_once):
            leaf = factors[part].detach().requires_grad_(True)
            before = self.net.passes
            with torch.enable_grad():
                m = self._averaged(leaf, rows[part], self.label[rows[part]])
                slopes.append(torch.autograd.grad(m.sum(), leaf)[0])
            self.net.passes += 2 * (self.net.passes - before)  # a backward pass is worth two forward ones
            scores.append(m.detach())
        return torch.cat(scores), torch.cat(slopes)

    def value(self, place: Place, row: int) -> Tensor:
        """The value at a place for one image, nothing ablated."""
        return self.net.take(place, self.values[place], torch.tensor([row], device=self.x.device))

    def without(self, site: Site, row: int) -> Tensor:
        """A site's value for one image with every unit of it ablated."""
        rows = torch.tensor([row], device=self.x.device)
        none = torch.zeros(1, site.units, dtype=torch.bool, device=rows.device)
        return self.mix(site, none, rows)(self.value(site.place, row))

    def mix(self, site: Site, keep: Tensor, rows: Tensor) -> Edit:
        """Ablates the units of a site that keep [n, units] leaves out, in values of those images."""
        return self._mix(site, keep, self._donors[rows, 0])

    def _all(self, keep: Tensor) -> Tensor:
        return torch.arange(len(keep), device=self.x.device)

    @property
    def _at_once(self) -> int:
        return max(1, self.micro_batch // (1 if self._rivals is None else 1 + RIVALS))

    def _averaged(self, factors: Tensor, rows: Tensor, label: Tensor) -> Tensor:
        """m of one micro-batch: over the draws of donors, and less that of the rivals."""
        count = len(rows)
        if self._rivals is not None:
            rivals = self._rivals[rows].flatten()
            factors, label = (torch.cat([t, t.repeat_interleave(RIVALS, 0)]) for t in (factors, label))
            rows = torch.cat([rows, rivals])
        draws = self._donors[rows].T
        m = sum((self._part(factors, rows, d, label) for d in draws), self.full.new_zeros(())) / len(draws)
        return m if self._rivals is None else m[:count] - m[count:].view(count, RIVALS).mean(1)

    def _part(self, factors: Tensor, rows: Tensor, donors: Tensor, label: Tensor) -> Tensor:
        """m of one micro-batch; boolean factors keep or ablate a unit, floating ones interpolate."""
        if len(rows) == 1:  # kernels for one image round differently: it goes beside a copy
            return self._part(*(t.expand(2, *t.shape[1:]) for t in (factors, rows, donors, label)))[:1]
        cut = self.net.by_site(factors)
        touched = [site for site in cut if factors.is_floating_point() or not bool(cut[site].all())]
        known = {self.net.image: self.x[rows]}
        edits = {site.place: self._mix(site, cut[site], donors) for site in touched}
        if self.values and touched:
            first = touched[0]
            for site in self.net.sites[: self.net.sites.index(first) + 1]:
                known[site.place] = self.net.take(site.place, self.values[site.place], rows)
            known[first.place] = edits.pop(first.place)(known[first.place])
        return measure(self.net.run(known, [self.net.scores], edits)[self.net.scores], label, self.metric)

    def _mix(self, site: Site, factors: Tensor, donors: Tensor) -> Edit:
        def mix(value: Tensor) -> Tensor:
            value = value.unflatten(0, (-1, site.each))
            base, share = self.baseline.at(site, value, donors), site.spread(factors, value)
            mixed = (
                share * value + (1 - share) * base if share.is_floating_point() else value.where(share, base)
            )
            return mixed.flatten(0, 1)

        return mix


def _run_together(net: Network, x: Tensor, places: Sequence[Place]) -> dict[Place, Tensor]:
    """Values of images, a single one beside a copy of itself, as in every other run."""
    if len(x) > 1:
        return net.run({net.image: x}, places)
    values = net.run({net.image: x.expand(2, -1, -1, -1)}, places)
    return {
        place: net.take(place, value, torch.zeros(1, dtype=torch.long, device=x.device))
        for place, value in values.items()
    }


def generator(seed: int) -> torch.Generator:
    """A generator of that seed, on the CPU, so that every device draws alike."""
    return torch.Generator().manual_seed(seed)
