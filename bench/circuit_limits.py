"""How far circuits carry: figures they were not chosen by, images they were not read from, what none can exceed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from circuit_subjects import Subject

from minexp.circuit.ablation import Metric
from minexp.circuit.comparison import IMAGE, Line, line_of
from minexp.circuit.examine import interval
from minexp.circuit.ranking import NECESSITY, count_of, rank

Row = dict[str, Any]
SIZES = (0.02, 0.1)
WEIGHTS = (NECESSITY, 1.0)
CONTROLS = 20
TESTED: tuple[Metric, ...] = ("log_prob", "logit")
CHOSEN_BY: Metric = "log_prob"
MEMBERS = 8  # images of a class that it needs, half to read from and half to test on
CLASS_CONTROLS = 4
FIGURES = ("faithfulness", "elsewhere", "inside", "outside", "random")
RATIO = 3.0  # that the fall of the score is held to, beside that of random circuits


def limit_rows(subject: Subject) -> Iterable[Row]:
    """Rows of the three experiments."""
    yield from _drop_rows(subject)
    yield from _class_rows(subject)
    yield from _ceiling_rows(subject)


def _drop_rows(subject: Subject) -> Iterable[Row]:
    """Circuits chosen by the log-probability, at two weights of necessity, tested by each figure."""
    reader = subject.reader(metric=CHOSEN_BY)
    chosen = reader.ablation(*reader.prepare(subject.x))
    rankings = {n: rank(chosen, reader.settings.by, sizes=SIZES, necessity=n) for n in WEIGHTS}
    for metric in TESTED:
        tester = subject.reader(metric=metric, sizes=SIZES)
        ablation = tester.ablation(*tester.prepare(subject.x))
        for (necessity, ranking), size in product(rankings.items(), SIZES):
            line = line_of(tester, ablation, ranking, CHOSEN_BY, IMAGE, size=size, controls=CONTROLS)
            keys = {"experiment": "drops", "subject": subject.name, "metric": metric, "tested on": IMAGE}
            keys |= {"circuit": f"exact, by {CHOSEN_BY}, necessity {necessity:g}, {size:g} of the nodes"}
            yield from _rows(keys, line)
            bound = RATIO if metric == "logit" else None
            ratio = line.inside.mean / line.random.mean
            yield keys | {"figure": "inside drop / random drop", "value": ratio, "bound": bound}
            everything = interval((ablation.full - ablation.empty).tolist())
            yield keys | {"figure": "drop of all nodes", "value": everything.mean, "n": everything.n}
            most = everything.mean / line.random.mean
            yield keys | {"figure": "drop of all nodes / random drop", "value": most}


def _rows(keys: Row, line: Line) -> Iterable[Row]:
    for name in FIGURES:
        v = getattr(line, name)
        figure = name if name in FIGURES[:2] else f"{name} drop"
        if v.n:
            yield keys | {"figure": figure, "value": v.mean, "low": v.low, "high": v.high, "n": v.n}


def _class_rows(subject: Subject) -> Iterable[Row]:
    """The circuit of half the images of a class, tested on these and on the other half; means over classes."""
    reader = subject.reader(metric=CHOSEN_BY)
    x, label = reader.prepare(subject.reference)
    found: dict[str, list[Line]] = {"itself": [], "held out": []}
    for y in label.unique().tolist():
        mine = (label == y).nonzero()[:, 0]
        if len(mine) < MEMBERS:
            continue
        read, held = (reader.ablation(x[part], label[part]) for part in (mine[::2], mine[1::2]))
        shared = rank(read, reader.settings.by, sizes=reader.settings.sizes).together()
        for tested_on, ablation in (("itself", read), ("held out", held)):
            line = line_of(reader, ablation, shared, "class", tested_on, controls=CLASS_CONTROLS)
            found[tested_on].append(line)
    for tested_on, lines in found.items():
        keys = {"experiment": "classes", "subject": subject.name, "metric": CHOSEN_BY, "tested on": tested_on}
        keys |= {"circuit": "exact, of a class"}
        for figure in ("faithfulness", "enough", "cpr", "cmd", "inside", "random"):
            v = interval([getattr(line, figure).mean for line in lines])
            name = {"enough": "size enough for 0.8", "inside": "inside drop", "random": "random drop"}
            row = {
                "figure": name.get(figure, figure),
                "value": v.mean,
                "low": v.low,
                "high": v.high,
                "n": v.n,
            }
            if v.n:
                yield keys | row


def _ceiling_rows(subject: Subject) -> Iterable[Row]:
    """The logit of a tenth of the nodes, all in the layers that the score reads, had these all that they read.

    Where the score is linear in what it reads, and no unit exceeds its own value, no circuit of that size has more.
    """
    reader = subject.reader(metric="logit")
    ablation = reader.ablation(*reader.prepare(subject.x))
    net = ablation.net
    last = net.parents(net.scores)
    effect = ablation.gradient(torch.ones(len(ablation), net.nodes))[1]
    final = torch.cat([torch.full((site.units,), site in last) for site in net.ablated])
    best = (
        effect.masked_fill(~final, -torch.inf).topk(min(count_of(0.1, net.nodes), int(final.sum()))).indices
    )
    keep = (~final).expand(len(ablation), -1).scatter(1, best, True)
    v = interval(ablation.faithfulness(keep).tolist())
    yield {
        "experiment": "ceiling",
        "subject": subject.name,
        "metric": "logit",
        "circuit": "0.1 of the nodes, all in the last layer, and all before it",
        "tested on": IMAGE,
        "figure": "faithfulness",
    } | {"value": v.mean, "low": v.low, "high": v.high, "n": v.n}
