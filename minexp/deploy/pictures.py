"""What a graph does with pictures: bytes to floats and masks to bits, the order in which masks grow, backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from .ops import Value, call, constant, pad_columns, where


@dataclass(frozen=True, eq=False)
class Pictures:
    """The backgrounds of a job as an explainer carries them.

    colour: [C] in [0,1], what removed pixels become by default. drawn: uint8 [N,C,H,W]; first: where the draws of
    (purpose, family) begin in it. blur: matrices [POOL,H,H] and [POOL,W,W] that blur rows and columns, one pair a
    draw. empty: numbers [K] of the default background alone, one a class.
    """

    colour: npt.NDArray[np.float32]
    drawn: npt.NDArray[np.uint8]
    first: dict[tuple[str, str], int]
    blur: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    empty: npt.NDArray[np.float32]


def pixels(image: Value) -> Value:
    """uint8 [B,H,W,C] → float [B,C,H,W] in [0,1], divided as torch divides."""
    return image.transpose(0, 3, 1, 2).cast(np.float32) / 255


def probabilities(masker: onnx.ModelProto, image: Value, x: Value) -> Value:
    """The masker's [B,1,H,W]. Its network takes the image's bytes [B,H,W,C] where it is in 8 bits, else `pixels`."""
    kind = masker.graph.input[0].type.tensor_type.elem_type
    return call(masker, image if kind == onnx.TensorProto.UINT8 else x).sigmoid()


def packed(mask: Value) -> Value:
    """Bits of masks [B,N] from the most significant on: uint8 [B, ⌈N/8⌉]."""
    bits = pad_columns(mask.cast(np.float32), 8).reshape(0, -1, 8)
    weights = 2.0 ** np.arange(7, -1, -1, dtype=np.float32)
    return (bits @ constant(weights[:, None])).squeeze(2).cast(np.uint8)  # one product for the whole batch


def masked(kept: Value, image: Value, colour: npt.NDArray[np.uint8]) -> Value:
    """image uint8 [B,H,W,C] with the pixels that kept, bool [B,H,W], leaves out in a colour [C].

    Clipped to bounds, both the colour where it shows and all bytes elsewhere, that are chosen as planes: ONNX Runtime
    is slow where the innermost side of what is chosen by differs, and where choices change from pixel to pixel.
    """
    inside, shown = kept.reshape(0, 1, -1), colour.reshape(1, -1, 1)

    def bound(free: int) -> Value:
        planes = where(inside, constant(np.full_like(shown, free)), constant(shown))
        return planes.transpose(0, 2, 1).shaped_like(image)

    return image.clip(bound(0) if colour.any() else None, bound(255))


def area(mask: Value) -> Value:
    """Pixels [B] of masks [B,HW], counted in floats, which are exact so far and faster."""
    return mask.cast(np.float32).sum(1).cast(np.int64)


def draw_numbers(image: Value, shape: tuple[int, int, int]) -> Value:
    """An image's own first draw [B], as in `minexp.backgrounds.draw_numbers`; shape (C,H,W).

    A product in float64, where sums of up to 5e8 bytes are exact.
    """
    weights = (np.arange(np.prod(shape)) * 40503 % 65521).reshape(shape).transpose(1, 2, 0)
    column = constant(weights.reshape(-1, 1).astype(np.float32)).cast(np.float64)
    return (image.reshape(0, -1).cast(np.float64) @ column).squeeze(1).cast(np.int64) % 2**31


def local_order(p: Value, threshold: Value, size: tuple[int, int]) -> Value:
    """`minexp.repair.local_order`, its moving average as two matrix products: far fewer operations on large images."""
    side = 2 * max(1, min(size) // 8) + 1
    rows, columns = (_average(n, side) for n in size)
    around = p
    for _ in range(2):
        around = constant(rows) @ around @ constant(columns.T.copy())
    return where(p > threshold, p, (p + around) * threshold / (threshold + 1))


def _average(n: int, side: int) -> npt.NDArray[np.float32]:
    """[n,n]: mean over the window of ``side`` values around each of n, cut at the ends."""
    near = np.abs(np.arange(n)[:, None] - np.arange(n)) <= side // 2
    return (near / near.sum(1, keepdims=True)).astype(np.float32)
