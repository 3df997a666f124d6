"""A classifier and a masker of small mosaics, trained once for all tests that need real ones."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from minexp.classifier import Classifier
from minexp.data import scenes
from minexp.data.subjects import MEAN, STD, SceneNet, train
from minexp.masker import Masker
from minexp.objective import Objective
from minexp.training import fit

STRIDE = 3  # tiles of 24 pixels become tiles of 8: flat colours lose nothing


@dataclass(frozen=True)
class Tiles:
    """The classifier, held-out images x [N,3,24,24] with their labels and deciding tiles, and the training images."""

    classifier: Classifier
    x: Tensor
    labels: Tensor
    truth: np.ndarray
    images: np.ndarray

    @property
    def decided(self) -> np.ndarray:
        """Images that have a deciding tile."""
        return self.truth.any((1, 2))


def _small(n: int, split: scenes.Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = scenes.make("segments", n, split=split)
    picked = slice(STRIDE // 2, None, STRIDE)
    return np.ascontiguousarray(data.images[:, picked, picked]), data.labels, data.truth[:, picked, picked]


@cache
def tiles() -> Tiles:
    """A small ResNet of segment mosaics at a third of their size."""
    images, labels, _ = _small(3000, "train")
    torch.manual_seed(0)
    model = SceneNet(4, (8, 16, 32, 64))
    train(model, images, labels, epochs=6, augmented=True, seed=0)
    held_out, truths, truth = _small(100, "test")
    classifier = Classifier(
        model, mean=(MEAN,) * 3, std=(STD,) * 3, size=24, class_names=("0", "1", "2", "none")
    )
    x = torch.from_numpy(held_out).permute(0, 3, 1, 2).float() / 255
    return Tiles(classifier, x, torch.from_numpy(truths), truth, images)


@cache
def masker() -> Masker:
    """A masker of it: soft first, then hard."""
    subject = tiles()
    objective = Objective(act=1.0, ce=1.0, kl=0.5, area=8.0, crisp=0.2, tv=0.5, rob=2.0, dual=False, soft=0.6)
    return fit(subject.classifier, subject.images, objective=objective, steps=150, batch=32, progress=False)


def share_inside(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of each mask that lies in the deciding tile."""
    return (masks & truth).sum((1, 2)) / np.maximum(1, masks.sum((1, 2)))
