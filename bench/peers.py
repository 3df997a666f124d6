"""minexp beside the explainers people use: same classifier, images, fill and predicate.

A peer's map is binarised by adding pixels in rank order, growing and then bisecting, until the predicate holds; what
that takes is charged to it, as the repair of a mask is to minexp. Every mask is then audited on draws that nobody has
seen, at nobody's cost. Means have bootstrap 95 % intervals; `paired` is the area less that of minexp's `minimal` on the
same images, with its interval. What was measured is written image by image, and a run that was stopped goes on from it.
"""

from __future__ import annotations

import csv
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attributions import PEERS, Peer, Subject, counting, missing
from torch import Tensor

from minexp.backgrounds import HELD_OUT, RANDOM, Backgrounds
from minexp.classifier import Classifier
from minexp.controls import wrong_class
from minexp.data import scenes, subjects
from minexp.data.files import replacing, write_text
from minexp.explanation import explain, make_backgrounds
from minexp.judge import Judge, dilate
from minexp.masker import Masker, load_masker
from minexp.minimise import Minimisation
from minexp.predicate import Predicate
from minexp.refine import Refinement
from minexp.regions import components
from minexp.repair import threshold_masks
from minexp.search import EFFORTS, Effort
from minexp.training import fit

COLUMNS = (
    *("explainer", "budget", "images", "area", "area_ci", "paired", "paired_ci", "held", "held_ci", "train"),
    *("kept", "dilated", "inside", "pointing", "complement", "components", "insertion", "deletion"),
    *("evaluations", "seconds", "memory_mb", "failed", "wrong_class"),
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
FINE = 0.125  # share of the images that are reduced to finer cells, too
FEW = 30  # images below which a point of the plots is hollow
CONTROLLED = 60  # images of the wrong-class control
SMALLEST = 0.01  # share of pixels that a peer's binarisation begins with
AUDIT = 4  # draws a family
LEVELS = 8  # points of the insertion and deletion curves


@dataclass(frozen=True)
class Found:
    """What one explainer found: masks bool [N,1,H,W], maps [N,H,W], evaluations and CPU seconds an image."""

    name: str
    budget: str
    masks: Tensor
    maps: Tensor
    holds: Tensor
    evaluations: Tensor
    seconds: float


@dataclass(frozen=True)
class Measured:
    """The figures of one explainer's masks, each an array of one value an image; NaN where an image has none."""

    name: str
    budget: str
    figures: dict[str, np.ndarray]

    def mean(self, name: str) -> float:
        values = self.figures[name]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def of_peer(peer: Peer, judge: Judge, x: Tensor, label: Tensor, budget: int | None) -> Found:
    """The peer's maps, and the level sets of them that satisfy the predicate."""
    subject = Subject(judge.classifier, judge.backgrounds.default(x), budget)
    started = time.process_time()
    with judge.classifier.frozen(), counting(judge.classifier) as count:
        maps = torch.cat(
            [peer.attribute(subject, a, b) for a, b in zip(x.split(32), label.split(32), strict=True)]
        )
    spent = count[0] / len(x)
    # a rank of its own for every pixel: ties would join the mask at once
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    order = (1 - rank / rank.shape[1]).view_as(maps)[:, None].float()
    least = torch.full((len(x),), max(1, round(SMALLEST * rank.shape[1])))
    found = threshold_masks(judge, x, label, order, at_least=least)
    seconds = (time.process_time() - started) / len(x)
    shown = "default" if budget is None else str(budget)
    return Found(peer.name, shown, found.masks, maps, found.holds, found.evaluations + spent, seconds)


def of_minexp(
    name: str,
    effort: Effort,
    judge: Judge,
    x: Tensor,
    masker: Masker | None,
    backgrounds: Backgrounds,
    minimisation: Minimisation | None = None,
) -> Found:
    """minexp's masks; the evaluations are all of them, the certificate's included."""
    started = time.process_time()
    parts = [
        explain(
            judge.classifier,
            part,
            masker,
            predicate=judge.predicate,
            effort=effort,
            backgrounds=backgrounds,
            minimisation=minimisation,
        )
        for part in x.split(64)
    ]
    seconds = (time.process_time() - started) / len(x)
    certificates = [c for part in parts for c in part.certificates]
    masks = torch.cat([part.masks for part in parts])[:, None]
    maps = (
        masks[:, 0].float()
        if masker is None
        else torch.cat([masker.probabilities(p)[:, 0] for p in x.split(64)])
    )
    return Found(
        name,
        "default",
        masks,
        torch.where(masks[:, 0], 1 + maps, maps),
        torch.tensor([c.certified for c in certificates]),
        torch.tensor([float(c.evaluations) for c in certificates]),
        seconds,
    )


def audit(found: Found, judge: Judge, x: Tensor, label: Tensor, truth: Tensor) -> Measured:
    """The figures of an explainer's masks, measured on draws that nobody has seen, at nobody's cost."""
    figures: dict[str, np.ndarray] = {}
    masks, default = found.masks, judge.backgrounds.default(x)
    for name, families in (("train", RANDOM), ("held", HELD_OUT)):
        draws = [(family, 1000 + number) for family in families for number in range(AUDIT)]
        figures[name] = judge.kept_on(x, label, masks, draws, "audit", 4096).float().mean(1).numpy()
    shown = {"kept": masks, "dilated": dilate(masks)}
    for name, mask in shown.items():
        kept = judge.logits(torch.where(mask, x, default)).argmax(1) == label
        figures[name] = kept.float().numpy()
    rest = judge.logits(torch.where(masks, default, x)).softmax(1)
    figures["complement"] = rest.gather(1, label[:, None])[:, 0].numpy()
    area = masks.flatten(1).float()
    figures["area"] = area.mean(1).numpy()
    figures["components"] = np.array([components(m[0].numpy()) for m in masks], float)
    decided = truth.flatten(1).any(1)
    inside = (masks[:, 0] & truth).flatten(1).sum(1) / area.sum(1).clamp_min(1)
    figures["inside"] = torch.where(decided, inside, torch.nan).numpy()
    top = found.maps.flatten(1).argmax(1)
    hit = truth.flatten(1).gather(1, top[:, None])[:, 0].float()
    figures["pointing"] = torch.where(decided, hit, torch.nan).numpy()
    rank = found.maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    for name in CURVES:
        scores = []
        for level in range(1, LEVELS):
            chosen = (rank < rank.shape[1] * level // LEVELS).view_as(masks)
            kept_part = chosen if name == "insertion" else ~chosen
            p = judge.logits(torch.where(kept_part, x, default)).softmax(1)
            scores.append(p.gather(1, label[:, None])[:, 0])
        figures[name] = torch.stack(scores).mean(0).numpy()
    n = len(x)
    figures["evaluations"] = found.evaluations.double().numpy()
    figures["failed"] = (~found.holds).double().numpy()
    figures["wrong_class"] = np.full(n, math.nan)
    figures["seconds"] = np.full(n, found.seconds)
    figures["memory_mb"] = np.full(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return Measured(found.name, found.budget, figures)


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
        difference = area - reference.figures["area"][: len(area)]
        line["paired"] = float(difference.mean())
        line["paired_ci"] = "{:+.3f}–{:+.3f}".format(*interval(difference))
    return line


def prepared(variant: scenes.Variant, out: Path | None) -> tuple[Classifier, Masker]:
    """The variant's classifier and masker, as `minexp demo` makes them; a demo's directory ``out``/VARIANT is used."""
    from minexp import demo

    folder = None if out is None else out / variant
    if folder is not None and (folder / "masker.safetensors").is_file():
        from safetensors.torch import load_file

        tiled = variant in ("mosaic", "segments")
        model = subjects.SceneNet(4 if tiled else 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(load_file(folder / "classifier.safetensors"))
        classifier = subjects.classifier(model.eval(), variant)
        return classifier, load_masker(folder / "masker.safetensors", classifier)
    classifier = subjects.classifier(subjects.train_subject(variant), variant)
    training = scenes.make(variant, demo.MASKER_IMAGES, seed=1)
    return classifier, fit(classifier, training.images, steps=1200, progress=False)


def measure(
    quiet: bool,
    *,
    images: int = 500,
    out: str | None = None,
    variant: scenes.Variant = "plain",
    peers: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows for minexp's efforts and every peer that can be imported, on test scenes of this seed.

    Slow explainers see fewer images: `Peer.shares`. peers: names of those to run, separated by commas, or "none".
    With ``out``, also a Markdown and a CSV table, the figures of every image, and two plots there; what a run with the
    same images, seed and models has measured there already is used.
    """
    stem = None if out is None else Path(out) / variant
    classifier, masker = prepared(variant, None if out is None else Path(out))
    data = scenes.make(variant, images, seed=seed, split="test")
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    truth = torch.from_numpy(data.patch if variant == "shortcut" else data.truth)
    backgrounds = make_backgrounds(classifier, masker)
    judge = Judge(classifier, Predicate(), backgrounds)
    label = judge.logits(x).argmax(1)
    job = f"{images} images, seed {seed}, classifier {classifier.fingerprint[:12]}"
    results = [] if stem is None else read(stem, job)

    def add(name: str, budget: str, find: Callable[[], Found]) -> None:
        if not any((known.name, known.budget) == (name, budget) for known in results):
            found = find()
            n = len(found.masks)
            measured = audit(found, judge, x[:n], label[:n], truth[:n])
            if name == "minexp minimal":
                few = slice(0, CONTROLLED)
                wrong = wrong_class(judge, x[few], found.masks[few], Refinement())
                measured.figures["wrong_class"][few] = wrong.double().numpy()
            results.append(measured)
        if stem is not None:  # as it goes: a long run that is stopped leaves what it has
            write(table(results), results, stem, job)
        if not quiet:
            print(f"{name} ({budget}): done", file=sys.stderr)

    for effort in reversed(EFFORTS):
        name = f"minexp {effort}"
        add(name, "default", partial(of_minexp, name, effort, judge, x, masker, backgrounds))
        if effort == "minimal":
            settings, n = Minimisation(cell=max(1, min(x.shape[2:]) // 16)), max(2, round(images * FINE))
            name = f"minexp minimal, cells of {settings.cell}"
            add(
                name, "default", partial(of_minexp, name, effort, judge, x[:n], masker, backgrounds, settings)
            )
    chosen = None if peers is None else {name.strip() for name in peers.split(",")}
    for peer in PEERS:
        if chosen is not None and peer.name not in chosen:
            continue
        if (why := missing(peer)) is not None:
            print(why, file=sys.stderr)
            continue
        for budget, share in peer.shares:
            n, shown = max(2, round(images * share)), "default" if budget is None else str(budget)
            try:
                add(peer.name, shown, partial(of_peer, peer, judge, x[:n], label[:n], budget))
            except Exception as error:  # a peer that breaks is left out, and said to be
                print(f"{peer.name} failed: {type(error).__name__}: {error}", file=sys.stderr)
    rows = table(results)
    if stem is not None:
        plot(rows, stem)
    return rows


def table(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """A line an explainer, minexp's first; `paired` is against its `minimal`, where that was run."""
    results = sorted(results, key=lambda found: not found.name.startswith("minexp"))
    minimal = next((found for found in results if found.name == "minexp minimal"), None)
    return [row(found, minimal) for found in results]


def read(stem: Path, job: str) -> list[Measured]:
    """What an earlier run of this job has measured."""
    path = stem.with_name(f"{stem.name}_images.csv")
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["job"] == job]
    names = (*FIGURES, *CURVES, *SPENT)
    return [
        Measured(*key, {n: np.array([float(line[n]) for line in group]) for n in names})
        for key, group in (
            (key, [line for line in lines if (line["explainer"], line["budget"]) == key])
            for key in dict.fromkeys((line["explainer"], line["budget"]) for line in lines)
        )
    ]


def write(rows: Sequence[dict[str, Any]], results: Sequence[Measured], stem: Path, job: str) -> None:
    """The table as Markdown and CSV, and the figures of every image as CSV."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    names = (*FIGURES, *CURVES, *SPENT)
    with replacing(stem.with_suffix(".csv")) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    single = stem.with_name(f"{stem.name}_images.csv")
    with replacing(single) as path, path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["job", "explainer", "budget", "image", *names])
        for found in results:
            for image, values in enumerate(zip(*(found.figures[name] for name in names), strict=True)):
                lines.writerow([job, found.name, found.budget, image, *(f"{value:.6g}" for value in values)])
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
        figure = Figure(figsize=(9, 5), layout="constrained")
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
                label=f"{number}  {text}" + (f", {line['images']} images" if few else ""),
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
