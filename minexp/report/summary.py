"""What a store says as a whole: figures with intervals, classes, background families, and warnings."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ..data.store import read_run, read_store
from .intervals import Estimate, mean_of, share_of
from .survey import Survey, survey

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_NUMBERS = (
    *(
        "truth",
        "label",
        "conf",
        "conf_masked",
        "conf_complement",
        "conf_empty",
        "kept",
        "area",
        "border_share",
    ),
    *("robust_train", "robust_heldout", "robust_other", "dilation_kept", "evaluations"),
)
# How background families are called for readers, and which were used to find the masks.
FAMILIES = {
    "mean": ("training", "mean colour"),
    "uniform": ("training", "uniform noise"),
    "gaussian": ("training", "Gaussian noise"),
    "flat": ("training", "random flat colour"),
    "phase": ("training", "phase-scrambled"),
    "blur": ("held out", "the image, blurred"),
    "shuffled": ("held out", "shuffled patches"),
    "texture": ("held out", "textures"),
    "other": ("rival evidence", "other images"),
}
_FAMILY_ROWS = 20_000  # JSON of more rows than this is sampled: the means no longer move


@dataclass(frozen=True)
class Concern:
    """Something a reader should know before believing the masks; ``rows`` are the positions it concerns."""

    key: str
    chip: str
    text: str
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassLine:
    label: int
    name: str
    count: int
    failed: float
    correct: float | None
    area: Estimate
    kept: float
    robust_train: float
    robust_heldout: float


@dataclass(frozen=True)
class Summary:
    """Columns of all rows as float arrays (NaN for null), where their masks lie, and what follows from them."""

    run: Mapping[str, Any]
    rows: int
    values: Mapping[str, Floats]
    certified: Flags
    error: Flags
    classes: list[ClassLine]
    families: list[tuple[str, Estimate]]
    error_kinds: list[tuple[str, int]]
    survey: Survey
    warnings: list[Concern] = field(default_factory=list)

    @property
    def explained(self) -> Flags:
        return ~self.error

    @property
    def truth_known(self) -> bool:
        """Whether every explained row has its true class."""
        return bool(self.explained.any() and np.isfinite(self.values["truth"][self.explained]).all())

    @property
    def right(self) -> Flags:
        return self.explained & (self.values["truth"] == self.values["label"])

    @property
    def mistaken(self) -> Flags:
        """Rows whose class is not the true one, where that is known."""
        return (
            self.explained
            & np.isfinite(self.values["truth"])
            & (self.values["truth"] != self.values["label"])
        )

    def mean(self, column: str, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Estimate | None:
        return mean_of(self.values[column][self.explained], bounds=bounds)

    def share(self, flags: Flags) -> Estimate | None:
        """Share of the explained rows that are flagged."""
        return share_of(int((flags & self.explained).sum()), int(self.explained.sum()))


def summarise(directory: Path) -> Summary:
    """Read a store's columns, and its masks shard by shard."""
    run = read_run(directory)
    table = read_store(directory, ["status", *_NUMBERS])
    values = {name: _floats(table[name]) for name in _NUMBERS}
    certified = _equal(table["status"], "certified")
    error = _equal(table["status"], "error")
    summary = Summary(
        run=run,
        rows=table.num_rows,
        values=values,
        certified=certified,
        error=error,
        classes=_classes(directory, run, values, certified, ~error),
        families=_families(directory),
        error_kinds=_error_kinds(directory) if error.any() else [],
        survey=survey(directory, values["label"]),
    )
    summary.warnings.extend(_warnings(summary) + _misplaced(summary))
    return summary


def _floats(column: Any) -> Floats:
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)


def _equal(column: Any, value: str) -> Flags:
    return np.asarray(pc.fill_null(pc.equal(column, value), False).to_numpy(), dtype=bool)


def _classes(
    directory: Path, run: Mapping[str, Any], values: Mapping[str, Floats], certified: Flags, explained: Flags
) -> list[ClassLine]:
    """One line a predicted class, the most frequent first."""
    labels = values["label"]
    usable = explained & np.isfinite(labels)
    present, index = np.unique(labels[usable].astype(np.int64), return_inverse=True)
    if not len(present):
        return []
    names = _names(directory, run)
    order = np.argsort(index, kind="stable")
    groups = np.split(np.flatnonzero(usable)[order], np.cumsum(np.bincount(index))[:-1])
    lines = []
    for label, rows in zip(present.tolist(), groups, strict=True):
        area = mean_of(values["area"][rows], bounds=(0.0, 1.0))
        truth = values["truth"][rows]
        known = np.isfinite(truth)
        if area is None:
            continue
        lines.append(
            ClassLine(
                label=label,
                name=names.get(label, str(label)),
                count=len(rows),
                failed=float(1 - certified[rows].mean()),
                correct=float((truth[known] == label).mean()) if known.any() else None,
                area=area,
                kept=_mean(values["kept"][rows]),
                robust_train=_mean(values["robust_train"][rows]),
                robust_heldout=_mean(values["robust_heldout"][rows]),
            )
        )
    return sorted(lines, key=lambda line: (-line.count, line.name))


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _names(directory: Path, run: Mapping[str, Any]) -> dict[int, str]:
    pairs = read_store(directory, ["label", "label_name"]).group_by(["label", "label_name"]).aggregate([])
    names = {
        int(pair["label"]): pair["label_name"] for pair in pairs.to_pylist() if pair["label"] is not None
    }
    known = dict(enumerate(run.get("class_names") or ()))
    return {label: name or str(known.get(label, label)) for label, name in names.items()}


def _families(directory: Path) -> list[tuple[str, Estimate]]:
    """Share of backgrounds with the class kept, by family: the mean over images."""
    column = pc.drop_null(read_store(directory, ["robust_families"])["robust_families"])
    if len(column) > _FAMILY_ROWS:
        column = column.take(np.random.default_rng(0).choice(len(column), _FAMILY_ROWS, replace=False))
    shares: dict[str, list[float]] = {}
    for text in column.to_pylist():
        for family, share in json.loads(text).items():
            if isinstance(share, (int, float)):
                shares.setdefault(family, []).append(float(share))
    means = ((family, mean_of(np.array(values), bounds=(0.0, 1.0))) for family, values in shares.items())
    return [(family, mean) for family, mean in means if mean is not None]


def _error_kinds(directory: Path) -> list[tuple[str, int]]:
    return Counter(pc.drop_null(read_store(directory, ["error"])["error"]).to_pylist()).most_common(12)


def _warnings(summary: Summary) -> list[Concern]:
    v = summary.values
    with np.errstate(invalid="ignore"):
        found = [
            (
                "empty",
                "empty image suffices",
                "The classifier gives this class at least half of its probability on an empty image, with every pixel"
                " removed. Such a mask explains little: the class is what the model answers by default.",
                v["conf_empty"] >= 0.5,
            ),
            (
                "rises",
                "confidence rises",
                "The masked image is classified with far more confidence (0.2 or more) than the whole image. Rivals may"
                " have been removed, but this is also how adversarial masks look: check the held-out backgrounds.",
                v["conf_masked"] - v["conf"] >= 0.2,
            ),
            (
                "border",
                "hugs the border",
                "More than 30 % of the mask lies in the outermost 4 % of the image, where objects rarely are"
                " (a mask spread evenly would have about 15 % there).",
                v["border_share"] > 0.3,
            ),
            (
                "complement",
                "rest suffices too",
                "What the mask leaves out is enough for the class as well (p ≥ 0.5). The mask is sufficient,"
                " but not necessary: the image holds the evidence more than once.",
                v["conf_complement"] >= 0.5,
            ),
            (
                "foreign",
                "fails on new backgrounds",
                "The class survives on less than half of the held-out backgrounds, a kind the mask was never fitted to."
                " The mask may exploit its training backgrounds.",
                v["robust_heldout"] < 0.5,
            ),
            (
                "dilation",
                "breaks when widened",
                "The class is lost when the mask grows by one pixel on all sides. An explanation that more of the same"
                " evidence destroys rests on a pattern of single pixels.",
                v["dilation_kept"] == 0,
            ),
            (
                "collapsed",
                "empty or full mask",
                "The mask covers less than 0.1 % or more than 95 % of the image: it separates nothing from nothing.",
                (v["area"] < 0.001) | (v["area"] > 0.95),
            ),
        ]
    return [
        Concern(key, chip, text, np.flatnonzero(flags & summary.explained))
        for key, chip, text, flags in found
        if (flags & summary.explained).any()
    ]


def _misplaced(summary: Summary) -> list[Concern]:
    """Classes whose evidence lies in one corner or along the border."""
    alarms = {
        line.label: line
        for line in summary.classes
        if (m := summary.survey.classes.get(line.label)) and m.alarm
    }
    if not alarms:
        return []
    told = [
        f"{line.name} ({summary.survey.classes[label].alarm})" for label, line in list(alarms.items())[:5]
    ]
    more = f", and {len(alarms) - len(told)} more classes" if len(alarms) > len(told) else ""
    return [
        Concern(
            "shortcut",
            "evidence at the edge",
            f"The masks of some classes lie where objects seldom are: {'; '.join(told)}{more}. Look for a watermark, a"
            " frame, a logo or a time stamp that goes with the class in the training data: the classifier may have"
            " learnt it in the object's place.",
            np.flatnonzero(np.isin(summary.values["label"], list(alarms)) & summary.explained),
        )
    ]
