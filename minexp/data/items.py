"""What every image source is: an ordered list of items, decoded lazily and a little ahead."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from ..errors import RequestError, one_line
from .decoding import Decoded

Pixels = npt.NDArray[np.uint8]
Prepare = Callable[[Pixels], Pixels]
WORKERS = min(8, os.cpu_count() or 1)  # threads that decode


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a source: uint8 [h, w, 3], or None where ``error`` says why. note: what was left out of it."""

    id: str
    uri: str
    image: Pixels | None
    label: int | None = None
    error: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Entry:
    """An item not yet decoded; ``load`` may be called from any thread."""

    id: str
    uri: str
    label: int | None
    load: Callable[[], Decoded]

    def decode(self, prepare: Prepare | None = None) -> Item:
        try:
            decoded = self.load()
            image = decoded.image if prepare is None else prepare(decoded.image)
            return Item(self.id, self.uri, image, self.label, None, decoded.note)
        except RequestError as error:
            return Item(self.id, self.uri, None, self.label, str(error))
        except Exception as error:
            return Item(self.id, self.uri, None, self.label, f"cannot be read: {one_line(error)}")


class ImageSource(ABC):
    """Images in a fixed order, which a stopped job relies on to go on at a position."""

    name: str
    class_names: list[str] | None = None
    limit: int | None = None

    @abstractmethod
    def _total(self) -> int:
        """Items there are, whatever the limit."""

    @abstractmethod
    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries of the positions start <= position < stop, decoding none."""

    @abstractmethod
    def _identity(self) -> Iterable[str]:
        """Lines that tell this listing from another one, cheap to get."""

    def __len__(self) -> int:
        return self._total() if self.limit is None else min(self.limit, self._total())

    def __iter__(self) -> Iterator[Item]:
        return self.range()

    def skip(self, count: int) -> Iterator[Item]:
        """Items from position ``count`` on; those before are not decoded."""
        return self.range(count)

    def range(
        self, start: int = 0, stop: int | None = None, *, prepare: Prepare | None = None, ahead: int = 0
    ) -> Iterator[Item]:
        """Items of the positions start <= position < stop, in order; threads decode ahead of the caller.

        prepare: what becomes of each image, in those threads: a model's input is a thousandth of a large photograph,
        and so many as ``ahead`` may then wait for the caller.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        entries = self._entries(start, stop) if start < stop else iter(())
        waiting = 2 * WORKERS if prepare is None else max(2 * WORKERS, ahead)
        return _decode_ahead(entries, prepare, waiting)

    def shard(self, rank: int, count: int) -> "ImageSource":
        """The ``rank``-th (from 0) of ``count`` parts of nearly equal length, which in their order are the whole."""
        if not 0 <= rank < count:
            raise RequestError(f"shard {rank} of {count}: give a rank from 0 to {count - 1}")
        start, stop = (place * len(self) // count for place in (rank, rank + 1))
        return _Part(self, start, stop, f"{rank}/{count}")

    def part(self, start: int, stop: int) -> "ImageSource":
        """The items of the positions start <= position < stop as a source of its own, which pickles small."""
        return _Part(self, start, stop, f"{start}-{stop}")

    def fingerprint(self) -> str:
        """Hex digest of the listing and the limit; decodes nothing, and the data may move elsewhere."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.limit}\n".encode())
        for line in self._identity():
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


class _Part(ImageSource):
    """A run of another source, which itself is small or is opened again where this is unpickled."""

    def __init__(self, whole: ImageSource, start: int, stop: int, which: str) -> None:
        self.name, self.class_names = whole.name, whole.class_names
        self._whole, self._start, self._stop, self._which = whole, start, min(stop, len(whole)), which

    def _total(self) -> int:
        return self._stop - self._start

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        return self._whole._entries(self._start + start, self._start + stop)

    def _identity(self) -> Iterable[str]:
        return (self._whole.fingerprint(), self._which)


def _decode_ahead(entries: Iterator[Entry], prepare: Prepare | None, most: int) -> Iterator[Item]:
    """Decode in order with at most so many images waiting, or being decoded: a large one is 300 MB decoded."""
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")
    waiting: deque[Future[Item]] = deque()
    try:
        waiting.extend(pool.submit(entry.decode, prepare) for entry in islice(entries, most))
        while waiting:
            item = waiting.popleft().result()
            waiting.extend(pool.submit(entry.decode, prepare) for entry in islice(entries, 1))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def unique(names: Iterable[str]) -> list[str]:
    """The names, repeated ones marked ~2, ~3 … so that ids stay unique and stable."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}~{seen[name]}")
    return out
