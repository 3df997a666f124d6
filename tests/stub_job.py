"""A job without a model: each image's mask follows from its pixels. `python stub_job.py DATA OUT [OPTIONS as JSON]`."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faults import Chaos

from minexp.data.preprocessing import Preprocessing
from minexp.data.sources import open_source
from minexp.errors import MinexpError
from minexp.jobs.engine import Placement, run_job
from minexp.jobs.unit import DeviceError, ImageUnit, Unit

SIZE = 8
RUN = {"fingerprint": "stub", "provider": "none", "precision": "uint8", "class_names": ["dark", "light"]}


@dataclass(frozen=True)
class Stub:
    """Makes the unit. An image whose first pixel is a key of ``fate`` meets it: its process is killed, exits, its
    device breaks, or it throws. seconds: a batch takes; start: what happens to a worker before it is ready.
    """

    seconds: float = 0.0
    fate: tuple[tuple[int, str], ...] = ()
    start: str = ""
    chaos: Chaos | None = None

    def __call__(self, number: int) -> Unit:
        if self.start:
            meet(self.start)
        fates = dict(self.fate)

        def call(batch: Any) -> list[dict[str, Any]]:
            if self.chaos is not None:
                self.chaos.batch()
            time.sleep(self.seconds)
            for image in batch["image"]:
                if (value := int(image[0, 0, 0])) in fates:
                    meet(fates[value])
            return [row(image) for image in batch["image"]]

        return ImageUnit(call)


def meet(fate: str) -> None:
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "exit":
        os._exit(7)
    if fate == "device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    raise ZeroDivisionError(fate)


def row(image: Any) -> dict[str, Any]:
    mask = image[..., 0] > 128
    kept = bool(mask[0, 0])
    return {
        "status": "certified" if kept else "uncertified",
        "label": int(kept),
        "area": float(mask.mean()),
        "kept": kept,
        "robust_train": float(image[..., 1].mean()) / 255,
        "evaluations": int(image[0, 0, 1]),
        "mask": mask,
    }


def make_data(path: Path, count: int, seed: int = 0) -> Path:
    """Random images whose first pixel is even, as an array file."""
    images = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, 0, 0, 0] &= 254
    np.save(path, images)
    return path


def run(data: Path, out: Path, stub: Stub = Stub(), **options: Any) -> dict[str, Any]:
    job = {name: options.pop(name) for name in ("batch", "resume", "progress", "run") if name in options}
    job = {"batch": 16, "progress": False, "run": RUN} | job
    return run_job(
        stub,
        open_source(data),
        out,
        preprocessing=Preprocessing((SIZE, SIZE)),
        class_names=RUN["class_names"],
        placement=Placement(**options),
        **job,
    )


if __name__ == "__main__":
    data, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    try:
        chaos = Chaos(*options.pop("chaos")) if "chaos" in options else None
        print(json.dumps(run(data, out, Stub(options.pop("seconds", 0.0), chaos=chaos), **options)))
    except MinexpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except DeviceError:
        sys.exit(70)
