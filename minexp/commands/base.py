"""What the commands share: their options, exit codes and summaries.

A command is a dataclass whose fields are its options and whose `run` does it. torch and everything that needs it is
imported inside `run`, so that help and mistakes answer at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import RequestError

DONE, REQUEST, PARTLY, DAMAGED, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 130, 143


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command takes."""

    example: ClassVar[str]

    quiet: bool = False
    """No progress bar and no summary."""
    json: bool = False
    """Print one machine-readable summary on stdout."""

    def run(self) -> int:
        """Do it; the exit code."""
        raise SystemExit(REQUEST)

    def show(self, summary: Any, text: str) -> None:
        """The summary as JSON, or the text for a reader, on stdout."""
        if self.json:
            print(json.dumps(summary))
        elif not self.quiet:
            print(text)


@dataclass(frozen=True, kw_only=True)
class WithModel(Command):
    """A command about a classifier."""

    model: str
    """The classifier: torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory or file.py:factory."""
    weights: Path | None = None
    """Its weights, .safetensors or .pth, in place of the source's own."""
    ema: bool = False
    """Take the averaged (EMA, SWA) weights of a checkpoint that holds both."""
    num_classes: int | None = None
    """Number of outputs, where it is not the model's usual one."""
    class_names: Path | None = None
    """Text file with one class name a line."""
    size: tuple[int, ...] = ()
    """Input size in pixels: one side, or height and width."""
    mean: tuple[float, ...] = ()
    """Normalisation, one value a channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = ()
    """Normalisation, one value a channel."""
    taps: tuple[str, ...] = ()
    """Layers whose activations are matched, in place of the end of each stage."""
    target: str | None = None
    """What is explained: top1 (the class with the highest score, the default), class:NAME, label:NAME, multilabel,
    binary, value:OUTPUT, similarity:FILE.npy, or a function of the output, package.module:name or file.py:name."""
    keep: float = 0.9
    """With targets that are a score: the share of the image's own score that has to be left."""
    tolerance: float | None = None
    """With value: how far it may move, in the output's units, in place of 1 - keep of it."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's convolutions and products; lower ones are refused where scores then differ too much."""
    channels_last: bool = False
    """Run the model with its channels last in memory."""
    compile: bool = False
    """Compile the model with torch.compile: slow to start, for long jobs."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    trust_model: bool = False
    """Load a .pt2 model although that runs code in it."""

    def classifier(self, device: str | None = None) -> Any:
        """The Classifier these options describe, on another device than they say where one is given."""
        import torch

        from ..classifier import load_classifier
        from ..execution import Execution
        from ..targets import parse_target

        if len(self.size) > 2:
            raise RequestError(f"--size takes one side, or height and width, not {len(self.size)} numbers")
        target = None
        if self.target is not None:
            target = parse_target(self.target, keep=self.keep, tolerance=self.tolerance)
        execution = Execution(self.precision, self.channels_last, self.compile)
        device = device or self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_classifier(
            self.model,
            weights=self.weights,
            ema=self.ema,
            num_classes=self.num_classes,
            mean=self.mean or None,
            std=self.std or None,
            size=(self.size[0], self.size[-1]) if self.size else None,
            class_names=None if self.class_names is None else lines(self.class_names),
            taps=self.taps or None,
            target=target,
            execution=None if execution.plain else execution,
            device=device,
            trust_model=self.trust_model,
        )


def table(summary: dict[str, Any]) -> str:
    width = max(map(len, summary))
    return "\n".join(f"{key.replace('_', ' '):<{width}}  {value}" for key, value in summary.items())


def at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise RequestError(f"{option} is {value}; give at least 1")


def lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} is not readable ({type(error).__name__}); give one class name a line"
        ) from error
