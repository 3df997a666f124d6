"""Classifiers whose minimal explanations are known on paper, and a counter of what goes through a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minexp.classifier import Classifier
from minexp.judge import EXACT

TARGET = (5, 9)  # the pixel that RedPixel looks at
SIDE = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it, and their fixtures: tensors this small lose time to threads, minutes under load."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class RedPixel(nn.Module):
    """Class 1 when the red value of one pixel exceeds 1/2, class 0 otherwise; no other pixel matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        red = self.act(self.conv(x))[:, 0, TARGET[0], TARGET[1]]
        return torch.stack([torch.zeros_like(red), 20 * (red - 0.5)], 1)


def red_pixel() -> Classifier:
    """On a black background an image with that pixel red needs that pixel and no other."""
    return Classifier(RedPixel(), size=SIDE, class_names=("no", "red"))


def red_images(n: int, seed: int = 0) -> Tensor:
    """Noise [n,3,16,16] with the decisive pixel pure red."""
    x = 0.4 * torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    x[:, :, TARGET[0], TARGET[1]] = torch.tensor([1.0, 0.0, 0.0])
    return x


class Filters(nn.Module):
    """A random convolution, a squashing and a random linear layer: every pixel matters a little."""

    def __init__(self, classes: int = 4, seed: int = 3) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.Tanh()
        self.head = nn.Linear(4 * SIDE * SIDE, classes)
        with torch.no_grad():
            for parameter, scale in zip(self.parameters(), (0.8, 0.0, 0.25, 0.0), strict=True):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x - 0.5)).flatten(1))


def filters() -> Classifier:
    """A classifier whose answer survives some backgrounds and not others."""
    return Classifier(Filters(), size=SIDE, taps=["conv", "act"])


def noise_images(n: int, seed: int = 0) -> Tensor:
    """Coarse random images [n,3,16,16] in [0,1] that are whole 1/255ths, as decoded images are."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, SIDE // 4, SIDE // 4, generator=rng)
    x = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return ((x + 0.1 * torch.rand(x.shape, generator=rng)) / 1.1 * 255).round() / 255


def random_masks(n: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """Blobby masks [n,1,16,16]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, SIDE // 2, SIDE // 2, generator=rng) < share
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Count:
    """Images that went through the model so far."""

    images = 0


@contextmanager
def counted(classifier: Classifier) -> Iterator[Count]:
    """Count every image the classifier's model is given, but for the copies that a few go beside.

    Those a gradient is asked of count twice, for the way back.
    """
    count = Count()

    def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        few = (n for n in range(1, EXACT) if len(x) in (2 * n, 4 * n) and torch.equal(x[:n], x[n : 2 * n]))
        images = next(few, len(x))
        count.images += images * (2 if x.requires_grad and torch.is_grad_enabled() else 1)

    handle = classifier.model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def state(model: nn.Module) -> list[tuple[bool, list[bool], int]]:
    """What an explanation must leave as it was: each module's mode, its parameters' requires_grad, its hooks."""
    return [
        (
            module.training,
            [p.requires_grad for p in module.parameters(recurse=False)],
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
        )
        for module in model.modules()
    ]
