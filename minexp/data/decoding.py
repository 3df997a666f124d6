"""One encoded image to uint8 RGB, with the traps of real files handled in one place."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 100_000_000
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image, uint8 [h, w, 3], and what was left out of it, if anything."""

    image: npt.NDArray[np.uint8]
    note: str | None = None


def decode_image(file: str | Path | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """`decode`'s image alone."""
    return decode(file, max_pixels=max_pixels).image


def decode(file: str | Path | bytes | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode to uint8 [h, w, 3].

    EXIF rotation is applied, transparency is laid over white, 16 bits are scaled to 8, an animation gives its
    first frame; a colour profile is ignored, and that is noted where it is not sRGB's. The pixel cap is checked on the
    header, before anything is decoded. Raises RequestError.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise RequestError(
                    f"{width} x {height} pixels is above the cap of {max_pixels / 1e6:g} megapixels"
                )
            image.load()
            return Decoded(_rgb(_upright(image), image.format), _profile(image.info.get("icc_profile")))
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"its content is none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"its header announces more than {max_pixels / 1e6:g} megapixels") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise RequestError(f"cannot be opened: {error.strerror}") from None
    except (
        Exception
    ) as error:  # damaged files make Pillow's plugins raise almost anything, struct.error to IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"cannot be decoded: {reason}") from error


PROFILE = "colour profile ignored"
_SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))  # in a profile's description, of version 2 or 4


def _profile(icc: object) -> str | None:
    ignored = isinstance(icc, bytes) and len(icc) > 0 and not any(name in icc for name in _SRGB)
    return PROFILE if ignored else None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (
        Exception
    ):  # damaged EXIF says nothing about the pixels; viewers show such an image as it is stored
        return image


def _rgb(image: Image.Image, kind: str | None) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise RequestError("32-bit pixels have no known range: convert it to 8 or 16 bits")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        if image.mode == "La":  # Pillow knows no direct way
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _from_16_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    values = np.asarray(image).astype(np.int64)
    grey = ((values + 128) // 257).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)
