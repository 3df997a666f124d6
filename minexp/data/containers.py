"""Many images in one file: NumPy arrays, IDX, WebDataset tars, Parquet."""

import copy
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from .decoding import Decoded, decode
from .items import Entry, ImageSource, unique
from .places import Place

_MAX_ARRAY = 8 << 30  # bytes of an array that has to be held in memory, as announced by its header
_MAX_ENCODED = 1 << 30  # bytes of one encoded image
_IMAGE_KEYS, _LABEL_KEYS = ("x", "images"), ("y", "labels")
_IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "picture")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "y")


def is_container(name: str) -> bool:
    """Whether the name is that of a file that holds many images."""
    return name.lower().endswith((".npy", ".npz", ".tar", ".parquet")) or is_idx(name)


def is_idx(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith((".idx", ".idx3", "idx3-ubyte", "idx4-ubyte"))


def open_container(place: Place) -> ImageSource:
    """The images inside one file. Raises RequestError naming the file when it holds none."""
    if not place.exists():
        raise RequestError(f"{place} is not there")
    try:
        if is_idx(place.name):
            return idx_source(place)
        kind = place.name.lower().rpartition(".")[2]
        return {"npy": npy_source, "npz": npz_source, "tar": TarSource, "parquet": ParquetSource}[kind](place)
    except RequestError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        struct.error,
    ) as error:
        raise RequestError(
            f"{place} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


@lru_cache(maxsize=2)
def _reopened(place: Place, version: str) -> ImageSource:
    """The file in a process that was sent its source, opened once."""
    return open_container(place)


class ArraySource(ImageSource):
    """Images of an array [N, H, W], [N, H, W, 1] or [N, H, W, 3] of uint8, ids being positions."""

    def __init__(
        self,
        place: Place,
        images: npt.NDArray[Any],
        labels: npt.NDArray[Any] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        if images.dtype != np.uint8:
            raise RequestError(
                f"{place} holds {images.dtype} pixels: store uint8, for instance (x * 255).astype('uint8')"
            )
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
            raise RequestError(
                f"{place} holds an array of shape {list(images.shape)}: store [N, H, W] or [N, H, W, 1 or 3]"
            )
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
            raise RequestError(
                f"{place} has {images.shape[0]} images but labels of {labels.dtype} {list(labels.shape)}:"
                " store one integer each"
            )
        self.place, self.name, self.class_names = place, place.name, class_names
        self._images, self._labels = images, labels

    def _total(self) -> int:
        return int(self._images.shape[0])

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for index in range(start, stop):
            label = None if self._labels is None else int(self._labels[index])
            yield Entry(f"{self.name}#{index}", f"{self.place}#{index}", label, partial(self._load, index))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.place, self.place.version())  # the array itself may be large

    def _load(self, index: int) -> Decoded:
        image = np.array(self._images[index], dtype=np.uint8)
        return Decoded(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)

    def _identity(self) -> Iterable[str]:
        return [f"{list(self._images.shape)}", _file_identity(self.place)]


def npy_source(place: Place) -> ArraySource:
    if place.path is not None:
        return ArraySource(place, np.load(place.path, mmap_mode="r", allow_pickle=False))
    return ArraySource(place, np.load(_whole(place), allow_pickle=False))


def _whole(place: Place) -> io.BytesIO:
    """A remote array in memory, where it is small enough: it cannot be read in pieces."""
    if (size := place.size()) > _MAX_ARRAY:
        raise RequestError(
            f"{place} has {size / 2**30:.0f} GiB: copy it here, or store the images as .tar or .parquet"
        )
    return io.BytesIO(place.read())


def npz_source(place: Place) -> ArraySource:
    content = place.path or _whole(place)
    with np.load(content, allow_pickle=False) as archive:
        key = next((key for key in _IMAGE_KEYS if key in archive.files), None)
        if key is None:
            raise RequestError(
                f"{place} has no array {' or '.join(_IMAGE_KEYS)}: it has {', '.join(archive.files) or 'none'}"
            )
        with zipfile.ZipFile(content) as zipped:
            # numpy trusts what the archive announces; look before it allocates.
            announced = sum(zipped.getinfo(f"{name}.npy").file_size for name in archive.files)
        if announced > _MAX_ARRAY:
            raise RequestError(
                f"{place} unpacks to {announced / 2**30:.0f} GiB: store the images as .npy, read in pieces"
            )
        label_key = next((key for key in _LABEL_KEYS if key in archive.files), None)
        names = [str(name) for name in archive["class_names"]] if "class_names" in archive.files else None
        return ArraySource(place, archive[key], archive[label_key] if label_key else None, names)


def idx_source(place: Place) -> ArraySource:
    """MNIST's format; a file of the same name with ``labels-idx1`` beside it gives the labels."""
    beside = Place(place.uri.removesuffix(place.name) + place.name.replace("images-idx3", "labels-idx1"))
    labels = _read_idx(beside) if beside != place and beside.exists() else None
    return ArraySource(place, _read_idx(place), labels)


def _read_idx(place: Place) -> npt.NDArray[np.uint8]:
    with place.open() as raw, gzip.open(raw) if place.name.lower().endswith(".gz") else raw as opened:
        file = cast(IO[bytes], opened)
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros or kind != 8 or not 1 <= dimensions <= 4:
            raise RequestError(f"{place} is no IDX file of unsigned bytes")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        size = int(np.prod([int(side) for side in shape], dtype=object))
        if size > _MAX_ARRAY:
            raise RequestError(
                f"{place} announces {size / 2**30:.0f} GiB: its header is damaged, or split it"
            )
        content = file.read(size)
    if len(content) != size:
        raise RequestError(f"{place} is cut short: {len(content)} of {size} bytes are there")
    return np.frombuffer(content, np.uint8).reshape(shape)


class TarSource(ImageSource):
    """A WebDataset tar: its image members, with labels from ``.cls`` or ``.json`` members of the same key."""

    def __init__(self, place: Place) -> None:
        self.place, self.name = place, place.name
        images: list[tarfile.TarInfo] = []
        beside: dict[str, tarfile.TarInfo] = {}
        with place.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                if is_image_name(member.name):
                    images.append(member)
                elif member.name.lower().endswith((".cls", ".json")):
                    beside[member.name.rpartition(".")[0]] = member
        if not images:
            raise RequestError(f"{place} holds no image: its members need names like 000001.jpg")
        self._names = unique(member.name for member in images)
        self._places = [(member.offset_data, member.size) for member in images]
        self._labels = [self._label(beside.get(_key(member.name))) for member in images]

    def _label(self, member: tarfile.TarInfo | None) -> int | None:
        if member is None or member.size > 1 << 20:
            return None
        try:
            value = json.loads(self._bytes(member.offset_data, member.size))
            value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
        except (ValueError, RequestError):
            return None
        return value if isinstance(value, int) else None

    def _bytes(self, offset: int, size: int) -> bytes:
        if size > _MAX_ENCODED:
            raise RequestError(f"{size} encoded bytes are above the cap of {_MAX_ENCODED}")
        return self.place.read(offset, size)

    def _total(self) -> int:
        return len(self._names)

    def part(self, start: int, stop: int) -> ImageSource:
        part = copy.copy(self)
        part.limit, run = None, slice(start, stop)
        part._names, part._places, part._labels = self._names[run], self._places[run], self._labels[run]
        return part

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for index in range(start, stop):
            name = self._names[index]
            yield Entry(
                f"{self.name}#{name}",
                f"{self.place}#{name}",
                self._labels[index],
                partial(self._load, self._places[index]),
            )

    def _load(self, where: tuple[int, int]) -> Decoded:
        return decode(self._bytes(*where))

    def load(self, name: str) -> Decoded:
        """Decode the member of that name."""
        if name not in self._names:
            raise RequestError(f"{self.place} has no image {name!r}")
        return self._load(self._places[self._names.index(name)])

    def _identity(self) -> Iterable[str]:
        return chain(
            [self.name], (f"{name} {size}" for name, (_, size) in zip(self._names, self._places, strict=True))
        )


class ParquetSource(ImageSource):
    """Rows with encoded images: a binary column, or Hugging Face's ``{bytes, path}`` with its class names."""

    def __init__(self, place: Place) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.place, self.name = place, place.name
        try:
            with place.open() as opened, pq.ParquetFile(opened) as file:
                schema = file.schema_arrow
                self._groups = [
                    file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
                ]
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{place} cannot be read: {' '.join(str(error).split())}") from error
        self._image_column = _image_column(place, schema)
        self._label_column = next(
            (
                name
                for name in _LABEL_COLUMNS
                if name in schema.names and pa.types.is_integer(schema.field(name).type)
            ),
            None,
        )
        self.class_names = _class_names(schema.metadata, self._label_column)

    def _total(self) -> int:
        return sum(self._groups)

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        import pyarrow.parquet as pq

        columns = [self._image_column, *([self._label_column] if self._label_column else [])]
        position = 0
        with self.place.open() as opened, pq.ParquetFile(opened) as file:
            for group, rows in enumerate(self._groups):
                if position < stop and position + rows > start:
                    offset = max(0, start - position)
                    for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                        count = batch.num_rows
                        for row in range(min(offset, count), count):
                            if position + row >= stop:
                                return
                            yield self._entry(position + row, batch, row)
                        offset = max(0, offset - count)
                        position += count
                else:
                    position += rows

    def _entry(self, position: int, batch: Any, row: int) -> Entry:
        value = batch.column(self._image_column)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        label = batch.column(self._label_column)[row].as_py() if self._label_column else None
        return Entry(
            f"{self.name}#{position}", f"{self.place}#{position}", label, partial(_decode_bytes, content)
        )

    def _identity(self) -> Iterable[str]:
        return [f"{self._groups}", _file_identity(self.place)]


def _decode_bytes(content: bytes | None) -> Decoded:
    if content is None:
        raise RequestError("the row holds no image bytes")
    return decode(content)


def _image_column(place: Place, schema: Any) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    fitting: list[str] = [str(field.name) for field in schema if holds_bytes(field.type)]
    named = [name for name in _IMAGE_COLUMNS if name in fitting]
    if named or len(fitting) == 1:
        return (named or fitting)[0]
    raise RequestError(
        f"{place} has no column of encoded images: name it {_IMAGE_COLUMNS[0]!r}"
        f" (there are {', '.join(schema.names)})"
    )


def _class_names(metadata: dict[bytes, bytes] | None, column: str | None) -> list[str] | None:
    """Class names as Hugging Face's datasets store them in a file's metadata."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _key(name: str) -> str:
    """WebDataset's key: the member's name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of an image, of a kind that can be read or not."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


# Kinds that cannot be read are listed too: they become rows with an error instead of vanishing.
_READ = ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm"
_UNREAD = ".heic .heif .avif .jxl .jp2 .j2k .psd .svg .eps .ico .tga .exr .hdr"
IMAGE_SUFFIXES = frozenset(f"{_READ} {_UNREAD}".split())


def _file_identity(place: Place) -> str:
    """Size and the content of both ends: enough to tell data sets apart without reading them whole."""
    size = place.size()
    ends = zlib.crc32(place.read(max(0, size - 65536), 65536), zlib.crc32(place.read(0, 65536)))
    return f"{place.name} {size} {ends}"
