"""A classifier small enough to know its answers: which colour has the upper half of the image, or is it dark?"""

import torch
from torch import Tensor, nn

from minexp.classifier import Classifier

SIZE = 32
NAMES = ("red", "green", "blue", "dark")


class Colour(nn.Module):
    """Mean colour of the upper half, through a convolution with identity weights, to four scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.head = nn.Linear(3, 4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            self.conv.bias.zero_()  # type: ignore[union-attr]
            self.head.weight.copy_(
                20 * torch.tensor([[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1], [-0.4] * 3])
            )
            self.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 12.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x))[:, :, : x.shape[2] // 2].mean((2, 3)))


def classifier() -> Classifier:
    """Upper half red, green, blue or (mean below half of white) dark."""
    return Classifier(Colour(), size=SIZE, class_names=NAMES)


def other() -> Classifier:
    """The same with another weight, so that nothing made for the first fits."""
    result = classifier()
    with torch.no_grad():
        result.model.head.bias[0] += 0.5  # type: ignore[index, operator]
    return result
