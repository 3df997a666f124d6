"""The core unit: what turns a batch of images into rows, the same under every engine. No torch.

A unit is a callable `dict[str, ndarray] -> dict[str, ndarray]`, and so what Ray Data's `map_batches` takes. In: `id`,
`uri` (str), `truth` (int64, -1: unknown), `error` (str, empty where there is an image), `note` (str: what was left out
of it), `image` (uint8 [B,H,W,C], the input of the model) and `position` (int64, in the source): no nulls, which not
every engine brings through. Out: columns of the store's table beside `position`, None being null; one row for every one
that came in, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.items import Item
from ..data.table import Columns, by_column, objects
from ..errors import MinexpError, RequestError

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]
Unit = Callable[[Columns], Columns]
_UNREAD = "could not be decoded"


class DeviceError(MinexpError):
    """The device is in a state in which nothing that follows can succeed; the process has to be replaced."""


class ImageUnit:
    """A unit made of a call: a batch of images that could be read in, one row an image out, but for where it came from.

    When the call throws for a batch, the images are tried one by one, so that only the culprit's row carries the error.
    """

    def __init__(self, call: Callable[[Columns], Sequence[Row]]) -> None:
        self._call = call

    def __call__(self, batch: Columns) -> Columns:
        readable = np.array([not error for error in batch["error"]], bool)
        made = iter(self._each({k: v[readable] for k, v in batch.items()}) if readable.any() else ())
        rows = [
            next(made) if good else error_row(error)
            for good, error in zip(readable, batch["error"], strict=True)
        ]
        return {**origin(batch), **by_column(rows)}

    def _each(self, batch: Columns) -> list[Row]:
        try:
            return list(self._call(batch))
        except RequestError:
            raise  # no single image is at fault
        except Exception as error:
            if "CUDA error" in str(error):
                raise DeviceError(describe(error)) from error
            if len(batch["id"]) == 1:
                return [error_row(describe(error))]
        alone = (slice(place, place + 1) for place in range(len(batch["id"])))
        return [self._each({k: v[one] for k, v in batch.items()})[0] for one in alone]


def origin(batch: Columns) -> Columns:
    """Which images these are: the columns of the store that a unit passes on."""
    truths = [None if truth < 0 else truth for truth in batch["truth"].tolist()]
    return {"position": batch["position"], "id": batch["id"], "uri": batch["uri"], "truth": objects(truths)}


def error_row(text: str) -> Row:
    return {"status": "error", "error": text}


def describe(error: BaseException) -> str:
    """The error for a row, on one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, MinexpError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:500]


def batch_of(
    items: Sequence[Item],
    positions: range,
    truths: Callable[[int | None], int | None],
    shape: tuple[int, int, int],
) -> Columns:
    """A unit's input from items whose images are the model's input (uint8 of ``shape``) or None beside an error."""
    images = np.zeros((len(items), *shape), np.uint8)
    for place, item in enumerate(items):
        if item.image is not None:
            images[place] = item.image
    return {
        "position": np.asarray(positions, np.int64),
        "id": objects([item.id for item in items]),
        "uri": objects([item.uri for item in items]),
        "truth": np.array(
            [-1 if (truth := truths(item.label)) is None else truth for item in items], np.int64
        ),
        "error": objects(["" if item.image is not None else item.error or _UNREAD for item in items]),
        "note": objects([item.note or "" for item in items]),
        "image": images,
    }
