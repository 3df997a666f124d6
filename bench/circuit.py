"""Circuits from images, from their explanations and from rival masks at matched size; their edges; their cost.

The subject is the scenes' ResNet, trained as in the demo, or any model with images of yours (`--model`, `--data`,
`--weights`). Masks are of effort refined. zennit-crp is a peer where it is installed. Every figure has a row: mean
over ``n`` images (pairs of stages), 95 % interval, and the bound that it is held to, where there is one. Writes
circuit-SUBJECT.csv and .png to bench/results.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import relevances
import torch
from circuit_limits import limit_rows
from circuit_subjects import REFERENCES, Say, Subject, given_subject, lent, scenes_subject, tensor
from rows import write_csv
from torch import Tensor

from minexp.circuit.ablation import Metric
from minexp.circuit.attribution import gradient_edges
from minexp.circuit.circuit import Interval
from minexp.circuit.comparison import IMAGE, Line, compare, line_of
from minexp.circuit.edges import Strengths, exact_edges, intervene
from minexp.circuit.examine import interval
from minexp.circuit.network import Level
from minexp.circuit.published import published_edges
from minexp.circuit.ranking import count_of, rank
from minexp.circuit.readout import Reader
from minexp.circuit.settings import RANKED_BY, Mode, Settings
from minexp.classifier import Classifier
from minexp.data import planted, scenes
from minexp.explanation import explain
from minexp.specs import build

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "experiment",
    "subject",
    "metric",
    "circuit",
    "tested on",
    "figure",
    "value",
    "low",
    "high",
    "n",
    "bound",
)
METRICS: tuple[Metric, ...] = ("log_prob", "contrast")
MODE_METRICS: tuple[Metric, ...] = ("log_prob", "logit")
READOUTS: tuple[tuple[Mode, Level], ...] = (
    ("exact", "layer"),
    ("gradient", "layer"),
    ("exact", "stage"),
    ("paper", "stage"),
)
SIZE = 0.1  # share of the nodes in the circuits that are taken out and set against random ones
CONTROLS = 20
CURVE = "faithfulness at"
EDGE_IMAGES, EDGES = 4, 150  # images, and edges of each that are intervened on
CONTRAST_SHARE = 3  # the contrast, five times as dear, is measured on every so many-th image
COLOURS = {"image": "#475569", "explanation": "#c2410c", "moved mask": "#0891b2", "Grad-CAM": "#7c3aed"}
MODE_COLOURS = ("#c2410c", "#0891b2", "#f59e0b", "#475569", "#7c3aed")
Row = dict[str, Any]


def measure(
    quiet: bool,
    *,
    images: int = 24,
    out: str | None = None,
    model: str | None = None,
    data: str | None = None,
    weights: str | None = None,
) -> list[Row]:
    """Rows of every experiment. ``out``: its plain/, of a demo, lends the classifier; what is trained is kept there."""
    say: Say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    folder = None if out is None else Path(out)
    subject = (
        scenes_subject(images, folder, say) if model is None else given_subject(model, data, weights, images)
    )
    say(f"explaining {len(subject.x)} images")
    masks = explain(subject.classifier, subject.x, effort="refined", reference=subject.reference).masks
    rows: list[Row] = []
    lines: dict[Metric, list[Line]] = {}
    for metric in METRICS:
        say(f"circuits from images and masks, metric {metric}")
        step = CONTRAST_SHARE if metric == "contrast" else 1
        lines[metric] = compare(
            subject.reader(metric=metric), subject.x[::step], masks[::step], size=SIZE, controls=CONTROLS
        )
        rows += _input_rows(subject.name, metric, lines[metric])
    modes: dict[Metric, dict[str, Line]] = {}
    for metric in MODE_METRICS:
        say(f"modes, metric {metric}")
        modes[metric] = {f"{mode}, {level}s": _read(subject, mode, level, metric) for mode, level in READOUTS}
        modes[metric] |= _peer(subject, metric)
        rows += _mode_rows(subject.name, metric, modes[metric])
    say("other figures and images")
    rows += limit_rows(subject)
    say("edges against interventions")
    rows += [*_edge_rows(subject), *_published_rows(subject)]
    rows += _cost_rows(subject.name, subject.classifier, subject.x[0], {"reference": subject.reference})
    if model is None:
        rows += [*_planted_rows(folder, say), *_resnet50_rows(say)]
    stem = RESULTS / f"circuit-{subject.name}"
    write(rows, stem)
    plot(lines, modes[MODE_METRICS[0]], stem)
    return [row for row in rows if not row["figure"].startswith(CURVE)]  # the plot shows those


# ---------------------------------------------------------------- circuits of inputs, and of modes


def _read(subject: Subject, mode: Mode, level: Level, metric: Metric) -> Line:
    reader = subject.reader(mode=mode, level=level, metric=metric)
    ablation = reader.ablation(*reader.prepare(subject.x))
    ranking = rank(ablation, RANKED_BY[mode], sizes=reader.settings.sizes)
    return line_of(reader, ablation, ranking, mode, IMAGE, size=SIZE, controls=CONTROLS)


def _peer(subject: Subject, metric: Metric) -> dict[str, Line]:
    """zennit-crp's line; none, and why on stderr, where it is not installed or does not take the model."""
    if not relevances.installed():
        print(f"{relevances.NAME} left out: pip install zennit-crp", file=sys.stderr)
        return {}
    reader = subject.reader(metric=metric)
    ablation = reader.ablation(*reader.prepare(subject.x))
    try:
        ranking = relevances.rank_by_relevance(subject.classifier, ablation)
    except Exception as error:
        print(f"{relevances.NAME} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    line = line_of(reader, ablation, ranking, relevances.NAME, IMAGE, size=SIZE, controls=CONTROLS)
    return {f"{relevances.NAME}, layers": line}


def _input_rows(name: str, metric: Metric, lines: Sequence[Line]) -> Iterable[Row]:
    base = lines[0]
    for line in lines:
        keys = {"experiment": "inputs", "subject": name, "metric": metric, "circuit": line.source}
        keys |= {"tested on": line.tested_on}
        yield from _line_rows(keys, line)
        if line is not base:
            names = ("size enough, less the image's", "cpr, less the image's", "cmd, less the image's")
            yield from (keys | _figure(f, v) for f, v in zip(names, line.less(base), strict=True))


def _mode_rows(name: str, metric: Metric, modes: dict[str, Line]) -> Iterable[Row]:
    for circuit, line in modes.items():
        keys = {"experiment": "modes", "subject": name, "metric": metric, "circuit": circuit}
        keys |= {"tested on": IMAGE}
        bounds = {}
        if circuit == "exact, layers":
            bounds = {"faithfulness": 0.8, "inside drop / random drop": 3.0}
        yield from _line_rows(keys, line, bounds)
    for level in ("layers", "stages"):
        ratio = modes["paper, stages"].cmd.mean / modes[f"exact, {level}"].cmd.mean
        keys = {"experiment": "modes", "subject": name, "metric": metric, "circuit": f"exact, {level}"}
        yield keys | {
            "figure": "paper's cmd / cmd",
            "value": ratio,
            "n": modes["paper, stages"].cmd.n,
            "bound": 2.0,
        }


def _line_rows(keys: Row, line: Line, bounds: dict[str, float] | None = None) -> Iterable[Row]:
    figures: dict[str, Interval | float] = {
        "size enough for 0.8": line.enough,
        "faithfulness": line.faithfulness,
        "elsewhere": line.elsewhere,
        "cpr": line.cpr,
        "cmd": line.cmd,
        "inside drop": line.inside,
        "outside drop": line.outside,
        "random drop": line.random,
        "inside drop / random drop": line.inside.mean / line.random.mean,
    }
    figures |= {f"{CURVE} {s:g}": v for s, v in zip(line.sizes, line.curve, strict=True)}
    for figure, value in figures.items():
        if isinstance(value, float):
            yield keys | {"figure": figure, "value": value, "bound": (bounds or {}).get(figure)}
        elif value.n:
            yield keys | _figure(figure, value) | {"bound": (bounds or {}).get(figure)}


def _figure(name: str, value: Interval) -> Row:
    return {"figure": name, "value": value.mean, "low": value.low, "high": value.high, "n": value.n}


# ---------------------------------------------------------------- edges


def _edge_rows(subject: Subject) -> Iterable[Row]:
    """Rank correlation of edge scores with what setting the target to its value without the source does."""
    reader = subject.reader(metric="logit")
    ablation = reader.ablation(*reader.prepare(subject.x[:EDGE_IMAGES]))
    keep = rank(ablation, "pruned", sizes=(SIZE,)).keep(count_of(SIZE, ablation.net.nodes))
    found: dict[str, list[float]] = {"exact": [], "gradient": []}
    for row in range(len(ablation)):
        chosen = {s: k[0].nonzero()[:, 0] for s, k in ablation.net.by_site(keep[row : row + 1]).items()}
        parts = {
            "exact": exact_edges(ablation, row, chosen),
            "gradient": gradient_edges(ablation, row, chosen),
        }
        edges = [
            (*source, part.target, int(unit))
            for part in parts["exact"]
            for unit in part.units
            for source in part.sources
        ]
        some = torch.randperm(len(edges), generator=torch.Generator().manual_seed(row))[:EDGES]
        direct = intervene(ablation, row, [edges[i] for i in some.tolist()])
        for mode, strengths in parts.items():
            found[mode].append(_correlation(_effects(strengths)[some], direct))
    for mode, bound in (("exact", 0.9), ("gradient", 0.7)):
        keys = {"experiment": "edges", "subject": subject.name, "metric": "logit", "circuit": mode}
        yield keys | _figure("rank correlation with intervention", interval(found[mode])) | {"bound": bound}


def _effects(strengths: Sequence[Strengths]) -> Tensor:
    return torch.cat([part.effect.flatten() for part in strengths])


def _published_rows(subject: Subject) -> Iterable[Row]:
    """Rank correlation of published edges with exact ones between whole stages, over all pairs of units."""
    reader = subject.reader(mode="paper", metric="logit")
    images = max(1, EDGE_IMAGES * 256 // reader.net.nodes)  # a pass of the network for every unit of each
    ablation = reader.ablation(*reader.prepare(subject.x[:images]))
    everything = {site: torch.arange(site.units) for site in ablation.net.sites}
    found: dict[str, list[float]] = {"effect": [], "change of the target": []}
    for row in range(len(ablation)):
        edges, _ = published_edges(subject.classifier, ablation, [row], everything, sys.maxsize)
        score = {(e.source_layer, e.source, e.target_layer, e.target): e.effect for e in edges}
        for part in exact_edges(ablation, row, everything):
            if part.target is None or part.change is None:
                continue
            known = [
                (score[key], o, i)
                for o, unit in enumerate(part.units.tolist())
                for i, (site, source) in enumerate(part.sources)
                if (key := (site.name, source, part.target.name, unit)) in score
            ]
            if len(known) < 3:
                continue
            published, o, i = (torch.tensor(column) for column in zip(*known, strict=True))
            found["effect"].append(_correlation(published, part.effect[o, i].abs()))
            found["change of the target"].append(_correlation(published, part.change[o, i]))
    for name, values in found.items():
        keys = {"experiment": "edges", "subject": subject.name, "metric": "logit", "circuit": "paper, stages"}
        yield keys | _figure(f"rank correlation with exact edges, {name}", interval(values))


def _correlation(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)


# ---------------------------------------------------------------- the planted path, and cost


def _planted_rows(folder: Path | None, say: Say) -> Iterable[Row]:
    """How well node scores tell the units that the corner patch alone can reach, where that patch decides."""
    from sklearn.metrics import roc_auc_score

    def train() -> planted.PlantedNet:
        say("training the network with a planted path")
        return planted.train_planted(progress=True)

    model = lent(planted.PlantedNet(), folder and folder / "planted.safetensors", train)
    data = scenes.make("shortcut", 200, split="test", decisive=False)
    x = tensor(data.images[planted.decided_by_patch(model, data)][:12])
    reference = tensor(scenes.make("shortcut", REFERENCES, seed=5, split="train", decisive=False).images)
    subject = Subject("planted path", planted.planted_classifier(model), x, reference)
    say("the planted path")
    for metric in MODE_METRICS:
        for mode, level in READOUTS:
            reader = subject.reader(mode=mode, level=level, metric=metric)
            ablation = reader.ablation(*reader.prepare(x))
            truth = np.concatenate(
                [np.arange(s.units) < planted.planted_share(s.units) for s in reader.net.ablated]
            )
            ranking = rank(ablation, RANKED_BY[mode], sizes=reader.settings.sizes)
            areas = [float(roc_auc_score(truth, key)) for key in ranking.key.numpy()]
            keys = {"experiment": "planted", "subject": subject.name, "metric": metric}
            keys |= {"circuit": f"{mode}, {level}s"}
            bound = 0.95 if mode == "exact" else None
            yield keys | _figure("AUROC", interval(areas)) | {"bound": bound}


def _resnet50_rows(say: Say) -> Iterable[Row]:
    if importlib.util.find_spec("torchvision") is None:
        return []
    say("readout of ResNet-50 at 224²")
    torch.manual_seed(0)
    built = build("torchvision:resnet50", num_classes=None, pretrained=False, trust_model=False)
    classifier = Classifier(built.model.eval(), preprocessing=built.preprocessing)
    return _cost_rows("resnet50 at 224²", classifier, torch.rand(3, 224, 224), {}, bound=60.0)


def _cost_rows(
    name: str, classifier: Classifier, image: Tensor, given: dict[str, Any], bound: float | None = None
) -> list[Row]:
    """Forward and backward passes, and seconds, of one image's readout, without its test."""
    rows: list[Row] = []
    for mode in ("exact", "gradient", "paper"):
        reader = Reader(
            classifier,
            Settings(mode=mode, sizes=(0.01, 0.05), size=0.05, controls=0, members=0),
            **given,
        )
        circuit = reader.single(*reader.prepare(image))[0]
        keys: Row = {"experiment": "cost", "subject": name, "metric": "log_prob", "circuit": mode, "n": 1}
        passes = None if mode == "exact" else 5.0
        rows.append(keys | {"figure": "passes of a readout", "value": circuit.passes, "bound": passes})
        limit = bound if mode == "exact" else None
        rows.append(keys | {"figure": "seconds of a readout", "value": circuit.seconds, "bound": limit})
        rows.append(keys | {"figure": "nodes", "value": float(len(circuit.members))})
    return rows


# ---------------------------------------------------------------- writing


def write(rows: Sequence[Row], stem: Path) -> None:
    """The rows as CSV."""
    write_csv(rows, stem, COLUMNS)


def plot(lines: dict[Metric, list[Line]], modes: dict[str, Line], stem: Path) -> None:
    """Faithfulness over size: by what circuits were read from, for each metric, and by mode."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, len(lines) + 1, sharex=True)
    for axes, (metric, found) in zip(panels, lines.items(), strict=False):
        for line in found:
            if line.tested_on == IMAGE:
                _curve(axes, line, line.source, COLOURS[line.source])
        axes.set(title=f"read from …, tested on the image: {metric}", ylabel="faithfulness, mean and 95 %")
    for (name, line), colour in zip(modes.items(), MODE_COLOURS, strict=False):
        _curve(panels[-1], line, name, colour)
    panels[-1].set(title=f"read by …: {MODE_METRICS[0]}")
    for axes in panels:
        axes.axhline(0.8, color="black", linewidth=0.6, linestyle=":")
        axes.set(xscale="log", xlabel="share of the nodes", ylim=(-0.6, 1.25))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="upper left")
    figure.savefig(stem.with_suffix(".png"), dpi=110)


def _curve(axes: Any, line: Line, label: str, colour: str) -> None:
    axes.plot(line.sizes, [v.mean for v in line.curve], "o-", markersize=3, label=label, color=colour)
    low, high = ([getattr(v, side) for v in line.curve] for side in ("low", "high"))
    axes.fill_between(line.sizes, low, high, alpha=0.12, color=colour)
