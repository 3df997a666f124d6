"""Selective dependence: does an explainer name the tile that decides, and the tile the model looks at?

After Pandey, Vashisht and Ramaswamy, *On the Interpretability of Attention Networks* (arXiv 2212.14776): images of m
tiles, one of which (a foreground class) decides the label. Attention classifiers and a plain CNN are the subjects; an
explainer's mask takes the place of attention. Focus is true where the tile with most of the mask is the foreground one.
Rows: focus true or false × prediction true or false (FTPT, FFPT, FTPF, FFPF), agreement with the truth and with the
model: the tile is the one whose removal costs the class most (`occlusion`), and alone it keeps the class (`alone`),
both exact. `leak` trains on backgrounds that give the class away: a model that
looks at them is right for the wrong tile, and a faithful explainer has to say so.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minexp.certify import Predicate
from minexp.classifier import Classifier
from minexp.explanation import explain
from minexp.minimise import Minimisation
from minexp.objective import preset
from minexp.refine import Refinement

COLUMNS = (
    *("subject", "m", "accuracy", "explainer", "FTPT", "FFPT", "FTPF", "FFPF"),
    *("truth", "occlusion", "alone", "elsewhere", "images", "seconds"),
)
GRIDS = {4: (2, 2), 9: (3, 3), 20: (4, 5), 50: (5, 10)}
TILE = 8  # pixels
CLASSES, CLUSTERS = 3, 10  # classes 0..2 are foreground, clusters 3..9 background
SUBJECTS = ("softmax", "sparsemax", "entropy", "cnn")
Attention = Literal["softmax", "sparsemax", "entropy"]


@dataclass(frozen=True)
class Mosaics:
    """Images float [N,3,H,W] in [0,1], labels [N] and the deciding tile [N] on a grid of ``shape``."""

    images: Tensor
    labels: Tensor
    tile: Tensor
    shape: tuple[int, int]


def mosaics(n: int, m: int, seed: int, *, leak: bool = False) -> Mosaics:
    """Tiles of one colour with noise, ten clusters on a circle of hues. leak: two clusters of background a class."""
    rng = torch.Generator().manual_seed(seed)
    labels, tile = (torch.randint(high, (n,), generator=rng) for high in (CLASSES, m))
    clusters = torch.randint(CLASSES, CLUSTERS, (n, m), generator=rng)
    if leak:
        clusters = CLASSES + 2 * labels[:, None] + torch.randint(2, (n, m), generator=rng)
    clusters = torch.where(torch.arange(m) == tile[:, None], labels[:, None], clusters)
    # foreground classes lie between background clusters, so that no single channel tells them
    angle = 2 * math.pi * (7 * clusters % CLUSTERS) / CLUSTERS
    points = 0.5 + 0.35 * torch.stack([angle.cos(), angle.sin()], -1)
    points = (points + 0.02 * torch.randn(points.shape, generator=rng)).clamp(0, 1)
    colour = torch.cat([points, torch.full((n, m, 1), 0.5)], -1)
    shape = GRIDS[m]
    grid = colour.view(n, *shape, 3).permute(0, 3, 1, 2)
    images = grid.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)
    return Mosaics(images, labels, tile, shape)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of scores [B,m] onto the simplex (Martins and Astudillo, arXiv 1602.02068)."""
    ranked = scores.sort(1, descending=True).values
    sums = ranked.cumsum(1) - 1
    count = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    size = (ranked * count > sums).sum(1, keepdim=True)
    return (scores - sums.gather(1, size - 1) / size).clamp_min(0)


class AttentionNet(nn.Module):
    """Tiles are embedded and scored, averaged by attention, and the average is classified."""

    def __init__(self, attention: Attention, width: int = 24) -> None:
        super().__init__()
        self.kind = attention
        self.embed = nn.Sequential(
            nn.Conv2d(3, width, TILE, TILE), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()
        )
        self.focus = nn.Conv2d(width, 1, 1)
        self.classify = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [B,m] and embeddings [B,width,m]."""
        tiles = self.embed((x - 0.5) / 0.25)
        scores = self.focus(tiles).flatten(1)
        return sparsemax(scores) if self.kind == "sparsemax" else scores.softmax(1), tiles.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        weights, tiles = self.attend(x)
        return self.classify((tiles * weights[:, None]).sum(2))


class PlainNet(nn.Module):
    """A CNN with global average pooling: every tile is read alike, none is chosen."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.Conv2d(3, width, TILE, TILE),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, CLASSES, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.read((x - 0.5) / 0.25).flatten(2).sum(2)


def subject(kind: str, m: int, *, leak: bool = False, steps: int = 500, seed: int = 0) -> nn.Module:
    """A trained subject. "entropy" is softmax attention with the entropy of its weights as a penalty."""
    torch.manual_seed(seed)
    model: Any = PlainNet() if kind == "cnn" else AttentionNet(kind)  # type: ignore[arg-type]
    data = mosaics(4000, m, seed=seed + 1, leak=leak)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(data.images), (128,), generator=rng)
        x = data.images[index]
        # tiles greyed at random: what removed ones become is then not foreign to the subject
        gone = torch.rand(128, m, generator=rng) < torch.rand(128, 1, generator=rng)
        if not leak:  # what is left has to name the class
            gone &= torch.arange(m) != data.tile[index, None]
        x = torch.where(_spread(gone, data.shape), 0.5, x)
        x = (x + 0.05 * torch.rand(128, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)).clamp(
            0, 1
        )
        loss = F.cross_entropy(model(x), data.labels[index])
        if kind == "entropy":
            weights, _ = model.attend(x)
            loss = loss - 0.2 * (weights * weights.clamp_min(1e-9).log()).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def _spread(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pixels [N,1,H,W] of tiles [N,m]."""
    return tiles.view(len(tiles), 1, *shape).repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)


def per_tile(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sum of a map [N,H,W] over each tile: [N,m]."""
    return F.avg_pool2d(maps[:, None].float(), TILE).flatten(1)


def attention_map(model: nn.Module, data: Mosaics, label: Tensor) -> Tensor:
    with torch.no_grad():
        return model.attend(data.images)[0]  # type: ignore[operator]


def occlusion(model: nn.Module, data: Mosaics, label: Tensor) -> Tensor:
    """Exact: what the class's log-probability loses when one tile takes the mean colour, [N,m]."""
    n, m = len(label), data.shape[0] * data.shape[1]
    one = _spread(torch.eye(m) > 0, data.shape)
    with torch.no_grad():
        whole = model(data.images).log_softmax(1).gather(1, label[:, None])
        lost = [
            model(torch.where(tile, 0.5, data.images)).log_softmax(1).gather(1, label[:, None])
            for tile in one
        ]
    return (whole - torch.cat(lost, 1)).view(n, m)


def alone(model: nn.Module, data: Mosaics, label: Tensor) -> Tensor:
    """Exact: does one tile keep the class when all others take the mean colour? Bool [N,m]."""
    m = data.shape[0] * data.shape[1]
    with torch.no_grad():
        kept = [
            model(torch.where(tile, data.images, 0.5)).argmax(1) == label
            for tile in _spread(torch.eye(m) > 0, data.shape)
        ]
    return torch.stack(kept, 1)


def gradient(model: nn.Module, data: Mosaics, label: Tensor) -> Tensor:
    """Gradient × (input − mean colour) of the class's score."""
    x = data.images.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(model(x).gather(1, label[:, None]).sum(), x)
    return per_tile((g * (x - 0.5)).sum(1).detach(), data.shape)


def minimal(model: nn.Module, data: Mosaics, label: Tensor) -> Tensor:
    """minexp without a masker: per-image refinement, then minimised to single tiles.

    Colour is the evidence here, and a random background would be evidence too: removed tiles are grey, as in occlusion.
    """
    height, width = data.images.shape[2:]
    subject = Classifier(model, size=(height, width))
    found = explain(
        subject,
        data.images,
        predicate=Predicate("score", tau=0.9),
        effort="minimal",
        reference=data.images[:16],
        fresh=1,
        background=(0.5, 0.5, 0.5),
        refinement=Refinement(
            steps=30, stride=TILE, check=30, objective=replace(preset("default"), rob=0, soft=0.5)
        ),
        minimisation=Minimisation(cell=TILE),
    )
    return per_tile(found.masks, data.shape)


EXPLAINERS: dict[str, Callable[[nn.Module, Mosaics, Tensor], Tensor]] = {
    "attention": attention_map,
    "gradient": gradient,
    "occlusion": occlusion,
    "minexp": minimal,
}


def table(
    tiles: Tensor, data: Mosaics, predicted: Tensor, model_tile: Tensor, enough: Tensor
) -> dict[str, float]:
    """Shares of images by focus and prediction, and agreement of the explainer's top tile; tiles [N,m]."""
    focus = tiles.argmax(1)
    true, right = focus == data.tile, predicted == data.labels

    def share(flags: Tensor) -> float:
        return float(flags.float().mean())

    return {
        "FTPT": share(true & right),
        "FFPT": share(~true & right),
        "FTPF": share(true & ~right),
        "FFPF": share(~true & ~right),
        "truth": share(true),
        "occlusion": share(focus == model_tile),
        "alone": share(enough.gather(1, focus[:, None])[:, 0]),
        "elsewhere": share(model_tile != data.tile),
    }


def measure(
    quiet: bool,
    *,
    images: int = 96,
    sizes: Sequence[int] = tuple(GRIDS),
    subjects: Sequence[str] = SUBJECTS,
    seed: int = 77,
) -> list[dict[str, Any]]:
    """Rows for every m and subject, and for a softmax subject trained on leaking backgrounds."""
    rows: list[dict[str, Any]] = []
    for m in sizes:
        for kind, leak in [*((kind, False) for kind in subjects), ("softmax", True), ("cnn", True)]:
            started = time.perf_counter()
            model = subject(kind, m, leak=leak)
            data = mosaics(images, m, seed=seed, leak=leak)
            with torch.no_grad():
                predicted = model(data.images).argmax(1)
            model_tile = occlusion(model, data, predicted).argmax(1)
            enough = alone(model, data, predicted)
            name = f"{kind}, leak" if leak else kind
            about = {"subject": name, "m": m, "accuracy": float((predicted == data.labels).float().mean())}
            trained = time.perf_counter() - started
            for explainer, call in EXPLAINERS.items():
                if explainer == "attention" and kind == "cnn":
                    continue
                started = time.perf_counter()
                found = table(call(model, data, predicted), data, predicted, model_tile, enough)
                seconds = time.perf_counter() - started
                rows.append({**about, "explainer": explainer, **found, "images": images, "seconds": seconds})
            if not quiet:
                print(f"mosaic: {name}, m = {m}: {np.round(trained, 1)} s to train", file=sys.stderr)
    return rows
