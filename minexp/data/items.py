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

from ..errors import RequestError


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a source. ``image`` is uint8 [h, w, 3], or None where ``error`` says why."""

    id: str
    uri: str
    image: npt.NDArray[np.uint8] | None
    label: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Entry:
    """An item not yet decoded; ``load`` may be called from any thread."""

    id: str
    uri: str
    label: int | None
    load: Callable[[], npt.NDArray[np.uint8]]

    def decode(self) -> Item:
        try:
            return Item(self.id, self.uri, self.load(), self.label)
        except RequestError as error:
            return Item(self.id, self.uri, None, self.label, str(error))
        except (OSError, MemoryError) as error:
            return Item(
                self.id, self.uri, None, self.label, f"cannot be read: {' '.join(str(error).split())}"
            )


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

    def range(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """Items of the positions start <= position < stop, in order; threads decode ahead of the caller."""
        stop = len(self) if stop is None else min(stop, len(self))
        entries = self._entries(start, stop) if start < stop else iter(())
        return _decode_ahead(entries, min(4, os.cpu_count() or 1))

    def fingerprint(self) -> str:
        """Hex digest of the listing and the limit; decodes nothing, and the data may move elsewhere."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.limit}\n".encode())
        for line in self._identity():
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


def _decode_ahead(entries: Iterator[Entry], workers: int) -> Iterator[Item]:
    """Decode in order with at most two images a worker waiting: a large image is 300 MB decoded."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[Future[Item]] = deque()
    try:
        waiting.extend(pool.submit(entry.decode) for entry in islice(entries, 2 * workers))
        while waiting:
            item = waiting.popleft().result()
            waiting.extend(pool.submit(entry.decode) for entry in islice(entries, 1))
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
