"""Pictures: data URIs for the page, PNG panels and montages."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..data.files import replacing

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

_INK, _MUTED, _PAPER, _LINE = (29, 33, 38), (101, 109, 118), (255, 255, 255), (226, 228, 232)
_ACCENT, _SOFT = (36, 87, 214), (232, 238, 252)  # mask pixels, and those it leaves out
_CELL, _GAP, _EDGE = 256, 14, 28  # pixels


def image_uri(image: Pixels, side: int) -> str:
    """A data URI of ``image`` [h, w, 1 or 3], its longer side at most ``side``; small pictures stay exact."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    small = max(picture.size) <= min(side, 96)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        picture.save(file, "WEBP", lossless=True)
    else:
        picture.save(file, "WEBP", quality=82)
    return _uri("webp", file)


def mask_uri(mask: Mask) -> str:
    """A data URI of ``mask`` [H, W] as a picture opaque where the mask holds, for CSS to cut with."""
    picture = Image.fromarray(np.where(mask, 0, 1).astype(np.uint8))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    picture.save(file, "PNG", bits=1, transparency=1, optimize=True)
    return _uri("png", file)


def file_uri(path: Path, side: int) -> str:
    """A data URI of a picture file, shrunk when its longer side exceeds ``side``."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
        picture.load()
        shown = picture.convert("RGB")
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, "WEBP", quality=90)
    return _uri("webp", file)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, eq=False)
class Panel:
    """One explained image: picture uint8 [H, W, 1 or 3], its mask bool [H, W], what is kept, and a line about it."""

    image: Pixels
    mask: Mask
    kept: Pixels
    line: str


def write_panel(image: Pixels, mask: Mask, kept: Pixels, line: str, path: str | Path) -> Path:
    """Write image → mask → kept image with ``line`` below as one PNG."""
    return write_montage([Panel(image, mask, kept, line)], path, columns=1)


def write_montage(rows: Sequence[Panel], path: str | Path, *, columns: int = 2) -> Path:
    """Write several explained images as one PNG, in ``columns`` columns."""
    path = Path(path)
    with replacing(path) as temporary:
        montage(rows, columns=columns).save(temporary, "PNG", optimize=True)
    return path


def montage(rows: Sequence[Panel], *, columns: int = 2) -> Image.Image:
    """Several explained images as one picture, in ``columns`` columns."""
    if not rows:
        raise ValueError("a montage needs at least one panel")
    columns = min(columns, len(rows))
    width, height = 3 * _CELL + 2 * _GAP, _CELL + 46
    lines = -(-len(rows) // columns)
    head = 34
    sheet = Image.new(
        "RGB",
        (columns * width + (columns + 1) * _EDGE, head + lines * height + (lines + 1) * _EDGE - 8),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for place, title in enumerate(("image", "minimal mask", "what is kept")):
            x = _EDGE + column * (width + _EDGE) + place * (_CELL + _GAP)
            draw.text((x, 20), title, _MUTED, _font(17))
    for index, row in enumerate(rows):
        left = _EDGE + index % columns * (width + _EDGE)
        top = head + _EDGE - 8 + index // columns * (height + _EDGE)
        for place, picture in enumerate((_cell(row.image), _mask_cell(row.mask), _cell(row.kept))):
            x = left + place * (_CELL + _GAP)
            sheet.paste(picture, (x + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
            draw.rectangle((x, top, x + _CELL - 1, top + _CELL - 1), outline=_LINE)
        draw.text((left, top + _CELL + 10), _fit(row.line, width), _INK, _font(17))
    return sheet


def table_of_pictures(
    heads: Sequence[str], rows: Sequence[Sequence[Pixels]], notes: Sequence[Sequence[str]]
) -> Image.Image:
    """Pictures in rows under named columns, each with a note below; pictures uint8 [H, W, 1 or 3]."""
    width, height = _CELL + _GAP, _CELL + 34
    size = (2 * _EDGE + len(heads) * width - _GAP, 34 + _EDGE + len(rows) * height)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, head in enumerate(heads):
        draw.text((_EDGE + place * width, 20), head, _MUTED, _font(17))
    for line, (pictures, texts) in enumerate(zip(rows, notes, strict=True)):
        top = 54 + line * height
        for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            x, cell = _EDGE + place * width, _cell(picture)
            sheet.paste(cell, (x + (_CELL - cell.width) // 2, top + (_CELL - cell.height) // 2))
            draw.rectangle((x, top, x + _CELL - 1, top + _CELL - 1), outline=_LINE)
            draw.text((x, top + _CELL + 5), _fit(text, _CELL), _INK, _font(15))
    return sheet


def _cell(image: Pixels) -> Image.Image:
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
    return _scaled(picture, Image.Resampling.LANCZOS)


def _mask_cell(mask: Mask) -> Image.Image:
    colours = np.where(mask[..., None], np.array(_ACCENT, np.uint8), np.array(_SOFT, np.uint8))
    return _scaled(Image.fromarray(colours), Image.Resampling.NEAREST)


def _scaled(picture: Image.Image, shrink: Image.Resampling) -> Image.Image:
    """Fit into a cell; much enlarged pixels stay square, because the mask is made of them."""
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1.5 else shrink)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fit(text: str, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than ``width`` pixels."""
    font = _font(17)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
