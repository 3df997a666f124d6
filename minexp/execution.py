"""How a model is run: precision, memory layout, compilation; each held to the plain path before it is used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import RequestError, one_line

Precision = Literal["float32", "bfloat16", "float16"]
# The largest difference of scores allowed, as a share of their spread (the standard deviation of a probe's scores).
TOLERANCE: dict[str, float] = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Execution:
    """precision: of the model's convolutions and products (autocast; weights and scores stay float32).

    channels_last: activations in that memory layout. compile: scores through torch.compile; activations, which need
    hooks, are taken from the model as written.
    """

    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in TOLERANCE:
            raise RequestError(f"unknown precision {self.precision!r}; choose one of {', '.join(TOLERANCE)}")

    @property
    def plain(self) -> bool:
        """Is the model run as it is?"""
        return self == Execution()

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.precision))

    def layout(self, x: Tensor) -> Tensor:
        """Images [B,C,H,W] in the memory layout that the activations then take over, however they came."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x.contiguous()

    def compiled(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """The model, compiled for any number of images."""
        if not self.compile:
            return model
        compiled = torch.compile(model)

        def run(x: Tensor) -> Any:
            torch._dynamo.maybe_mark_dynamic(x, 0)  # else the second batch size is a second compilation
            return compiled(x)

        return run

    def __str__(self) -> str:
        extras = [name for name in ("channels_last", "compile") if getattr(self, name)]
        return ", ".join([self.precision, *extras])


@dataclass(frozen=True)
class Agreement:
    """How far scores by an execution are from the plain ones on probe images.

    largest: difference, as a share of the plain scores' standard deviation. same: share of images of one decision.
    """

    largest: float
    same: float

    def __str__(self) -> str:
        return (
            f"scores differ by {self.largest:.1e} of their spread, {self.same:.0%} of decisions are the same"
        )


def agree(expected: Tensor, run: Callable[[Tensor], Tensor], x: Tensor, execution: Execution) -> Agreement:
    """Compare scores of images x with the expected [B,K]; RequestError, with the figures, where they differ too much.

    Probes are noise, on which decisions can be near ties: their share is told, not judged.
    """
    try:
        with torch.no_grad():
            got = run(x)
    except Exception as error:
        raise RequestError(
            f"the model does not run in {execution} ({one_line(error)}); leave it out"
        ) from error
    spread = float(expected.std()) or 1.0
    largest = float((got - expected).abs().max()) / spread
    same = float((got.argmax(1) == expected.argmax(1)).float().mean())
    found = Agreement(largest, same)
    if not largest <= TOLERANCE[execution.precision]:  # also catches NaN
        raise RequestError(
            f"in {execution} {found}, {TOLERANCE[execution.precision]:g} allowed; leave it out"
        )
    return found
