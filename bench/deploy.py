"""Deployment: masker, classifier, whole explanations, and a folder of JPEGs to Parquet, in torch and in ONNX Runtime.

Weights are random and the masker keeps everything, so that the predicate holds at once: what is timed is the work that
every explanation needs. Providers take turns within a round, so that what else the machine does slows all alike.
Writes deploy-DEVICE.csv and .png to bench/results. `speedup` is over torch eager with the same threads and batch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy_networks import BATCHES, Call, Row, classifier_rows, masker_rows, timed
from PIL import Image
from rows import COLUMNS as ROWS
from rows import write_csv

from minexp.classifier import Classifier
from minexp.data.sources import open_source
from minexp.data.subjects import digits
from minexp.deploy.export import Draft
from minexp.deploy.job import explain_dataset as explain_onnx
from minexp.deploy.runtime import Explainer
from minexp.jobs.local import explain_dataset as explain_torch
from minexp.masker import Architecture, Masker
from minexp.predicate import Predicate

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (*ROWS[:-1], "memory")  # no bandwidth, but memory
JPEGS = 96


def measure(quiet: bool) -> list[Row]:
    """Rows for `minexp bench deploy`, times in ms of one call (of one image for folders), memory in MB."""
    torch.manual_seed(0)
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    rows = [*masker_rows(say), *classifier_rows(say), *_explainer_rows(say)]
    write(rows, RESULTS / f"deploy-{'cuda' if torch.cuda.is_available() else 'cpu'}")
    return rows


# ---------------------------------------------------------------- whole explanations


def _explainer_rows(say: Callable[[str], None]) -> Iterable[Row]:
    torch.set_num_threads(1)
    classifier, masker = digits(), Masker(Architecture(stride=2)).eval()
    side = classifier.input_shape[1]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    masker.reference = torch.from_numpy(pixels[:8]).permute(0, 3, 1, 2).contiguous()
    draft = Draft.make(classifier, masker, Predicate(), "mean", 0)
    networks = draft.networks()
    reference = draft.torch(pixels[:16])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = {}
        for mode, nets in (("fp32", networks), ("int8", draft.quantised(networks, pixels[:16]))):
            precision = "float32" if mode == "fp32" else "int8"
            paths[mode] = root / f"{mode}.onnx"
            paths[mode].write_bytes(draft.checked(nets, pixels[:16], reference, precision=precision)[0])
        explainers = {mode: Explainer(path, trusted=True) for mode, path in paths.items()}
        for batch in BATCHES:
            say(f"explanation: batch {batch}")
            part = pixels[:batch]
            calls: dict[tuple[str, str], Call] = {("torch-cpu", "eager"): partial(draft.torch, part)}
            for mode, explainer in explainers.items():
                calls["onnxruntime-cpu", mode] = partial(explainer.explain, part)
            yield from timed(f"explain {side}²", calls, f"{batch}x3x{side}x{side}", 1, repeats=9)
        say("JPEG folder to Parquet")
        yield from _folder_rows(root, classifier, masker, explainers, rng)
        say("cold start and memory")
        yield from _cold_rows(root, paths)


def _folder_rows(
    root: Path,
    classifier: Classifier,
    masker: Masker,
    explainers: dict[str, Explainer],
    rng: np.random.Generator,
) -> Iterable[Row]:
    """End to end: decoding, resizing, explaining, storing; ms an image."""
    (root / "jpegs").mkdir()
    for number in range(JPEGS):
        noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(
            root / "jpegs" / f"{number:04d}.jpg", quality=90
        )
    source = open_source(root / "jpegs")
    settings: dict[str, Any] = {"progress": False, "resume": False}
    torch_job = partial(explain_torch, classifier, source, masker, root / "torch", **settings)
    calls: dict[tuple[str, str], Call] = {("torch-cpu", "eager"): torch_job}
    for mode, explainer in explainers.items():
        calls["onnxruntime-cpu", mode] = partial(explain_onnx, explainer, source, root / mode, **settings)
    yield from timed("JPEG to Parquet", calls, f"{JPEGS}x3x375x500", 1, repeats=2, images=JPEGS)


COLD = """
import json, sys, time
started = time.perf_counter()
{body}
import re
memory = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e6
print(json.dumps([(time.perf_counter() - started) * 1000, memory]))
"""
TORCH = """
import torch
torch.set_num_threads(1)
from minexp.data.subjects import digits
from minexp.explanation import explain
from minexp.masker import Masker
masker = Masker().eval()
masker.reference = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
explain(digits(), torch.rand(1, 3, 64, 64), masker)
"""
RUNTIME = """
import numpy as np
from minexp.deploy import Explainer
explainer = Explainer({path!r}, trusted={trusted})
explainer.explain(np.zeros((1, 64, 64, 3), np.uint8))
"""


def _cold_rows(root: Path, paths: dict[str, Path]) -> Iterable[Row]:
    """From starting Python's first import to the first explanation, and the memory of that."""
    bodies = {("torch-cpu", "eager"): TORCH}
    bodies |= {
        ("onnxruntime-cpu", mode): RUNTIME.format(path=str(p), trusted=True) for mode, p in paths.items()
    }
    bodies["onnxruntime-cpu", "fp32, tried first"] = RUNTIME.format(path=str(paths["fp32"]), trusted=False)
    eager = 0.0
    for (provider, mode), body in bodies.items():
        found = [_child(body) for _ in range(3)]
        milliseconds = statistics.median(ms for ms, _ in found)
        eager = eager or milliseconds
        row: Row = {
            "op": "cold start",
            "provider": provider,
            "mode": mode,
            "shape": "1x3x64x64",
            "threads": 1,
        }
        row |= {
            "p50": milliseconds,
            "speedup": eager / milliseconds,
            "memory": max(memory for _, memory in found),
        }
        yield row


def _child(body: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", COLD.format(body=body)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    milliseconds, memory = json.loads(done.stdout.splitlines()[-1])
    return milliseconds, memory


# ---------------------------------------------------------------- writing


def write(rows: list[Row], stem: Path) -> None:
    """The rows as CSV and, where matplotlib is installed, as bars of the speed over torch eager."""
    write_csv(rows, stem, COLUMNS)
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["op"], row["shape"], row["threads"]) for row in rows))
    kinds = list(dict.fromkeys((row["provider"], row["mode"]) for row in rows))
    figure = Figure(figsize=(11, 0.42 * len(rows) / 2 + 2), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(kinds):
        mine = {
            (r["op"], r["shape"], r["threads"]): r["speedup"]
            for r in rows
            if (r["provider"], r["mode"]) == kind
        }
        at = [
            g + (place - len(kinds) / 2) * 0.8 / len(kinds) for g, group in enumerate(groups) if group in mine
        ]
        axes.barh(
            at, [mine[group] for group in groups if group in mine], 0.8 / len(kinds), label=" ".join(kind)
        )
    axes.set_yticks(range(len(groups)), [f"{op} · {shape} · {threads} thr." for op, shape, threads in groups])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as torch eager")
    figure.legend(loc="outside lower center", ncols=len(kinds))
    figure.savefig(stem.with_suffix(".png"), dpi=110)
