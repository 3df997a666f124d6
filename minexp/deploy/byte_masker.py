"""The masker as 8-bit arithmetic is fast at it: the bytes of an image as they lie, channels in whole vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masker import Architecture, Masker

ORIGIN = 128  # the byte that stands for 0, with which the first convolution pads: grey, up to half a byte
LANES = 16  # outputs that ONNX Runtime's 8-bit convolution computes at once; with fewer it takes a slow path


def byte_values(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What `ByteMasker` takes, of pixels of any shape."""
    return (pixels.astype(np.float32) - ORIGIN) / np.float32(255)


class ByteMasker(nn.Module):
    """A masker's function of values [B,H,W,C], (byte - ORIGIN) / 255, with the speed of 8 bits in mind.

    Channels of weight 0 fill its narrow layers, and its first convolution reads groups of pixels (`FirstConvolution`).
    """

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self.wide = widened(masker)
        self.rest = self.wide.stem[1:]
        # grouped columns fill vectors by themselves, and are only widened where a skip hands them on
        narrow = masker.architecture.stride == 4
        self.first = FirstConvolution((masker if narrow else self.wide).stem[0])
        if narrow:
            after = self.rest[0][0]  # type: ignore[index]
            after.weight = nn.Parameter(after.weight[:, : self.first.outputs].detach())

    def forward(self, values: Tensor) -> Tensor:
        """Logits on the masker's grid, [B,1,h,w]."""
        return self.wide.from_stem(self.rest(self.first(values)))


class FirstConvolution(nn.Module):
    """A masker's first layer, 3×3 of stride 2 with its normalisations, of values [B,H,W,C]: [B,O,⌈H/2⌉,⌈W/2⌉].

    Three input channels fill no vector, so a row is read in words of ``side`` values, and one position of the
    convolution gives the outputs of ``side`` neighbouring columns.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        conv, norm, _relu = layer.children()
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel = conv.weight * scale.reshape(-1, 1, 1, 1) / 0.25
            bias = norm.bias - norm.running_mean * scale + kernel.sum((1, 2, 3)) * (ORIGIN / 255 - 0.5)
        self.outputs, self.channels = kernel.shape[:2]
        self.side = (
            8 if self.outputs <= 12 else 4
        )  # what keeps the outputs of a position within three vectors
        self.before = -(-self.channels // self.side)  # words that hold the pixel left of a group
        self.weight = nn.Parameter(self._grouped(kernel))
        self.bias = nn.Parameter(bias.repeat(self.side // 2))

    def _grouped(self, kernel: Tensor) -> Tensor:
        """[side/2·O, side, 3, before+C] of weights [O,C,3,3]."""
        out, side = (
            kernel.new_zeros(self.side // 2, self.outputs, self.side, 3, self.before + self.channels),
            self.side,
        )
        for position in range(side // 2):
            for tap in range(3):
                for channel in range(self.channels):
                    word, value = divmod((2 * position + tap - 1) * self.channels + channel, side)
                    out[position, :, value, :, self.before + word] = kernel[:, channel, :, tap]
        return out.flatten(0, 1)

    def forward(self, values: Tensor) -> Tensor:
        count, height, width, channels = values.shape
        rows = F.pad(values, (0, 0, 0, -width % self.side))
        words = rows.reshape(count, height, -1, self.side).permute(0, 3, 1, 2)
        words = F.pad(words, (self.before, 0, 1, 1))
        groups = F.conv2d(words, self.weight, self.bias, stride=(2, channels)).relu().permute(0, 2, 3, 1)
        columns = groups.reshape(count, groups.shape[1], -1, self.outputs)[:, :, : (width + 1) // 2]
        return columns.permute(0, 3, 1, 2)


def widened(masker: Masker) -> Masker:
    """The same function with at least LANES channels in each layer, those that are new being 0."""
    own = masker.architecture
    wide = Masker(
        Architecture(own.channels, tuple(max(LANES, width) for width in own.widths), own.stride)
    ).eval()
    state = masker.state_dict()
    wide.reference = state["reference"]
    filled = {}
    for name, value in wide.state_dict().items():
        fill = 1.0 if name.endswith("running_var") else 0.0
        filled[name] = (
            torch.full_like(value, fill) if value.shape != state[name].shape else state[name].clone()
        )
        if value.shape != state[name].shape:
            filled[name][tuple(map(slice, state[name].shape))] = state[name]
    wide.load_state_dict(filled)
    return wide.to(masker.mean.device)
