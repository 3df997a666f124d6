"""A classifier with a planted path: the channels that can carry a scene's corner patch are known beforehand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from .scenes import PATCH, SIZE, Scenes, make
from .subjects import MEAN, STD, train

WIDTHS = (16, 32, 64, 128)
PLANTED = 4  # one in so many channels of each layer is on the planted path


class Apart(nn.Conv2d):
    """A convolution whose first ``inside`` inputs reach only the first quarter of its outputs, the others the rest."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, inside: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        first = torch.arange(outputs)[:, None] < outputs // PLANTED
        same = first == (torch.arange(inputs)[None] < inside)
        self.register_buffer("mask", same[:, :, None, None].float())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, None, self.stride, self.padding)


class PlantedBlock(nn.Module):
    """A residual block that keeps the two paths apart."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Apart(inputs, outputs, 3, stride, inputs // PLANTED), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = Apart(outputs, outputs, 3, 1, outputs // PLANTED), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            skip = Apart(inputs, outputs, 1, stride, inputs // PLANTED)
            self.shortcut = nn.Sequential(skip, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PlantedNet(nn.Module):
    """A small ResNet of two paths that meet only in the last layer.

    The first quarter of each layer's channels sees the four corners of the image alone, the others all but these.
    """

    corner: Tensor

    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        corner = torch.zeros(1, 1, SIZE, SIZE)
        for rows in (slice(0, PATCH), slice(SIZE - PATCH, SIZE)):
            for columns in (slice(0, PATCH), slice(SIZE - PATCH, SIZE)):
                corner[..., rows, columns] = 1
        self.register_buffer("corner", corner)
        self.stem = nn.Sequential(Apart(6, widths[0], 3, 2, 3), nn.BatchNorm2d(widths[0]), nn.ReLU())
        for number, (i, o) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True), 1):
            self.add_module(f"layer{number}", PlantedBlock(i, o, 1 if number == 1 else 2))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x * self.corner, x * (1 - self.corner)], 1)
        for stage in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
        return self.fc(x.mean((2, 3)))


def train_planted(*, count: int = 6000, epochs: int = 3, seed: int = 0, progress: bool = False) -> PlantedNet:
    """The network trained on scenes whose corner patch names the class in 95 % of the images."""
    scenes = make("shortcut", count, seed=seed, split="train")
    torch.manual_seed(seed)
    model = PlantedNet()
    train(model, scenes.images, scenes.labels, epochs=epochs, augmented=False, seed=seed, progress=progress)
    return model


def planted_classifier(model: PlantedNet) -> Classifier:
    """The network with the preprocessing and the labels of its scenes."""
    return Classifier(model, mean=(MEAN,) * 3, std=(STD,) * 3, size=SIZE, class_names=tuple("0123456789"))


@torch.no_grad()
def decided_by_patch(model: PlantedNet, scenes: Scenes) -> np.ndarray:
    """Where the corners alone give the class and the image without them another one: bool [N]."""
    classifier, found = planted_classifier(model), []
    for images in torch.from_numpy(scenes.images).split(100):
        x, grey = images.permute(0, 3, 1, 2).float() / 255, torch.tensor(MEAN)
        label = classifier.logits(x).argmax(1)
        inside, outside = (
            classifier.logits(torch.where(m, x, grey)).argmax(1)
            for m in (model.corner > 0, model.corner == 0)
        )
        found.append((inside == label) & (outside != label))
    return torch.cat(found).numpy()


def planted_share(units: int) -> int:
    """How many of a layer's first units are on the planted path."""
    return units // PLANTED
