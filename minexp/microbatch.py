"""How many images go through the classifier at once: chosen, and found by trial, in this one place."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .errors import MinexpError

Result = TypeVar("Result")
_SAYS = ("not enough memory", "out of memory", "can't allocate memory", "ALLOC_FAILED")


class MicroBatch:
    """Images a classifier call. Where memory does not suffice, half of them are tried, and kept to from then on.

    size: of the next call; one object serves a whole job, so that what it found holds for the rest of it.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)

    @classmethod
    def for_input(cls, shape: tuple[int, int, int], device: str) -> MicroBatch:
        """For images [C,H,W]: few enough to stay in a CPU's cache, enough to fill a GPU."""
        pixels = shape[1] * shape[2]
        return cls(
            max(8, min(128, 2**18 // pixels)) if device == "cpu" else max(16, min(1024, 2**23 // pixels))
        )

    def run(self, call: Callable[..., Result], *tensors: Tensor, times: int = 1) -> Iterator[Result]:
        """`call` on one slice of all tensors after the other, along their first axis.

        times: images that the call makes of one. A slice that does not fit into memory is tried again as two.
        Raises MinexpError when a single image does not fit.
        """
        start = 0
        while start < len(tensors[0]):
            stop = min(len(tensors[0]), start + max(1, self.size // times))
            try:
                result = call(*(tensor[start:stop] for tensor in tensors))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                lacking = _text(error)
            else:
                yield result
                start = stop
                continue
            # outside the handler: there, the traceback would still hold what the failed call allocated
            self._halve(stop - start, times, lacking)

    def _halve(self, tried: int, times: int, reason: str) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise MinexpError(
                f"not enough memory for a single image ({reason}); use a smaller --size or another device"
            )
        self.size = max(1, tried * times // 2)
        warnings.warn(f"out of memory: {self.size} images at a time from here on", stacklevel=3)


def out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, of whatever kind?"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAYS)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
