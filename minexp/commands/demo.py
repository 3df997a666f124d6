"""`minexp demo`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .base import DONE, Command


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Built-in scenes, end to end: train a classifier, fit a masker, explain, certify, report."""

    example = "minexp demo --out out/demo"

    out: Path = Path("out/demo")
    """Directory for everything that is made; a second run goes on from what is there."""
    variant: Literal["plain", "shortcut", "mosaic", "segments"] = "plain"
    """plain; shortcut: a corner patch gives the class away; mosaic: one tile of 3×3 decides; segments: likewise."""
    images: int = 1000
    """Held-out scenes to explain."""
    scenes: int | None = None
    """Scenes to train the classifier on; by default 12,000, of mosaics 24,000."""
    steps: int | None = None
    """Training steps of the masker; by default 1200, for mosaics 2000."""
    augment: bool = True
    """Train the classifier without noise and erased regions: a brittle subject, whose masks have to be large."""
    seed: int = 0
    """Seed of everything random."""

    def run(self) -> int:
        from .. import demo

        summary = demo.run(
            self.out,
            variant=self.variant,
            images=self.images,
            scenes=self.scenes,
            steps=self.steps,
            augmented=self.augment,
            seed=self.seed,
            quiet=self.quiet or self.json,
        )
        if self.json:
            print(json.dumps(summary))
        return DONE
