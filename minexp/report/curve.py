"""A training curve as a PNG, drawn with Pillow alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.files import replacing

_COLOURS = ((31, 119, 180), (214, 96, 20), (44, 140, 60), (148, 80, 170))
_INK, _FAINT = (60, 60, 60), (222, 222, 222)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last ``window`` values, shorter at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return list((total[ends] - total[starts]) / (ends - starts))


def draw_curve(
    series: Mapping[str, Sequence[float]],
    path: Path,
    *,
    switch: int | None = None,
    size: tuple[int, int] = (880, 420),
) -> None:
    """Draw shares in [0, 1] over steps to ``path``; ``switch`` marks the step where masks became hard."""
    scale = 2  # drawn large and reduced, for smooth lines
    width, height = size[0] * scale, size[1] * scale
    left, right, top, bottom = 60 * scale, 120 * scale, 24 * scale, 44 * scale
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13 * scale)
    steps = max(2, max(len(values) for values in series.values()))

    def point(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * step / (steps - 1)
        return x, height - bottom - (height - top - bottom) * min(1.0, max(0.0, value))

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.line([point(0, tick), point(steps - 1, tick)], _FAINT, scale)
        x, y = point(0, tick)
        draw.text((x - 10 * scale, y), f"{tick:.2f}", _INK, font, anchor="rm")
    for step in (0, (steps - 1) // 2, steps - 1):
        x, y = point(step, 0)
        draw.text((x, y + 8 * scale), str(step), _INK, font, anchor="ma")
    draw.text((width / 2 - right / 2, height - 8 * scale), "step", _INK, font, anchor="md")
    if switch is not None:
        draw.line([point(switch, 0), point(switch, 1)], (150, 150, 150), scale)
        x, y = point(switch, 0.55)  # between the area below and the shares above
        draw.text((x + 5 * scale, y + 2 * scale), "thresholded from here", (110, 110, 110), font)
    labels: list[float] = []
    for colour, (name, values) in zip(_COLOURS, series.items(), strict=False):
        line = smooth(values, max(1, len(values) // 50))
        draw.line([point(i, v) for i, v in enumerate(line)], colour, 2 * scale, joint="curve")
        x, y = point(steps - 1, line[-1])
        while any(abs(y - other) < 16 * scale for other in labels):
            y += 4 * scale
        labels.append(y)
        draw.text((x + 8 * scale, y), f"{name} {line[-1]:.2f}", colour, font, anchor="lm")
    with replacing(path) as temporary:
        image.resize(size, Image.Resampling.LANCZOS).save(temporary, "PNG")
