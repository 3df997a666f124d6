"""`minexp bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..errors import RequestError
from .base import DONE, Command


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure the operators, the whole explanation, its quality, and the reading of images (in a source checkout)."""

    example = "minexp bench explain"

    suite: Positional[Literal["kernels", "explain", "data", "deploy", "mosaic", "peers", "ablation"]]
    """kernels, explain, data, deploy: times; mosaic: whether the tile that decides is named; peers: against other
    explainers; ablation: what each term of the objective is worth."""
    images: int | None = None
    """Images to explain (mosaic, peers, ablation)."""
    out: Path | None = None
    """Folder for tables and plots; a demo in its subfolder VARIANT lends classifier and masker (peers, ablation)."""
    variant: Literal["plain", "shortcut", "mosaic", "segments"] | None = None
    """Scenes to compare explainers on (peers)."""
    peers: str | None = None
    """Explainers to compare with, separated by commas, or none (peers)."""
    seed: int | None = None
    """Seed of the scenes (mosaic, peers, ablation)."""

    def run(self) -> int:
        import runpy

        script = Path(__file__).resolve().parents[2] / "bench" / "run.py"
        if not script.is_file():
            raise RequestError(
                "the benchmarks are not installed with the package; run this in a source checkout"
            )
        options = [f"--{name}" for name in ("json", "quiet") if getattr(self, name)]
        names = ("images", "out", "variant", "peers", "seed")
        options += [f"--{name}={value}" for name in names if (value := getattr(self, name)) is not None]
        return int(runpy.run_path(str(script))["main"]([self.suite, *options]) or DONE)
