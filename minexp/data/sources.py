"""Images in: one door for every layout data comes in."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from .containers import TarSource, is_container, is_image_name, open_container
from .decoding import FORMATS, Decoded, decode
from .items import Entry, ImageSource, Item, unique
from .places import Place, is_uri, list_remote, require_fsspec

__all__ = ["ImageSource", "Item", "load_uri", "open_source"]

_KINDS = (
    "an image, a glob like 'photos/*.jpg', a folder of class folders, a .txt of paths,"
    " .npy, .npz, IDX, .tar or .parquet; each a path or a URI"
)
_REFUSED = {
    (".zip", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".7z", ".rar", ".gz"): "unpack it first",
    (
        ".pkl",
        ".pickle",
        ".pt",
        ".pth",
    ): "a pickle can run code when read; store the images as .npz or .parquet",
}
_IN_CONTAINER = re.compile(
    r"(?P<path>.*?(?:\.np[yz]|\.tar|\.parquet|\.idx3?|idx[34]-ubyte)(?:\.gz)?)#(?P<key>.+)", re.I | re.S
)


def open_source(src: str | Path, *, limit: int | None = None) -> ImageSource:
    """Open an image, glob, ImageFolder tree, .txt of paths or URIs, NumPy, IDX, WebDataset tar or Parquet.

    Nothing is decoded yet. limit: take only the first so many images. Raises RequestError when there is none.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"the limit is {limit}: give at least 1")
    source = _open(os.fspath(src))
    if len(source) == 0:
        raise RequestError(f"{src} holds no images: give {_KINDS}")
    source.limit = limit
    return source


def load_uri(uri: str) -> npt.NDArray[np.uint8]:
    """Decode one item again by the ``uri`` it carried: uint8 [h, w, 3]. Raises RequestError."""
    return decode_uri(uri).image


def decode_uri(uri: str) -> Decoded:
    """`load_uri` with what was left out of the image."""
    inside = _IN_CONTAINER.fullmatch(uri)
    if inside is None or os.path.isfile(uri):
        return _load_file(uri)
    place, key = Place(inside["path"]), inside["key"]
    try:
        version = place.version()
    except OSError as error:
        raise RequestError(f"{place} cannot be opened: {error.strerror}") from None
    container = _opened(place, version)
    if isinstance(container, TarSource):
        return container.load(key)
    if not key.isdecimal() or int(key) >= len(container):
        raise RequestError(f"{place} has {len(container)} images, no {key!r}")
    return next(container._entries(int(key), int(key) + 1)).load()


@lru_cache(maxsize=2)
def _opened(place: Place, version: str) -> ImageSource:
    """A container kept open for further look-ups, as long as the file stays the same."""
    return open_container(place)


class FileSource(ImageSource):
    """Image files, one an item. ``ids`` are stable names; ``labels`` may be missing."""

    def __init__(
        self,
        name: str,
        uris: list[str],
        ids: list[str],
        labels: list[int | None] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.name, self.class_names = name, class_names
        self._uris, self._ids, self._labels = uris, unique(ids), labels

    def part(self, start: int, stop: int) -> ImageSource:
        labels = self._labels[start:stop] if self._labels else None
        # ids are unique already, and a part of them stays so
        return FileSource(self.name, self._uris[start:stop], self._ids[start:stop], labels, self.class_names)

    def _total(self) -> int:
        return len(self._uris)

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for index in range(start, stop):
            uri = self._uris[index]
            yield Entry(
                self._ids[index], uri, self._labels[index] if self._labels else None, partial(_load_file, uri)
            )

    def _identity(self) -> Iterable[str]:
        yield from self.class_names or ()
        for uri, name in zip(self._uris, self._ids, strict=True):
            try:
                size = None if is_uri(uri) else os.stat(uri).st_size
            except OSError:
                size = None
            yield f"{name} {size}"


class ChainSource(ImageSource):
    """Several containers one after the other."""

    def __init__(self, name: str, parts: list[ImageSource]) -> None:
        self.name, self._parts, self.class_names = name, parts, parts[0].class_names
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def _total(self) -> int:
        return self._starts[-1]

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for part, first, last in self._meeting(start, stop):
            yield from part._entries(first, last)

    def part(self, start: int, stop: int) -> ImageSource:
        parts = [part.part(first, last) for part, first, last in self._meeting(start, stop)]
        return parts[0] if len(parts) == 1 else ChainSource(self.name, parts)

    def _meeting(self, start: int, stop: int) -> Iterator[tuple[ImageSource, int, int]]:
        """The containers that hold positions start <= position < stop, and which of their own these are."""
        for part, first, last in zip(self._parts, self._starts, self._starts[1:], strict=False):
            if max(start, first) < min(stop, last):
                yield part, max(start, first) - first, min(stop, last) - first

    def _identity(self) -> Iterable[str]:
        return (line for part in self._parts for line in part._identity())


def _open(src: str) -> ImageSource:
    path = Path(src)
    if is_uri(src):
        return _remote(src)
    if path.is_dir():
        return _folder(str(path.absolute()), list(_walk(str(path.absolute()), set())))
    if path.is_file():
        return _file(path)
    if glob.has_magic(src):
        return _glob(src)
    raise RequestError(f"{src} is not there: give {_KINDS}")


def _file(path: Path) -> ImageSource:
    if is_container(path.name):
        return open_container(Place(str(path.absolute())))
    if path.suffix.lower() == ".txt":
        return _list(path.read_bytes(), path)
    _refuse(path.name, str(path))
    return FileSource(path.name, [str(path.absolute())], [path.name])


def _refuse(name: str, where: str) -> None:
    for suffixes, way_out in _REFUSED.items():
        if name.lower().endswith(suffixes):
            raise RequestError(f"{where} is not read as images: {way_out}")


def _remote(uri: str) -> ImageSource:
    place, listed = Place(uri), list_remote(uri)
    if listed is not None:
        root, files = listed
        return _folder(root, files)
    if is_container(place.name):
        return open_container(place)
    if place.name.lower().endswith(".txt"):
        return _list(place.read(), uri)
    _refuse(place.name, uri)
    return FileSource(uri, [uri], [uri])


def _glob(pattern: str) -> ImageSource:
    matches = sorted(glob.glob(pattern, recursive=True))
    files = [match for match in matches if os.path.isfile(match)]
    if not files:
        found = (
            f"{pattern} matches only folders: give one folder, or"
            if matches
            else f"{pattern} matches nothing: give"
        )
        raise RequestError(f"{found} {_KINDS}")
    if all(map(is_container, files)):
        return _chain(pattern, [os.path.abspath(file) for file in files])
    files = [os.path.abspath(file) for file in files]
    parent = os.path.commonpath([os.path.dirname(file) for file in files])
    return FileSource(pattern, files, [Path(os.path.relpath(file, parent)).as_posix() for file in files])


def _folder(root: str, files: list[str]) -> ImageSource:
    """The images among the files of a folder, their class being the first folder on their way."""
    names = [file[len(root) :].lstrip("/" + os.sep).replace(os.sep, "/") for file in files]
    images = [index for index, name in enumerate(names) if is_image_name(name)]
    if not images:
        containers = [file for file in files if is_container(file)]
        if containers:
            return _chain(Place(root).name, containers)
        raise RequestError(
            f"{root} holds no images ({', '.join(FORMATS)}) in it or its folders: give {_KINDS}"
        )
    ids = [names[index] for index in images]
    classes = sorted({name.partition("/")[0] for name in ids if "/" in name})
    number = {name: index for index, name in enumerate(classes)}
    labels = [number.get(name.partition("/")[0]) if "/" in name else None for name in ids]
    return FileSource(Place(root).name, [files[index] for index in images], ids, labels, classes or None)


def _walk(folder: str, above: set[str]) -> Iterator[str]:
    """Files below ``folder`` in sorted order; links are followed, except into a folder they are in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError as error:
        raise RequestError(f"{folder} cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, above | {real})
        else:
            yield entry.path


def _list(content: bytes, where: Path | str) -> ImageSource:
    """One path or URI a line, relative to the list's folder, an integer label behind a tab where known."""
    try:
        lines = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise RequestError(f"{where} is not UTF-8 text: give one path or URI a line") from None
    uris, ids, labels = [], [], []
    for line in lines:
        place, _, label = (part.strip() for part in line.partition("\t"))
        if label and not re.fullmatch(r"-?\d+", label):
            raise RequestError(
                f"{where}: the label {label!r} of {place} is no integer: give PATH, tab, INTEGER"
            )
        if is_uri(place):
            uris.append(place)
        elif isinstance(where, Path):
            uris.append(os.path.abspath(where.parent / place))
        else:
            uris.append(f"{where.rpartition('/')[0]}/{place}")
        ids.append(place)
        labels.append(int(label) if label else None)
    if any(map(is_uri, uris)):
        require_fsspec(next(filter(is_uri, uris)))
    name = where.name if isinstance(where, Path) else where
    return FileSource(name, uris, ids, labels if any(label is not None for label in labels) else None)


def _chain(name: str, files: list[str]) -> ImageSource:
    parts = [open_container(Place(file)) for file in files]
    return parts[0] if len(parts) == 1 else ChainSource(name, parts)


def _load_file(uri: str) -> Decoded:
    return decode(Place(uri).read() if is_uri(uri) else uri)
