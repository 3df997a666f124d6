"""The page's charts as inline SVG, coloured by the page's own style sheet."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .intervals import Estimate

Floats = npt.NDArray[np.float64]
_W, _H = 440, 270  # narrow on purpose: at phone width the text is still readable
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 44
_POINTS = 1200  # a picture of more points takes longer to draw and shows no more


def histogram(areas: Floats) -> str:
    """How many images (share of all) have a mask of which area, with mean and median."""
    areas = areas[np.isfinite(areas)]
    if not len(areas):
        return ""
    top = _nice(float(areas.max()))
    counts, edges = np.histogram(areas, bins=24, range=(0, top))
    shares = counts / counts.sum()
    y_top = _nice(float(shares.max()))
    frame = _Frame(top, 0.0, y_top)
    bars = []
    for share, count, left, right in zip(shares, counts, edges[:-1], edges[1:], strict=True):
        if count:
            x, y = frame.x(left) + 0.75, frame.y(share)
            width, height = frame.x(right) - frame.x(left) - 1.5, frame.y(0) - y
            bars.append(
                f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5">'
                f"<title>{_percent(left)} to {_percent(right)} of the pixels:"
                f" {count:,} images ({_percent(share)})</title></rect>"
            )
    mean, median = float(areas.mean()), float(np.median(areas))
    # The larger one is labelled to the right of its line, the smaller to the left: they cannot collide.
    marks = [frame.mark(mean, f"mean {_percent(mean)}", "mark", right=mean >= median)]
    marks.append(frame.mark(median, f"median {_percent(median)}", "mark soft", right=mean < median))
    axes = frame.axes("mask area (share of the pixels)", "share of the images")
    return _svg("Histogram of mask areas", axes + "".join(bars) + "".join(marks))


def scatter(areas: Floats, robust: Floats, certified: npt.NDArray[np.bool_]) -> str:
    """One point an image: mask area against robustness, with the mean robustness of ten equally filled groups."""
    usable = np.flatnonzero(np.isfinite(areas) & np.isfinite(robust))
    if not len(usable):
        return ""
    shown = usable
    if len(usable) > _POINTS:
        shown = np.sort(np.random.default_rng(0).choice(usable, _POINTS, replace=False))
    frame = _Frame(_nice(float(areas[usable].max())), 0.0, 1.0)
    points = "".join(
        f'<circle class="{"good" if certified[row] else "poor"}" cx="{frame.x(areas[row]):.1f}"'
        f' cy="{frame.y(robust[row]):.1f}" r="3"/>'
        for row in shown
    )
    order = usable[np.argsort(areas[usable], kind="stable")]
    groups = [group for group in np.array_split(order, 10) if len(group)]
    line = [(frame.x(areas[group].mean()), frame.y(robust[group].mean())) for group in groups]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    dots = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{len(group):,} images around'
        f" {_percent(areas[group].mean())} of the pixels: {robust[group].mean():.3f} on average</title></circle>"
        for (x, y), group in zip(line, groups, strict=True)
    )
    axes = frame.axes("mask area (share of the pixels)", "robust on held-out backgrounds")
    return _svg(
        "Mask area against robustness", f'{axes}{points}<polyline class="trend" points="{path}"/>{dots}'
    )


def bars(lines: Sequence[tuple[str, str, Estimate]]) -> str:
    """Horizontal bars with their intervals: (group, label, share)."""
    if not lines:
        return ""
    left, right, step, head = 150, 46, 23, 25
    span = _W - left - right
    parts, y, group = [], 4.0, ""
    for section, label, share in lines:
        if section != group:
            y += head
            parts.append(f'<text class="group" x="0" y="{y - 7:.1f}">{escape(section)}</text>')
            group = section
        middle = y + step / 2
        parts.append(
            f'<text class="name" x="{left - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        parts.append(
            f'<rect class="track" x="{left}" y="{y + 5:.1f}" width="{span}" height="{step - 10}" rx="3"/>'
        )
        kind = "bar" if section.startswith("train") else "bar second"
        parts.append(
            f'<rect class="{kind}" x="{left}" y="{y + 5:.1f}" width="{share.mean * span:.1f}"'
            f' height="{step - 10}" rx="3"/>'
        )
        if share.low is not None and share.high is not None:
            x0, x1 = left + share.low * span, left + share.high * span
            parts.append(
                f'<line class="whisker" x1="{x0:.1f}" x2="{x1:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
            )
        parts.append(f'<text class="value" x="{_W - right + 8}" y="{middle + 4:.1f}">{share.mean:.3f}</text>')
        y += step
    return _svg("Robustness by family of backgrounds", "".join(parts), height=y + 8)


class _Frame:
    """Plot area with x from 0 to ``right`` and y from ``low`` to ``high``."""

    def __init__(self, right: float, low: float, high: float) -> None:
        self.right, self.low, self.high = right, low, high

    def x(self, value: float) -> float:
        return _LEFT + value / self.right * (_W - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _H - _BOTTOM - (value - self.low) / (self.high - self.low) * (_H - _TOP - _BOTTOM)

    def axes(self, x_title: str, y_title: str) -> str:
        parts = []
        for value in np.linspace(self.low, self.high, 5):
            y = self.y(float(value))
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(value, self.high)}</text>'
            )
        for value in np.linspace(0, self.right, 5):
            x = self.x(float(value))
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{_H - _BOTTOM + 18}" text-anchor="middle">'
                f"{_tick(value, self.right)}</text>"
            )
        parts.append(
            f'<text class="title" x="{(_LEFT + _W - _RIGHT) / 2}" y="{_H - 6}" text-anchor="middle">{x_title}</text>'
        )
        parts.append(f'<text class="title" x="0" y="13">{y_title}</text>')
        return "".join(parts)

    def mark(self, value: float, label: str, kind: str, *, right: bool) -> str:
        x = self.x(value)
        if not right and x < _LEFT + 95:  # no room on that side; a line lower it collides with nothing
            return self._mark(x, label, kind, "start", 7, _TOP + 26)
        if right and x > _W - _RIGHT - 85:
            return self._mark(x, label, kind, "end", -7, _TOP + 26)
        return self._mark(x, label, kind, "start" if right else "end", 7 if right else -7, _TOP + 10)

    @staticmethod
    def _mark(x: float, label: str, kind: str, anchor: str, shift: int, y: int) -> str:
        return (
            f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_H - _BOTTOM}"/>'
            f'<text class="{kind}" x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">{label}</text>'
        )


def _svg(label: str, content: str, height: float = _H) -> str:
    return f'<svg viewBox="0 0 {_W} {height:.0f}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _nice(value: float) -> float:
    """The next round number that four steps divide well."""
    steps = (0.004, 0.008, 0.012, 0.02, 0.04, 0.08, 0.12, 0.16, 0.2, 0.28, 0.4, 0.6, 0.8, 1.0)
    for below, step in pairwise((0.0, *steps)):
        if below < value <= step:
            return step
    return steps[0] if value <= 0 else 1.0


def _tick(value: float, top: float) -> str:
    return f"{value * 100:.1f}%" if top < 0.04 else f"{value * 100:.0f}%"


def _percent(value: float) -> str:
    return f"{value * 100:.1f} %"
