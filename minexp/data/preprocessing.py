"""From a decoded image to the pixels a model sees: resize and centre crop, in numpy and Pillow alone.

Mean and standard deviation travel with the settings but are applied inside the classifier, so that masks and
backgrounds act on plain pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import RequestError

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes model input.

    size: (H, W) of the model's input. resize: length in pixels the shorter side gets before the centre crop, or (H, W)
    that the whole image is squashed to before it; None squashes it to ``size`` and crops nothing. mean, std: one
    value a channel, of pixels in [0, 1].
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 3

    def __post_init__(self) -> None:
        # JSON and callers hand in lists; frozen dataclasses should hold tuples, so that they hash.
        object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.size) != 2 or min(self.size) < 1:
            raise RequestError(f"preprocessing size is {self.size}: give (height, width), both at least 1")
        if self.channels not in (1, 3):
            raise RequestError(f"preprocessing channels is {self.channels}: only 1 and 3 are supported")
        if self.interpolation not in _FILTERS:
            raise RequestError(
                f"interpolation {self.interpolation!r} is unknown: use one of {', '.join(_FILTERS)}"
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise RequestError(
                f"mean has {len(self.mean)} and std {len(self.std)} values: give {self.channels} each, one a channel"
            )
        if not all(map(math.isfinite, self.mean)) or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise RequestError(f"mean {self.mean} and std {self.std}: give finite values, std above 0")
        if self.resize is not None and not isinstance(self.resize, int):
            object.__setattr__(self, "resize", tuple(int(side) for side in self.resize))
        if self.resize is not None and any(
            side < crop for side, crop in zip(self._before_crop(), self.size, strict=True)
        ):
            raise RequestError(
                f"resize {self.resize} is smaller than the crop {self.size}: give at least its size"
            )

    def pixels(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize and crop ``image``, uint8 [h, w, 1 or 3], to uint8 [H, W, channels].

        An image that already has the size passes through untouched.
        """
        if image.ndim == 2:
            image = image[..., None]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
            raise RequestError(
                f"an image of {image.dtype} {list(image.shape)}: give uint8 [h, w, 1 or 3], not empty"
            )
        image = self._with_channels(image)
        if image.shape[:2] == self.size:
            return image
        height, width = self.size
        # Only the part that survives the crop is ever resized: a 1 x 30000 strip costs no more than a square.
        picture = Image.fromarray(image[..., 0] if self.channels == 1 else image)
        resized = picture.resize(
            (width, height), _FILTERS[self.interpolation], box=self._box(*image.shape[:2])
        )
        return np.asarray(resized, dtype=np.uint8).reshape(height, width, self.channels)

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The region of the source that fills the model's input: (left, top, right, bottom) in source pixels."""
        if self.resize is None:
            return 0.0, 0.0, float(width), float(height)
        tall, wide = self._before_crop(height, width)
        top, left = round((tall - self.size[0]) / 2), round((wide - self.size[1]) / 2)
        down, across = height / tall, width / wide
        return left * across, top * down, (left + self.size[1]) * across, (top + self.size[0]) * down

    def resized(self, size: tuple[int, int]) -> "Preprocessing":
        """The same for a model input of another size: the crop takes as much of the image as before."""
        resize = self.resize
        if isinstance(resize, int):
            resize = max(*size, round(resize * min(size) / min(self.size)))
        elif resize is not None:
            height, width = (round(a * b / c) for a, b, c in zip(resize, size, self.size, strict=True))
            resize = (height, width)
        return replace(self, size=size, resize=resize)

    def _before_crop(self, height: int = 1, width: int = 1) -> tuple[int, int]:
        """(H, W) of an image of that height and width before the crop."""
        if self.resize is None or not isinstance(self.resize, int):
            return self.resize or self.size
        short, resize = min(height, width), self.resize
        return max(resize, resize * height // short), max(resize, resize * width // short)

    def _with_channels(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if image.shape[2] == self.channels:
            return image
        if self.channels == 3:
            return np.repeat(image, 3, axis=2)
        return np.asarray(Image.fromarray(image).convert("L"), dtype=np.uint8)[..., None]

    def to_json(self) -> dict[str, Any]:
        """The settings under timm's field names, plus ``resize`` in pixels, which ``crop_pct`` cannot hold exactly."""
        return {
            "input_size": [self.channels, *self.size],
            "interpolation": self.interpolation,
            "crop_pct": min(self.size) / min(self._before_crop()),
            "crop_mode": "squash" if self.resize is None else "center",
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Read :meth:`to_json`'s fields, or a timm configuration (fields it has beyond these are ignored)."""
        if "input_size" not in fields or len(fields["input_size"]) != 3:
            raise RequestError("preprocessing has no input_size: give [channels, height, width]")
        channels, *size = (int(value) for value in fields["input_size"])
        squash = fields.get("crop_mode", "center") == "squash"
        if "resize" in fields:
            resize = fields["resize"]
        else:
            resize = None if squash else math.floor(max(size) / float(fields.get("crop_pct") or 1.0))
        # timm draws an interpolation at random in training, and then takes bilinear at test time
        interpolation = fields.get("interpolation", "bilinear")
        return cls(
            size=(size[0], size[1]),
            resize=int(resize) if isinstance(resize, (int, float)) else resize,
            interpolation="bilinear" if interpolation == "random" else interpolation,
            mean=tuple(fields.get("mean", [0.0] * channels)),
            std=tuple(fields.get("std", [1.0] * channels)),
            channels=channels,
        )
