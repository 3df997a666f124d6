"""What reading images costs: decoders, loaders, and a whole job against the pure computation of the same batches.

Weights are random and the masker keeps everything, so that the predicate holds at once and an image costs as little as
it can: where the loader is no bottleneck here, it is none for real masks. Times are milliseconds an image. `bound` and
`ratio` of a job are of its time over that of `explain` on the same batches, already decoded and in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minexp.certify import Predicate
from minexp.classifier import Classifier
from minexp.data.decoding import decode_image
from minexp.data.items import WORKERS
from minexp.data.preprocessing import Preprocessing
from minexp.data.sources import open_source
from minexp.data.subjects import MEAN, STD, digits
from minexp.explanation import explain, make_backgrounds
from minexp.jobs.local import explain_dataset
from minexp.masker import Architecture, Masker

BOUND = 1.10
ROUNDS = 5
CASES = ((64, 256), (224, 8))  # side of the model's input, and images of a job
PHOTOGRAPH = (500, 375)  # width and height of ImageNet's usual image


def measure(quiet: bool) -> list[dict[str, Any]]:
    """Rows of the decoders, of the loader, and of jobs: the built-in scenes' classifier at its size and at 224²."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        photographs.mkdir()
        for index in range(max(64, *(count for _, count in CASES))):
            (photographs / f"{index:03d}.jpg").write_bytes(jpeg(index))
        rows = _decoders((photographs / "000.jpg").read_bytes()) + _loader(photographs)
        _say(quiet, "decoders and loader measured")
        for size, count in CASES:
            classifier = Classifier(digits().model, mean=(MEAN,) * 3, std=(STD,) * 3, size=size).to(device)
            rows += _job(f"scenes at {size}²", classifier, photographs, count, Path(folder), quiet)
    return rows


def jpeg(seed: int) -> bytes:
    """A photograph's worth of detail: smooth regions, edges, a little grain; quality 90."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)).astype(np.int16)
    image = (image + rng.integers(-6, 7, image.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def _decoders(content: bytes) -> list[dict[str, Any]]:
    """One thread: Pillow, as minexp decodes, and whichever other decoders are installed; then the resizing."""
    width, height = PHOTOGRAPH
    shape = f"{height}x{width} JPEG"
    calls: dict[str, Callable[[], Any]] = {"pillow": lambda: decode_image(io.BytesIO(content))}
    if (simplejpeg := _optional("simplejpeg")) is not None:
        calls["simplejpeg"] = lambda: simplejpeg.decode_jpeg(content)
    if (cv2 := _optional("cv2")) is not None:
        encoded = np.frombuffer(content, np.uint8)
        calls["opencv"] = lambda: cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    times = _interleaved(calls, inner=20)
    rows = [_row("decode", mode, shape, 1, values) for mode, values in times.items()]
    image, settings = decode_image(io.BytesIO(content)), Preprocessing((224, 224), resize=256)
    prepared = _interleaved({"pixels": lambda: settings.pixels(image)}, inner=20)
    return [*rows, _row("resize to 224²", "pillow", shape, 1, prepared["pixels"])]


def _loader(photographs: Path) -> list[dict[str, Any]]:
    """All decoding threads, from a folder, to model inputs."""
    source, settings = open_source(photographs, limit=64), Preprocessing((224, 224), resize=256)
    read = _interleaved({"folder": lambda: list(source.range(prepare=settings.pixels, ahead=32))}, inner=1)
    values = [value / len(source) for value in read["folder"]]
    return [_row("loader", "folder", f"{PHOTOGRAPH[1]}x{PHOTOGRAPH[0]} JPEG", WORKERS, values)]


def _job(
    name: str, classifier: Classifier, photographs: Path, count: int, folder: Path, quiet: bool
) -> list[dict[str, Any]]:
    channels, height, width = classifier.input_shape
    masker = (
        Masker(Architecture(channels=channels, stride=2 if height < 128 else 4)).to(classifier.device).eval()
    )
    masker.reference = torch.randint(0, 256, (8, channels, height, width), dtype=torch.uint8)
    source, predicate = open_source(photographs, limit=count), Predicate()
    pixels = [
        item.image for item in source.range(prepare=classifier.preprocessing.pixels) if item.image is not None
    ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255).to(classifier.device)
    batch = min(32, count)

    def compute() -> None:
        backgrounds = make_backgrounds(classifier, masker)
        for part in x.split(batch):
            explain(classifier, part, masker, predicate=predicate, backgrounds=backgrounds)

    def job() -> None:
        explain_dataset(
            classifier,
            source,
            masker,
            folder / f"{name}-out",
            batch=batch,
            resume=False,
            progress=False,
            predicate=predicate,
        )

    times = _interleaved({"compute": compute, "job": job}, inner=1)
    _say(quiet, f"{name} measured")
    shape = f"{count}x{channels}x{height}x{width}"
    provider = f"torch-{classifier.device.type}"
    rows = [
        _row(
            f"explain {name}",
            mode,
            shape,
            torch.get_num_threads(),
            [value / count for value in values],
            provider,
        )
        for mode, values in times.items()
    ]
    ratios = [job / compute for compute, job in zip(times["compute"], times["job"], strict=True)]
    rows[-1] |= {"bound": BOUND, "ratio": statistics.median(ratios)}
    return rows


def _interleaved(calls: dict[str, Callable[[], Any]], inner: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one to warm up; they take turns, so that noise hits all alike."""
    times: dict[str, list[float]] = {mode: [] for mode in calls}
    for repeat in range(ROUNDS + 1):
        for mode, call in calls.items():
            started = time.perf_counter()
            for _ in range(inner):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[mode].append((time.perf_counter() - started) * 1000 / inner)
    return times


def _row(
    op: str, mode: str, shape: str, threads: int, values: list[float], provider: str = "cpu"
) -> dict[str, Any]:
    low, middle, high = (statistics.quantiles(values, n=10)[place] for place in (1, 4, 7))
    row: dict[str, Any] = {"op": op, "provider": provider, "mode": mode, "shape": shape, "threads": threads}
    return row | {"p20": low, "p50": middle, "p80": high}


def _optional(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr)
