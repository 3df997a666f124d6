"""`minexp fit`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .base import DONE, WithModel, at_least_one, table


@dataclass(frozen=True, kw_only=True)
class Fit(WithModel):
    """Train a masker for a classifier over a set of images; under torchrun, in several processes."""

    example = "minexp fit --model torchvision:resnet18 --data photos/ --out masker.safetensors"

    data: str
    """Images: a folder, a glob, one image, a .txt of paths, .npz, .npy, IDX, WebDataset .tar or Parquet."""
    out: Path
    """The masker, a .safetensors file; settings and metrics go beside it."""
    preset: Literal["default", "kl"] = "default"
    """default: the area's weight adapts to the decision; kl: the plain weighted sum."""
    steps: int | None = None
    """Optimisation steps."""
    epochs: float | None = None
    """Passes over the data, in place of steps."""
    batch: int = 32
    """Images a step."""
    lr: float = 3e-3
    """Learning rate."""
    limit: int | None = None
    """Use only the first images."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = True
    """Start over instead of going on from an interrupted fit of the same settings."""

    def run(self) -> int:
        from ..data.sources import open_source
        from ..training import fit

        at_least_one("--batch", self.batch)
        source = open_source(self.data, limit=self.limit)
        classifier = self._on_its_device().classifier()
        masker = fit(
            classifier,
            source,
            preset_name=self.preset,
            steps=self.steps,
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            out=self.out,
            seed=self.seed,
            resume=self.resume,
            progress=not self.quiet and sys.stderr.isatty(),
        )
        about = masker.metadata
        summary = {key: about[key] for key in ("steps", "seconds", "resumed")}
        metrics = about["metrics"]
        summary |= {"area": metrics["area"], "kept": metrics["kept"], "robust_train": metrics["robust"]}
        summary |= {"out": str(self.out)}
        command = f"minexp explain --model {self.model} --masker {self.out} --data {self.data} --out DIR"
        if os.environ.get("RANK", "0") == "0":
            self.show(summary, f"{table(summary)}\nnext: {command}")
        return DONE

    def _on_its_device(self) -> Fit:
        """Under torchrun each process of a machine takes a GPU of its own."""
        import torch

        local = os.environ.get("LOCAL_RANK")
        if local is None or self.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return self
        return replace(self, device=f"cuda:{local}")
