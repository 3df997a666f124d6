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
    """Time the operators, the whole explanation, or the reading of images (in a source checkout)."""

    example = "minexp bench explain"

    suite: Positional[Literal["kernels", "explain", "data"]]
    """What to time."""

    def run(self) -> int:
        import runpy

        script = Path(__file__).resolve().parents[2] / "bench" / "run.py"
        if not script.is_file():
            raise RequestError(
                "the benchmarks are not installed with the package; run this in a source checkout"
            )
        options = [f"--{name}" for name in ("json", "quiet") if getattr(self, name)]
        return int(runpy.run_path(str(script))["main"]([self.suite, *options]) or DONE)
