"""Cost of a fast explanation in classifier passes: masker, masks, predicate and certificate on k backgrounds.

Weights are random and the masker keeps everything, as before its training, so that the predicate holds at once: what
is timed is the work every explanation needs, without repair. `bound` and `ratio` are of time / ((2 + k) × forward).
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from minexp.backgrounds import HELD_OUT, OTHER, RANDOM
from minexp.certify import PER_FAMILY
from minexp.classifier import Classifier
from minexp.data.subjects import digits
from minexp.explanation import FRESH, explain, make_backgrounds
from minexp.masker import Architecture, Masker
from minexp.predicate import Predicate
from minexp.specs import build

BOUND = 1.35
REPEATS = 5


def measure(quiet: bool) -> list[dict[str, Any]]:
    """Rows for the built-in scenes' classifier at 64² and, where torchvision is installed, ResNet-18 at 224²."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [("scenes", digits().to(device), 64)]
    if importlib.util.find_spec("torchvision") is not None:
        built = build("torchvision:resnet18", num_classes=None, pretrained=False, trust_model=False)
        cases.append(("resnet18", Classifier(built.model.to(device), preprocessing=built.preprocessing), 4))
    return [row for name, classifier, batch in cases for row in _rows(name, classifier, batch, quiet)]


def _rows(name: str, classifier: Classifier, batch: int, quiet: bool) -> list[dict[str, Any]]:
    channels, height, width = classifier.input_shape
    masker = (
        Masker(Architecture(channels=channels, stride=2 if height < 128 else 4)).to(classifier.device).eval()
    )
    masker.reference = torch.randint(0, 256, (8, channels, height, width), dtype=torch.uint8).to(
        classifier.device
    )
    x = torch.rand(batch, channels, height, width, device=classifier.device)
    backgrounds = make_backgrounds(classifier, masker)  # once a job, as in `minexp explain`
    families = len([*RANDOM, *HELD_OUT, OTHER])
    k = Predicate().early + FRESH["fast"] * families
    backgrounds_of = {"fast": k, "fast, full certificate": Predicate().early + PER_FAMILY * families}
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: [_forward(classifier, x) for _ in range(2 + k)],
        "masker": lambda: masker.probabilities(x),
        "fast": lambda: explain(classifier, x, masker, backgrounds=backgrounds),
        "fast, full certificate": lambda: explain(
            classifier, x, masker, backgrounds=backgrounds, fresh=PER_FAMILY
        ),
    }
    times = _interleaved(calls, classifier.device.type, f"{name}: " if not quiet else None)
    rows = []
    for mode, measured in times.items():
        passes = 2 + k if mode == "forward" else 1
        low, middle, high = (statistics.quantiles(measured, n=10)[place] / passes for place in (1, 4, 7))
        row: dict[str, Any] = {
            "op": f"explain {name}",
            "provider": f"torch-{classifier.device.type}",
            "mode": mode,
        }
        row |= {"shape": f"{batch}x{channels}x{height}x{width}", "threads": torch.get_num_threads()}
        row |= {"p20": low, "p50": middle, "p80": high}
        if mode in backgrounds_of:
            count = 2 + backgrounds_of[mode]
            ratios = [a / (count * b / (2 + k)) for a, b in zip(measured, times["forward"], strict=True)]
            row |= {"k": backgrounds_of[mode], "bound": BOUND, "ratio": statistics.median(ratios)}
        rows.append(row)
    return rows


def _forward(classifier: Classifier, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier.logits(x)


def _interleaved(
    calls: dict[str, Callable[[], Any]], device: str, label: str | None
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one round to warm up.

    The calls take turns, and the passes are timed as a run as long as an explanation: whatever else the machine does
    then slows both alike.
    """
    times: dict[str, list[float]] = {mode: [] for mode in calls}
    for repeat in range(REPEATS + 1):
        for mode, call in calls.items():
            started = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[mode].append((time.perf_counter() - started) * 1000)
        if label is not None:
            print(f"{label}round {repeat} of {REPEATS}", file=sys.stderr)
    return times
