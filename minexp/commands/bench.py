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
    """Measure operators, explanations, their quality, circuits, and the reading of images (in a source checkout)."""

    example = "minexp bench explain"

    suite: Positional[
        Literal["kernels", "explain", "data", "deploy", "mosaic", "peers", "ablation", "circuit", "scale"]
    ]
    """kernels, explain, data, deploy, scale: times; mosaic: whether the tile that decides is named; peers: against
    other explainers; ablation: what each term of the objective is worth; circuit: circuits of images and of
    explanations."""
    images: int | None = None
    """Images to explain (mosaic, peers, ablation, circuit)."""
    costly_images: int | None = None
    """Images, of those, for explainers that take seconds each; by default a tenth (peers)."""
    out: Path | None = None
    """Folder for tables and plots; a demo in its subfolder VARIANT lends classifier and masker (peers, ablation,
    circuit)."""
    variant: Literal["plain", "shortcut", "mosaic", "segments"] | None = None
    """Scenes to compare explainers on (peers)."""
    peers: str | None = None
    """Explainers to compare with, separated by commas, or none (peers)."""
    model: str | None = None
    """In place of the built-in scenes' classifier, a model (circuit)."""
    data: str | None = None
    """Images for that model (circuit)."""
    weights: Path | None = None
    """Weights of that model (circuit)."""
    scenes: int | None = None
    """Scenes of a job from end to end (scale)."""
    rows: int | None = None
    """Rows of a synthetic job and store (scale)."""
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
        names = ("images", "costly_images", "out", "variant", "peers", "seed", "model", "data", "weights")
        given = {name: getattr(self, name) for name in (*names, "scenes", "rows")}
        options += [
            f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
        ]
        return int(runpy.run_path(str(script))["main"]([self.suite, *options]) or DONE)
