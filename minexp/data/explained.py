"""A store of explanations as a source of images: each found again by its URI, with the pixels that were kept of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from .catalogue import read_run, read_shards
from .decoding import Decoded
from .items import Entry, ImageSource
from .sources import decode_uri
from .store import read_rows, uncovered, unpack_mask

_READ = 256  # rows at a time


@dataclass(frozen=True, eq=False)
class Kept:
    """What a stored explanation says of its image: the mask [h,w], and the class it explains."""

    mask: npt.NDArray[np.bool_]
    label: int


class ExplainedSource(ImageSource):
    """The images of a store's rows, in its order, as they are when this is opened.

    A row without a mask is an item with its error. Raises RequestError when there is no such store, or no row in it.
    """

    def __init__(self, directory: str | Path, limit: int | None = None) -> None:
        self.directory, self.limit = Path(directory).absolute(), limit
        self.run = read_run(directory)
        self.name = f"{self.run.get('source_name', self.directory.name)}, kept pixels"
        self._shards = read_shards(self.directory)
        if not len(self):
            raise RequestError(f"{directory} holds no rows yet: run minexp explain --out {directory} first")

    def kept(self, positions: Sequence[int]) -> list[Kept]:
        """Of items that have an image."""
        rows = self._rows(positions, ["mask", "h", "w", "label"])
        return [Kept(unpack_mask(row["mask"], row["h"], row["w"]), row["label"]) for row in rows]

    def _rows(self, positions: Sequence[int], columns: list[str]) -> list[dict[str, Any]]:
        return read_rows(self.directory, positions, columns=columns, shards=self._shards)

    def _total(self) -> int:
        return sum(shard.rows for shard in self._shards)

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for first in range(start, stop, _READ):
            here = range(first, min(first + _READ, stop))
            for row in self._rows(here, ["id", "uri", "truth", "error", "mask_crc32"]):
                load = partial(decode_uri, row["uri"])
                if row["mask_crc32"] is None:
                    load = partial(_refuse, row["error"] or "no mask is stored")
                yield Entry(row["id"], row["uri"], row["truth"], load)

    def _identity(self) -> Iterable[str]:
        end = max(shard.stop for shard in self._shards)
        lacking = uncovered(0, end, [(shard.start, shard.stop) for shard in self._shards])
        return (self.run["fingerprint"], f"{len(self)} of {end} without {lacking}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (str(self.directory), self.limit, self.fingerprint())


@lru_cache(maxsize=2)
def _opened(directory: str, limit: int | None, fingerprint: str) -> ExplainedSource:
    """The source again, in a worker, which has many tasks of it."""
    source = ExplainedSource(directory, limit)
    if source.fingerprint() != fingerprint:
        raise RequestError(f"{directory} has changed since the job began: begin again with --no-resume")
    return source


def _refuse(text: str) -> Decoded:
    raise RequestError(text)
