"""Small classifiers of the built-in scenes: the subjects whose decisions the demo and the tests explain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..classifier import Classifier
from .scenes import GRID, SIZE, TILE, Scenes, Variant, make

MEAN, STD = 0.5, 0.25
ALONE = 0.3
# nine digits to read in a mosaic, one of which decides: it takes longer to learn
SCENES: dict[Variant, int] = {"plain": 12_000, "shortcut": 12_000, "mosaic": 24_000, "segments": 12_000}


class Block(nn.Module):
    """Two 3×3 convolutions with a residual connection (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SceneNet(nn.Module):
    """A small ResNet: a stem at half resolution, four stages, global average pooling, one linear layer."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        inputs = (widths[0], *widths[:-1])
        for index, (i, o) in enumerate(zip(inputs, widths, strict=True), 1):
            self.add_module(f"layer{index}", Block(i, o, 1 if index == 1 else 2))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
        return self.fc(x.mean((2, 3)))


def coloured_noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise like x [B,3,H,W] whose grain is one to sixteen pixels, the same in a batch."""
    scale = 2 ** int(torch.randint(5, (), generator=rng))
    h, w = (max(2, side // scale) for side in x.shape[2:])
    noise = torch.randn(*x.shape[:2], h, w, generator=rng)
    return F.interpolate(noise, size=x.shape[2:], mode="bicubic", align_corners=False) if scale > 1 else noise


def augment(x: Tensor, rng: torch.Generator, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ordinary augmentation of [B,3,H,W] in [0,1]: colour, noise, random erasing. Also what was erased, [B,1,H,W].

    centre [B,2]: of ``ALONE`` of the images, all is erased but a window around this place.
    """
    n, _, h, w = x.shape

    def draw(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng)

    contrast, shift = draw(n, 1, 1, 1, low=0.7, high=1.3), draw(n, 3, 1, 1, low=-0.15, high=0.15)
    x = (x - 0.5) * contrast + 0.5 + shift
    rows, cols = torch.arange(h)[None, :, None], torch.arange(w)[None, None, :]
    erased = torch.zeros(n, 1, h, w, dtype=torch.bool)

    def erase(box: Tensor, share: float) -> None:
        nonlocal x
        box = (box & (draw(n, 1, 1) < share)).unsqueeze(1)
        erased.logical_or_(box)
        flat = draw(n, 3, 1, 1)
        x = torch.where(box, flat + draw(n, 1, 1, 1, high=0.35) * coloured_noise(x, rng), x)

    for _ in range(3):
        top, left = draw(n, 1, 1, low=-0.2 * h, high=h), draw(n, 1, 1, low=-0.2 * w, high=w)
        height, width = draw(n, 1, 1, low=0.1 * h, high=0.7 * h), draw(n, 1, 1, low=0.1 * w, high=0.7 * w)
        erase((rows >= top) & (rows < top + height) & (cols >= left) & (cols < left + width), 0.6)
    if centre is not None:
        place = centre[:, :, None, None] + draw(n, 2, 1, 1, low=-0.05 * h, high=0.05 * h)
        reach = draw(n, 2, 1, 1, low=0.15 * h, high=0.35 * h)
        erase(((rows - place[:, 0]).abs() > reach[:, 0]) | ((cols - place[:, 1]).abs() > reach[:, 1]), ALONE)
    sigma = draw(n, 1, 1, 1, high=0.12) * (draw(n, 1, 1, 1) < 0.5)
    return (x + sigma * torch.randn(x.shape, generator=rng)).clamp(0, 1), erased


def crops(scenes: Scenes, side: int, seed: int = 0) -> np.ndarray:
    """A window [N,side,side,3] of each scene around what decides its label (anywhere when nothing does)."""
    rng = np.random.default_rng(seed)
    n, h, w, _ = scenes.images.shape
    out = np.empty((n, side, side, 3), np.uint8)
    for index, middle in enumerate(centres(scenes.strokes, rng)):
        corner = middle - side // 2 + rng.integers(-3, 4, 2)
        top, left = np.clip(corner, 0, (h - side, w - side))
        out[index] = scenes.images[index, top : top + side, left : left + side]
    return out


def centres(strokes: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row and column [2] of the middle of each deciding digit, strokes [N,H,W]; anywhere where there is none."""
    for drawn in strokes:
        rows, cols = np.nonzero(drawn)
        if len(rows):
            yield np.array([rows.min() + rows.max(), cols.min() + cols.max()]) // 2
        else:
            yield rng.integers((0, 0), drawn.shape)


def batches(count: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=rng)
    yield from order[: count - count % size].split(size)


def train(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    batch: int = 32,
    peak_lr: float = 2e-3,
    augmented: bool = True,
    strokes: np.ndarray | None = None,
    none: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Train in place by AdamW with one cosine cycle; uint8 images [N,H,W,3], int labels [N].

    strokes [N,H,W] of deciding digits and none: when augmented, a scene whose digit was mostly erased shows, and is
    labelled, class ``none``, and some scenes show nothing but a window around it.
    """
    rng = torch.Generator().manual_seed(seed)
    middle = None
    if strokes is not None:
        middle = torch.from_numpy(np.stack(list(centres(strokes, np.random.default_rng(seed))))).float()
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    steps = epochs * (len(pixels) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.02)
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        return (
            (step + 1) / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    bar = tqdm(total=steps, desc="classifier", disable=None if progress else True, leave=False)
    mean_loss = math.nan
    for _ in range(epochs):
        for index in batches(len(pixels), batch, rng):
            x = pixels[index].permute(0, 3, 1, 2).float() / 255
            label = targets[index]
            if augmented:
                x, erased = augment(x, rng, None if middle is None else middle[index])
                if none is not None and strokes is not None:
                    digit = torch.from_numpy(strokes[index.numpy()])
                    gone = (digit & erased[:, 0]).sum((1, 2)) > 0.6 * digit.sum((1, 2))
                    label = torch.where(gone, none, label)
            loss = F.cross_entropy(model((x - MEAN) / STD), label, label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            value = loss.item()
            mean_loss = value if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * value
            bar.update()
            bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    bar.close()
    model.eval()
    return {"steps": steps, "loss": mean_loss}


def train_subject(
    variant: Variant,
    *,
    augmented: bool = True,
    count: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SceneNet:
    """A classifier of one scenes variant, trained from nothing on ``count`` scenes, by default as many as it takes.

    A short first phase on crops around the deciding digit ends the plateau that full scenes begin
    with; ``augmented=False`` gives the brittle subject that has never seen noise or erased regions.
    """
    scenes = make(variant, SCENES[variant] if count is None else count, seed=seed, split="train")
    torch.manual_seed(seed)
    model = SceneNet(len(scenes.class_names)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(
        model, crops(scenes, 32, seed), scenes.labels, epochs=2, augmented=False, seed=seed, progress=progress
    )
    # a digit alone is enough, and without one the class is "none": seen so in training
    mosaic = variant == "mosaic"
    train(
        model,
        scenes.images,
        scenes.labels,
        epochs=3,
        augmented=augmented,
        strokes=scenes.strokes if mosaic else None,
        none=scenes.class_names.index("none") if mosaic else None,
        seed=seed + 1,
        progress=progress,
    )
    return model


@torch.no_grad()
def accuracy(model: nn.Module, scenes: Scenes) -> float:
    """Share of scenes classified as labelled."""
    model.eval()
    pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2)
    predicted = torch.cat([model((x.float() / 255 - MEAN) / STD).argmax(1) for x in pixels.split(128)])
    return (predicted == torch.from_numpy(scenes.labels)).float().mean().item()


def classifier(model: SceneNet, variant: Variant = "plain") -> Classifier:
    """A SceneNet with the preprocessing and the labels of its scenes."""
    tiled = variant in ("mosaic", "segments")
    return Classifier(
        model,
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        size=GRID * TILE if tiled else SIZE,
        class_names=("0", "1", "2", "none") if tiled else tuple("0123456789"),
    )


def digits() -> Classifier:
    """Factory for ``--model minexp.data.subjects:digits``: the untrained classifier of plain and shortcut scenes."""
    return classifier(SceneNet(10).to(memory_format=torch.channels_last), "plain")  # type: ignore[call-overload]


def tiles() -> Classifier:
    """Factory for ``--model minexp.data.subjects:tiles``: the untrained classifier of mosaics and segments."""
    return classifier(SceneNet(4).to(memory_format=torch.channels_last), "mosaic")  # type: ignore[call-overload]
