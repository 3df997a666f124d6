"""The table of `minexp bench peers`: its figures image by image, as CSV that a stopped run goes on from, and plots."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minexp.data.files import replacing, write_text

COLUMNS = (
    *("explainer", "budget", "images", "area", "area_ci", "paired", "paired_ci", "held", "held_ci", "train"),
    *("kept", "dilated", "inside", "pointing", "complement", "components", "insertion", "deletion"),
    *("evaluations", "seconds", "memory_mb", "failed", "wrong_class", "fit_seconds", "break_even"),
)
FIGURES = ("area", "held", "train", "kept", "dilated", "inside", "pointing", "complement", "components")
CURVES = ("insertion", "deletion")
SPENT = (
    "evaluations",
    "failed",
    "wrong_class",
    "seconds",
    "memory_mb",
)  # seconds and memory: of the run, shared
NAMES = (*FIGURES, *CURVES, *SPENT)
FEW = 30  # images below which a point of the plots is hollow


@dataclass(frozen=True)
class Measured:
    """The figures of one explainer's masks, each an array of one value an image; NaN where an image has none."""

    name: str
    budget: str
    figures: dict[str, np.ndarray]

    def mean(self, name: str) -> float:
        values = self.figures[name]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(1000, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def row(measured: Measured, reference: Measured | None) -> dict[str, Any]:
    """One line of the table."""
    area = measured.figures["area"]
    line: dict[str, Any] = {"explainer": measured.name, "budget": measured.budget, "images": len(area)}
    line |= {name: measured.mean(name) for name in (*FIGURES, *CURVES, *SPENT)}
    for name in ("area", "held"):
        line[f"{name}_ci"] = "{:.3f}–{:.3f}".format(*interval(measured.figures[name]))
    if reference is not None and reference is not measured:
        both = min(len(area), len(reference.figures["area"]))
        difference = area[:both] - reference.figures["area"][:both]
        line["paired"] = float(difference.mean())
        line["paired_ci"] = "{:+.3f}–{:+.3f}".format(*interval(difference))
    return line


class Results:
    """What has been measured: of the jobs named, also what the file of an earlier run holds."""

    def __init__(self, stem: Path | None, jobs: Sequence[str], fit_seconds: float = math.nan) -> None:
        self.stem, self.fit_seconds = stem, fit_seconds
        self.measured: dict[tuple[str, str], Measured] = {}
        self.jobs: dict[tuple[str, str], str] = {}
        path = None if stem is None else stem.with_name(f"{stem.name}_images.csv")
        if path is None or not path.is_file():
            return
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["job"] in jobs]
        for job, *key in dict.fromkeys((line["job"], line["explainer"], line["budget"]) for line in lines):
            group = [
                line for line in lines if (line["job"], line["explainer"], line["budget"]) == (job, *key)
            ]
            figures = {name: np.array([float(line[name]) for line in group]) for name in NAMES}
            self._put(Measured(key[0], key[1], figures), job)

    def _put(self, measured: Measured, job: str) -> None:
        key = measured.name, measured.budget
        self.measured[key], self.jobs[key] = measured, job

    def images(self, name: str, budget: str) -> int:
        """How many images, the first, are known of an explainer."""
        found = self.measured.get((name, budget))
        return 0 if found is None else len(found.figures["area"])

    def add(self, measured: Measured, job: str) -> None:
        """Further images of an explainer; written at once where there is a folder."""
        before = self.measured.get((measured.name, measured.budget))
        if before is not None:
            figures = {n: np.concatenate([before.figures[n], measured.figures[n]]) for n in NAMES}
            measured = Measured(measured.name, measured.budget, figures)
        self._put(measured, job)
        if self.stem is not None:
            self.write(self.stem)

    def rows(self) -> list[dict[str, Any]]:
        """A line an explainer, minexp's first; `paired` is against its `minimal`, where that was run.

        break_even: images after which the masker's fit and `fast` have taken less time than the explainer.
        """
        results = sorted(self.measured.values(), key=lambda found: not found.name.startswith("minexp"))
        minimal = self.measured.get(("minexp minimal", "default"))
        lines = [row(found, minimal) for found in results]
        fast = next((line for line in lines if line["explainer"] == "minexp fast"), None)
        if fast is not None:
            fast["fit_seconds"] = self.fit_seconds
            for line in lines:
                saved = line["seconds"] - fast["seconds"]
                if saved > 0 and math.isfinite(self.fit_seconds):
                    line["break_even"] = math.ceil(self.fit_seconds / saved)
        return lines

    def write(self, stem: Path) -> None:
        """The table as Markdown and CSV, and the figures of every image as CSV."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        with (
            replacing(stem.with_suffix(".csv")) as path,
            path.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        single = stem.with_name(f"{stem.name}_images.csv")
        with replacing(single) as path, path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["job", "explainer", "budget", "image", *NAMES])
            for key, found in self.measured.items():
                for image, values in enumerate(zip(*(found.figures[name] for name in NAMES), strict=True)):
                    lines.writerow([self.jobs[key], *key, image, *(f"{value:.6g}" for value in values)])
        shown = [[_cell(line.get(column)) for column in COLUMNS] for line in rows]
        cells = ["| " + " | ".join(line) + " |" for line in (list(COLUMNS), ["---"] * len(COLUMNS), *shown)]
        write_text(stem.with_suffix(".md"), "\n".join(cells) + "\n")


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    """Area against robustness, and area against cost."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'minexp[bench]')", file=sys.stderr)
        return
    for name, column, title in (
        ("robustness", "held", "class kept on held-out backgrounds"),
        ("cost", "evaluations", "classifier evaluations an image"),
    ):
        figure = Figure(figsize=(9, max(5, 0.19 * len(rows) + 0.6)), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(rows, 1):
            ours, few = line["explainer"].startswith("minexp"), line["images"] < FEW
            text = line["explainer"] + ("" if line["budget"] == "default" else f" ({line['budget']})")
            place = line[column], line["area"]
            axes.plot(
                *place,
                "o" if ours else "s",
                color="#c2410c" if ours else "#475569",
                fillstyle="none" if few else "full",
                linestyle="none",
                label=f"{number}  {text}" + (f", n = {line['images']}" if few else ""),
            )
            # names would hide one another where explainers are alike
            beside = (-5, -10) if number % 2 else (5, 3)
            axes.annotate(
                str(number),
                place,
                xytext=beside,
                textcoords="offset points",
                fontsize=8,
                ha="right" if number % 2 else "left",
            )
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        if column == "evaluations":
            axes.set_xscale("log")
        axes.set(xlabel=title, ylabel="share of the pixels kept", ylim=(0, None))
        axes.margins(x=0.06)
        axes.grid(alpha=0.25)
        figure.savefig(stem.with_name(f"{stem.name}_{name}.png"), dpi=120)
