"""Where a command's job runs: the options of all that go through a data set."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import RequestError
from .base import Command, at_least_one

if TYPE_CHECKING:
    from ..jobs.engine import Placement


@dataclass(frozen=True, kw_only=True)
class WithEngine(Command):
    """A command about every image of a data set."""

    batch: int = 32
    """Images at once; no effect on the answers."""
    limit: int | None = None
    """Only the first images."""
    resume: bool = True
    """Start over instead of going on with the rows that are missing."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine; ray: a Ray cluster (pip install 'minexp[ray]'). Both write the same store."""
    workers: int = 1
    """Processes that work, each on a GPU or its share of the cores; 0: one a GPU or, without, one a core."""
    shard: str = "0/1"
    """I/N: only the I-th (from 0) of N parts of the job; the parts may run at once and share --out."""
    on_error: str = "skip"
    """A file that fails: skip (a row with its error), fail (stop there), or max=N (stop behind N)."""
    address: str | None = None
    """With ray: the cluster's address, such as auto or ray://head:10001; by default one is started here."""
    gpus: float = 0.0
    """With ray: GPUs a worker, a fraction where several share one."""

    def placement(self, here: int) -> Placement:
        """Where the job runs. here: GPUs of this machine that may be used. Raises RequestError for odd options."""
        from ..jobs.engine import Placement

        workers = self.workers or here or os.cpu_count() or 1
        at_least_one("--workers", workers)
        if self.engine == "local" and (self.address is not None or self.gpus):
            raise RequestError("--address and --gpus belong to --engine ray; add it, or leave them out")
        return Placement(
            self.engine, workers, _part(self.shard), _errors(self.on_error), self.address, self.gpus
        )


def gpus_here() -> int:
    """GPUs of this machine, where torch is there to count them."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return int(torch.cuda.device_count())


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise RequestError(f"--shard is {text}; give I/N with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])


def _errors(text: str) -> int | None:
    if text in ("skip", "fail"):
        return None if text == "skip" else 0
    match = re.fullmatch(r"max=([1-9]\d*)", text)
    if match is None:
        raise RequestError(f"--on-error is {text}; give skip, fail, or max=N with N at least 1")
    return int(match[1])
