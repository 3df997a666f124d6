"""A million rows: a core unit that costs next to nothing through the engine, and the report of a synthetic store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minexp.data.preprocessing import Preprocessing
from minexp.data.scenes import make
from minexp.data.shard import write_shard
from minexp.data.sources import ImageSource, open_source
from minexp.data.store import Store
from minexp.data.table import objects, popcount
from minexp.data.tables import EXPLANATIONS
from minexp.jobs.engine import Placement, run_job
from minexp.jobs.unit import ImageUnit, Unit

Row = dict[str, Any]
SIDE = 64  # of the masks of a million rows
NAMES = tuple(f"class {number}" for number in range(100))
STUB: Row = {
    "fingerprint": "stub",
    "provider": "none",
    "precision": "uint8",
    "class_names": ["dark", "light"],
}


def _stub_units(number: int) -> Unit:
    """A core unit that costs next to nothing: a pixel's threshold."""

    def call(batch: Any) -> list[Row]:
        masks = batch["image"][..., 0] > 128
        kept, area = masks[:, 0, 0].tolist(), masks.mean((1, 2)).tolist()
        return [
            {"status": "certified" if k else "uncertified", "label": int(k), "area": a, "kept": k, "mask": m}
            for k, a, m in zip(kept, area, masks, strict=True)
        ]

    return ImageUnit(call)


def stub(rows: int, folder: Path) -> list[Row]:
    """Tiny rows through the engine: rows a second, growth of memory over the last nine tenths, and resuming."""
    images = np.lib.format.open_memmap(folder / "tiny.npy", "w+", np.uint8, (rows, 8, 8, 3))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 65_536):
        images[start : start + 65_536] = rng.integers(0, 256, images[start : start + 65_536].shape, np.uint8)
    images.flush()
    del images
    source = open_source(folder / "tiny.npy")
    found: list[Row] = []

    def run(name: str, **placement: Any) -> float:
        return seconds_of(lambda: _stub_job(source, folder / name, **placement))

    def add(mode: str, seconds: float, **more: Any) -> None:
        row: Row = {"op": "stub job", "provider": "none", "mode": mode, "shape": f"{rows}x3x8x8"}
        row |= {"images": rows, "seconds": seconds, "rate": rows / seconds, "workers": 1}
        found.append(row | more)

    with _resident() as sizes:
        seconds = run("stub1")
    tenth = max(1, len(sizes) // 10)
    growth = (np.median(sizes[-tenth:]) - np.median(sizes[tenth : 2 * tenth])) / 1e6 if len(sizes) > 20 else 0
    add("1 worker, growth of memory", seconds, memory=max(sizes) / 1e6, bound=64.0, ratio=float(growth))
    resumed = run("stub1")
    add("nothing left to do", resumed, bound=2.0, ratio=resumed)
    before = time.process_time()
    seconds = run("stub2", workers=2)
    parent = time.process_time() - before
    add("2 workers", seconds, workers=2, how=f"its parent computes for {parent:.2f} s", busy=parent)
    return found


def _stub_job(source: ImageSource, out: Path, **placement: Any) -> None:
    run_job(
        _stub_units,
        source,
        out,
        run=STUB,
        preprocessing=Preprocessing((8, 8)),
        class_names=STUB["class_names"],
        batch=256,
        progress=False,
        placement=Placement(**placement),
    )


@contextmanager
def _resident() -> Iterator[list[int]]:
    """Bytes of this process's own memory during the block, ten times a second; pages of files are not its own."""
    sizes: list[int] = []
    over = threading.Event()

    def look() -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
            if over.wait(0.1):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def report(rows: int, folder: Path) -> list[Row]:
    """`minexp report` over a synthetic store, in a process of its own: seconds, memory, and the page's size."""
    store, pictures = folder / "synthetic", folder / "pictures.npy"
    np.save(pictures, make("plain", 256).images)
    _synthetic(store, rows, pictures)
    code = "import sys; from minexp.cli import main; sys.exit(main(sys.argv[1:]))"
    started = time.perf_counter()
    command = [sys.executable, "-c", code, "report", str(store), "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        answer = process.stdout.read() if process.stdout is not None else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    page = Path(json.loads(answer)["report"]).stat().st_size / 1e6
    row: Row = {"op": "report", "provider": "none", "shape": f"{rows} masks of {SIDE}²", "workers": 1}
    row |= {"images": rows, "seconds": seconds, "rate": rows / seconds, "memory": usage.ru_maxrss / 1e3}
    return [
        row | {"mode": "seconds", "bound": 60.0, "ratio": seconds},
        row | {"mode": "memory, MB", "bound": 2000.0, "ratio": usage.ru_maxrss / 1e3},
        row | {"mode": "page, MB", "bound": 15.0, "ratio": page},
    ]


def _synthetic(directory: Path, rows: int, pictures: Path) -> None:
    """A store of discs with believable certificates, written column by column."""
    rng = np.random.default_rng(0)
    run: Row = STUB | {"class_names": list(NAMES), "model": "synthetic", "predicate": "none"}
    run |= {"source_name": "discs", "preprocessing": Preprocessing((SIDE, SIDE)).to_json()}
    with Store(directory, run=run, rows=rows) as store:
        for start, stop in store.missing():
            table = EXPLANATIONS.to_arrow(columns(rng, range(start, stop), SIDE, str(pictures)))
            store.record(write_shard(directory, EXPLANATIONS, run, start, [table]))


def columns(rng: np.random.Generator, places: range, side: int, pictures: str) -> dict[str, Any]:
    """Rows at these positions: discs with rough edges, and certificates drawn at random."""
    n = len(places)
    label = rng.integers(0, len(NAMES), n)
    packed: list[bytes] = []
    for _ in range(0, n, 256):  # as many as fit into a cache
        y, x = np.mgrid[:side, :side].astype(np.float32) / side
        centre = rng.uniform(0.2, 0.8, (2, 256, 1, 1)).astype(np.float32)
        radius = rng.uniform(0.06, 0.2, (256, 1, 1)).astype(np.float32)
        radius = radius * rng.uniform(0.8, 1.2, (256, side, 1)).astype(np.float32)
        masks = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        packed += [mask.tobytes() for mask in np.packbits(masks.reshape(256, -1), axis=1)]
    packed = packed[:n]
    ones = popcount(np.stack([np.frombuffer(mask, np.uint8) for mask in packed])).sum(1, dtype=np.int64)
    kept, conf = rng.random(n) < 0.97, rng.beta(20, 1, n)
    found: dict[str, Any] = {
        "id": [f"{place:09d}.png" for place in places],
        "uri": [f"{pictures}#{place % 256}" for place in places],
        "status": np.where(kept, "certified", "uncertified").astype(object),
        "truth": np.where(rng.random(n) < 0.9, label, rng.integers(0, len(NAMES), n)),
        "label": label,
        "label_name": [NAMES[number] for number in label],
        "conf": conf,
        "label_masked": label,
        "conf_masked": conf * rng.uniform(0.9, 1.0, n),
        "kept": kept,
        "area": ones / side**2,
        "h": np.full(n, side),
        "w": np.full(n, side),
        "mask": objects(packed),
        "mask_crc32": [zlib.crc32(mask) for mask in packed],
        "evaluations": rng.integers(20, 60, n),
        "ms": rng.exponential(20, n),
    }
    shares = ("conf_complement", "conf_empty", "border_share", "robust_train", "robust_heldout")
    return found | {name: rng.random(n) for name in shares}


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
