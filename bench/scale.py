"""A large data set: images a second by stage, over workers and engines, and a million rows in store and report.

Stages are measured on one thread, weights being random and the masker keeping everything, so that the predicate holds
at once: a trained masker's masks cost a few evaluations more. `rate` is images (rows) a second, `ratio` what `bound`
is about (times as fast as one worker, time over pure compute, seconds, MB), `memory` MB, `how` the arithmetic of a
projection. Writes scale-DEVICE.csv and .png to ``out`` (bench/results). Full size: `--scenes 20000 --rows 1000000`.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import PHOTOGRAPH, jpeg
from rows import write_csv
from scale_rows import STUB, Row, columns, report, seconds_of, stub

from minexp.classifier import Classifier
from minexp.data.decoding import decode_image
from minexp.data.preprocessing import Preprocessing
from minexp.data.scenes import make
from minexp.data.shard import write_shard
from minexp.data.sources import open_source
from minexp.data.subjects import digits
from minexp.data.tables import EXPLANATIONS
from minexp.explanation import explain, make_backgrounds
from minexp.jobs.engine import Placement
from minexp.jobs.local import explain_dataset
from minexp.masker import Architecture, Masker
from minexp.specs import build

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    *("op", "provider", "mode", "shape", "workers", "images", "seconds", "rate", "bound", "ratio", "memory"),
    "how",
)
ROUNDS = 5
MEASURED = 32  # images of a stage's measurement at 64², a quarter of them at 224²
RAY = importlib.util.find_spec("ray") is not None
ZOO = importlib.util.find_spec("torchvision") is not None
PROJECTED = (10**6, 10**8, 10**9)
CORES, PRICE = 64, 0.05  # of the machine that is projected to, and US dollars a core and hour, as clouds ask
LINK = 1.25e9  # bytes a second from an object store into one machine: 10 Gbit/s


def measure(quiet: bool, *, scenes: int = 512, rows: int = 20_000, out: str | Path = RESULTS) -> list[Row]:
    """scenes: explained end to end with one worker, two, and on Ray; rows: of the stub's job and of the report."""
    torch.manual_seed(0)
    found: list[Row] = []

    def say(more: list[Row]) -> None:
        found.extend(more)
        if not quiet:
            for row in more:
                print(" ".join(f"{row[name]}" for name in COLUMNS if name in row), file=sys.stderr)

    with tempfile.TemporaryDirectory() as name, _one_thread():
        folder = Path(name)
        subjects = [_Subject("scenes", digits(), MEASURED)]
        if ZOO:
            built = build("torchvision:resnet18", num_classes=None, pretrained=False, trust_model=False)
            model = Classifier(built.model, preprocessing=built.preprocessing)
            subjects.append(_Subject("resnet18", model, MEASURED // 4))
        for subject in subjects:
            say(_stages(subject, folder))
        say(_jobs(subjects[0], scenes, folder))
        say(stub(rows, folder))
        say(report(rows, folder))
        say([line for subject in subjects for line in _projection(subject, found)])
    write(found, Path(out) / f"scale-{'cuda' if torch.cuda.is_available() else 'cpu'}")
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """A worker's share, in this process: what is compared are workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Subject:
    """A classifier of random weights, a masker that keeps everything, and how many images are measured at once."""

    name: str
    classifier: Classifier
    count: int

    def __post_init__(self) -> None:
        self.classifier.to("cuda" if torch.cuda.is_available() else "cpu")
        channels, self.height, self.width = self.classifier.input_shape
        self.masker = Masker(Architecture(channels=channels, stride=2 if self.height < 128 else 4))
        self.masker = self.masker.to(self.classifier.device).eval()
        self.masker.reference = torch.randint(
            0, 256, (8, channels, self.height, self.width), dtype=torch.uint8, device=self.classifier.device
        )

    @property
    def provider(self) -> str:
        return f"torch-{self.classifier.device.type}"

    @property
    def op(self) -> str:
        return f"{self.name} at {self.height}²"


# ---------------------------------------------------------------- stages


def _stages(subject: _Subject, folder: Path) -> list[Row]:
    """Images a second on one thread: decode, classifier, masker, certify (what else an explanation needs), write."""
    classifier, masker, count = subject.classifier, subject.masker, subject.count
    content = [jpeg(index) for index in range(count)]
    settings = Preprocessing((subject.height, subject.width), resize=round(subject.height * 256 / 224))
    pixels = np.stack([settings.pixels(decode_image(io.BytesIO(one))) for one in content])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).to(classifier.device)
    backgrounds = make_backgrounds(classifier, masker)
    side = subject.height
    rows_written = 2048
    table = EXPLANATIONS.to_arrow(columns(np.random.default_rng(0), range(rows_written), side, "d.npy"))
    (target := folder / f"{subject.name}-written").mkdir()
    starts = iter(range(0, 10**9, rows_written))

    def decode() -> None:
        for one in content:
            settings.pixels(decode_image(io.BytesIO(one)))

    @torch.no_grad()
    def classify() -> None:
        classifier.logits(x)

    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "decode": (decode, count),
        "classifier": (classify, count),
        "masker": (lambda: masker.probabilities(x), count),
        "explain": (lambda: explain(classifier, x, masker, backgrounds=backgrounds), count),
        "write": (
            lambda: write_shard(target, EXPLANATIONS, STUB, next(starts), [table]),
            rows_written,
        ),
    }
    times: dict[str, list[float]] = {mode: [] for mode in calls}
    for repeat in range(ROUNDS + 1):
        for mode, (call, images) in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[mode].append((time.perf_counter() - started) / images)
    seconds = {mode: float(np.median(values)) for mode, values in times.items()}
    seconds["certify"] = max(1e-9, seconds.pop("explain") - seconds["classifier"] - seconds["masker"])
    size = sum(path.stat().st_size for path in target.iterdir()) / next(starts)
    order = ("decode", "classifier", "masker", "certify", "write")
    source = {"decode": f"{PHOTOGRAPH[1]}x{PHOTOGRAPH[0]} JPEG", "write": f"{size:.0f} bytes a row"}
    shape = f"{count}x{'x'.join(map(str, classifier.input_shape))}"
    rows: list[Row] = [
        {
            "op": f"stage of {subject.op}",
            "provider": subject.provider if mode in ("classifier", "masker", "certify") else "cpu",
            "mode": mode,
            "shape": source.get(mode, shape),
            "workers": 1,
            "images": count,
            "rate": 1 / seconds[mode],
        }
        for mode in order
    ]
    return rows


# ---------------------------------------------------------------- jobs


def _jobs(subject: _Subject, count: int, folder: Path) -> list[Row]:
    """The pure computation, and whole jobs of the same images with one worker, two, and two on Ray."""
    made = make("plain", min(count, 2000)).images
    np.save(folder / "scenes.npy", np.concatenate([made] * -(-count // len(made)))[:count])
    source = open_source(folder / "scenes.npy")
    batch = 32
    backgrounds = make_backgrounds(subject.classifier, subject.masker)

    def compute() -> None:
        images = np.load(folder / "scenes.npy", mmap_mode="r")
        for start in range(0, count, batch):
            x = torch.from_numpy(images[start : start + batch].copy()).to(subject.classifier.device)
            x = x.permute(0, 3, 1, 2).float().div_(255)
            explain(subject.classifier, x, subject.masker, backgrounds=backgrounds)

    def job(name: str, **placement: Any) -> float:
        return seconds_of(
            lambda: explain_dataset(
                subject.classifier,
                source,
                subject.masker,
                folder / name,
                batch=batch,
                progress=False,
                placement=Placement(**placement),
            )
        )

    explain(subject.classifier, torch.rand(2, *subject.classifier.input_shape), subject.masker)  # warm
    seconds = {"compute": seconds_of(compute), "1 worker": job("one")}
    seconds["2 workers"] = job("two", workers=2)
    if RAY:
        seconds["ray, 2 workers"] = job("ray", engine="ray", workers=2)
    ratios = {
        "1 worker": (1.10, seconds["1 worker"] / seconds["compute"]),
        "2 workers": (1.8, seconds["1 worker"] / seconds["2 workers"]),
        "ray, 2 workers": (None, seconds["1 worker"] / seconds.get("ray, 2 workers", np.nan)),
    }
    rows = []
    for mode, took in seconds.items():
        bound, ratio = ratios.get(mode, (None, None))
        row: Row = {"op": f"job of {subject.op}", "provider": subject.provider, "mode": mode}
        row |= {"shape": f"{count}x{'x'.join(map(str, subject.classifier.input_shape))}"}
        row |= {"workers": 2 if "2" in mode else 1, "images": count, "seconds": took, "rate": count / took}
        rows.append(row | {"bound": bound, "ratio": ratio})
    return rows


# ---------------------------------------------------------------- projections


def _projection(subject: _Subject, found: list[Row]) -> list[Row]:
    """Hours and dollars for many images on a machine with CORES cores like this one's, and what is full first."""
    stages = {row["mode"]: row for row in found if row["op"] == f"stage of {subject.op}"}
    ms = {mode: 1000 / row["rate"] for mode, row in stages.items()}
    whole = sum(ms.values())
    core = _core()
    rows: list[Row] = []

    def add(mode: str, how: str, **more: Any) -> None:
        row: Row = {"op": f"projection of {subject.op}", "provider": core, "mode": mode, "shape": ""}
        rows.append(row | {"workers": CORES, "how": how} | more)

    for images in PROJECTED:
        hours = images * whole / 3.6e6 / CORES
        add(
            f"{images:,} images",
            f"{images:.0e} x {whole:.2f} ms / 3.6e6 ms / {CORES} cores = {hours:.4g} h;"
            f" x {CORES} cores x ${PRICE} = ${hours * CORES * PRICE:,.2f}",
            images=images,
            seconds=hours * 3600,
            rate=images / hours / 3600,
        )
    parent = next(row["images"] / row["busy"] for row in found if "busy" in row)
    a_row = float(stages["write"]["shape"].split()[0])
    size = len(jpeg(0))
    rate = CORES * 1000 / whole
    add(
        "one parent is busy",
        f"{parent:.0f} rows a second of its CPU time / ({1000 / whole:.1f} images/s a core) ="
        f" {parent * whole / 1000:.0f} cores; beyond that: --shard I/N, a parent each",
        ratio=parent * whole / 1000,
    )
    add(
        "10 Gbit/s from the object store are full",
        f"{LINK:.3g} bytes/s / ({size} bytes x {1000 / whole:.1f} images/s a core) ="
        f" {LINK * whole / size / 1000:.0f} cores; {CORES} cores read {rate * size / 1e6:.0f} MB/s;"
        " beyond that: a machine more",
        ratio=LINK * whole / size / 1000,
    )
    shards = PROJECTED[-1] / 8192
    add(
        "store and journal of the largest",
        f"1e9 x {a_row:.0f} bytes = {a_row:.0f} GB in {shards:.0f} shards; its journal of 0.4 kB a shard"
        f" = {shards * 0.4 / 1000:.0f} MB, read once",
        images=PROJECTED[-1],
        memory=a_row * 1000,
    )
    return rows


def _core() -> str:
    """The name of this machine's processor."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0]} core" if names else "core"


# ---------------------------------------------------------------- writing


def write(rows: list[Row], stem: Path) -> None:
    """The rows as CSV and, where matplotlib is installed, as a plot of the stages and of the jobs."""
    write_csv(rows, stem, COLUMNS)
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = list(dict.fromkeys(row["op"] for row in rows if row["op"].startswith("stage")))
    for place, group in enumerate(groups):
        mine = [row for row in rows if row["op"] == group]
        whole, begin = sum(1 / row["rate"] for row in mine), 0.0
        for number, row in enumerate(mine):
            share = 1 / row["rate"] / whole
            left.barh(place, share, left=begin, color=f"C{number}", label=None if place else row["mode"])
            begin += share
        left.text(0.5, place, f"{1 / whole:.1f} images/s", ha="center", va="center", color="white")
    left.set_yticks(range(len(groups)), [group.removeprefix("stage of ") for group in groups])
    left.set_xlabel("share of an image's time on one core")
    left.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    jobs = [row for row in rows if row["op"].startswith("job")]
    right.barh([row["mode"] for row in jobs], [row["rate"] for row in jobs])
    right.invert_yaxis()
    right.set_xlabel(f"images/s, {jobs[0]['images']:,} scenes")
    figure.savefig(stem.with_suffix(".png"), dpi=110)
