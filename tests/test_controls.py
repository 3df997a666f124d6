"""The wrong-class control, on a model that shows what can be proven of each class."""

import torch
from tiny_models import SIDE, noise_images
from tiny_models import one_thread as one_thread
from torch import Tensor, nn

from minexp.backgrounds import Backgrounds
from minexp.classifier import Classifier
from minexp.controls import wrong_class
from minexp.judge import Judge
from minexp.predicate import Predicate
from minexp.refine import Refinement

RED, GREEN = (slice(4, 8), slice(8, 12)), (slice(10, 14), slice(2, 6))


class TwoPatches(nn.Module):
    """Class 0 by how red one patch is, class 1 by how green another, class 2 where neither is."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        red, green = (20 * x[:, c, p[0], p[1]].mean((1, 2)) for c, p in enumerate((RED, GREEN)))
        return torch.stack([red, green, torch.full_like(red, 5.0)], 1)


def images(red: float, green: float) -> Tensor:
    x = 0.2 * noise_images(4)
    x[:, 0, RED[0], RED[1]], x[:, 1, GREEN[0], GREEN[1]] = red, green
    return x


def controlled(x: Tensor, pixels: int) -> list[bool]:
    classifier = Classifier(TwoPatches(), size=SIDE, taps=["act"])
    judge = Judge(classifier, Predicate("top1"), Backgrounds(torch.zeros(3), noise_images(4, seed=50)))
    masks = (torch.arange(SIDE * SIDE) < pixels).view(1, 1, SIDE, SIDE).expand(len(x), -1, -1, -1)
    return wrong_class(judge, x, masks, Refinement(steps=60)).tolist()


def test_a_second_class_with_evidence_of_its_own_is_proven() -> None:
    assert controlled(images(red=1.0, green=0.6), pixels=25) == [True] * 4


def test_a_class_without_evidence_is_not() -> None:
    assert controlled(images(red=1.0, green=0.1), pixels=25) == [False] * 4


def test_what_an_image_without_a_pixel_is_given_is_no_rival() -> None:
    """Class 2 is second, and any mask without the red patch "proves" it: the control asks about class 1 instead."""
    x = images(red=1.0, green=0.15)
    assert TwoPatches()(x).argsort(1, descending=True)[:, :2].tolist() == [[0, 2]] * 4
    assert controlled(x, pixels=25) == [False] * 4
    # where class 1 is second, it is asked about as well
    assert controlled(images(red=0.5, green=0.45), pixels=25) == [True] * 4
