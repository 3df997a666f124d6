"""A store's masks in formats of other tools: COCO, PNG files, a Hugging Face data set; shard by shard.

Masks are of the model's input, and so is what is said of an image's size; rows without a mask are left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from ..errors import MinexpError, RequestError
from .files import replacing
from .preprocessing import Preprocessing
from .sources import load_uri
from .store import iter_store, read_manifest
from .table import unpack_mask

Format = Literal["coco", "png", "huggingface"]
Mask = npt.NDArray[np.bool_]
Row = dict[str, Any]
FILE_ROWS = 4096  # of a Hugging Face data set's files
_COLUMNS = ("id", "uri", "status", "truth", "label", "conf", "area", "robust_train", "robust_heldout")


@dataclass(frozen=True)
class Converted:
    """rows: written; left_out: rows without a mask; unread: pictures that could not be read again."""

    format: Format
    rows: int
    left_out: int
    unread: int
    out: str


def convert(directory: str | Path, out: str | Path, format: Format, *, progress: bool = True) -> Converted:
    """Write the store's masks to ``out``: a JSON file for coco, else a directory that is not there or empty.

    Raises RequestError when there is no store of explanations or ``out`` is taken.
    """
    directory, out = Path(directory), Path(out)
    manifest = read_manifest(directory)
    next(iter_store(directory, ["id"]), None)  # a store of masks?
    if format != "coco":
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RequestError(f"{out} is there already: give a directory that is empty or not there")
        out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=manifest.rows, unit=" masks", disable=None if progress else True)
    with bar:
        rows = _Rows(directory, bar.update)
        written, unread = _WRITERS[format](rows, dict(manifest.run), out)
    return Converted(format, written, rows.seen - written, unread, str(out))


class _Rows:
    """Rows with a mask, read again each time they are asked for."""

    def __init__(self, directory: Path, tick: Callable[[int], Any]) -> None:
        self._directory, self._tick, self.seen = directory, tick, 0

    def masks(self) -> Iterator[tuple[Row, Mask]]:
        self.seen = 0
        for row in self._read([*_COLUMNS, "h", "w", "mask"]):
            self.seen += 1
            self._tick(1)
            if row["mask"] is not None:
                yield row, unpack_mask(row.pop("mask"), row["h"], row["w"])

    def names(self) -> Iterator[Row]:
        return (row for row in self._read(["id", "status", "h", "w"]) if row["h"] is not None)

    def _read(self, columns: list[str]) -> Iterator[Row]:
        for table in iter_store(self._directory, columns):
            for batch in table.to_batches(max_chunksize=1024):
                yield from batch.to_pylist()


# ---------------------------------------------------------------- COCO


def _coco(rows: _Rows, run: dict[str, Any], out: Path) -> tuple[int, int]:
    """One object an image: its mask, the class it is evidence for (numbered from 1), the class's probability."""
    about = {"description": f"minexp: masks of {run.get('model')}", "run": run["fingerprint"]}
    about["preprocessing"] = run.get("preprocessing")
    count = 0
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps(about)},\n"categories": [')
        names = enumerate(run.get("class_names") or (), 1)
        file.write(",\n".join(json.dumps({"id": number, "name": name}) for number, name in names))
        file.write('],\n"images": [')
        for number, row in enumerate(rows.names(), 1):
            image = {"id": number, "file_name": row["id"], "width": row["w"], "height": row["h"]}
            file.write((",\n" if number > 1 else "") + json.dumps(image))
        file.write('],\n"annotations": [')
        for count, (row, mask) in enumerate(rows.masks(), 1):
            file.write((",\n" if count > 1 else "") + json.dumps(_annotation(count, row, mask)))
        file.write("]}\n")
    return count, 0


def _annotation(number: int, row: Row, mask: Mask) -> Row:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [0, 0, 0, 0]
    if len(ys):
        box = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1]
    return {
        "id": number,
        "image_id": number,
        "category_id": row["label"] + 1,
        "segmentation": {"size": list(mask.shape), "counts": rle(mask)},
        "area": int(mask.sum()),
        "bbox": box,
        "iscrowd": 0,
        "score": row["conf"],
        "certified": row["status"] == "certified",
        "robust_heldout": row["robust_heldout"],
    }


def rle(mask: Mask) -> str:
    """COCO's compressed run lengths of a mask [h, w]: column by column, zeros first; each but the first three as the
    difference to the one two before; five bits a character, lowest first, the sixth saying that more follow."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(flat)]]))
    counts = [0, *runs.tolist()] if len(flat) and flat[0] else runs.tolist()
    out = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            out.append(chr(48 + (bits | 32 if more else bits)))
            if not more:
                break
    return "".join(out)


# ---------------------------------------------------------------- PNG


def _png(rows: _Rows, run: dict[str, Any], out: Path) -> tuple[int, int]:
    """A black and white file for each mask, under the image's id."""
    count = 0
    for row, mask in rows.masks():
        count += 1
        with replacing(out / _relative(row["id"])) as temporary:
            Image.fromarray(mask).save(temporary, "PNG")
    return count, 0


def _relative(name: str) -> str:
    """A path that stays below its folder, whatever an id from someone's archive says."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".", "..")]
    safe = ["".join("_" if c in ':*?"<>|' or ord(c) < 32 else c for c in part) for part in parts]
    return "/".join(safe or ["image"]) + ".png"


# ---------------------------------------------------------------- Hugging Face


def _huggingface(rows: _Rows, run: dict[str, Any], out: Path) -> tuple[int, int]:
    """Parquet files that `datasets.load_dataset` reads: the model's input beside its mask, class and certificate."""
    names = list(run.get("class_names") or ())
    preprocessing = Preprocessing.from_json(run["preprocessing"])
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shares = ("conf", "area", "robust_train", "robust_heldout")
    features: dict[str, Any] = {name: {"_type": "Image"} for name in ("image", "mask")}
    features["label"] = {"names": names, "_type": "ClassLabel"}
    features |= {name: {"dtype": "float32", "_type": "Value"} for name in shares}
    features["certified"] = {"dtype": "bool", "_type": "Value"}
    features["id"] = {"dtype": "string", "_type": "Value"}
    kinds = {
        "image": picture,
        "mask": picture,
        "label": pa.int64(),
        "certified": pa.bool_(),
        "id": pa.string(),
    }
    schema = pa.schema([(name, kinds.get(name, pa.float32())) for name in features])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    count = unread = 0
    waiting: list[Row] = []
    number = 0

    def flush() -> None:
        nonlocal number
        with replacing(out / "data" / f"train-{number:05d}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(waiting, schema), temporary, row_group_size=256)
        number += 1
        waiting.clear()

    for row, mask in rows.masks():
        count += 1
        image = _input(row["uri"], preprocessing)
        unread += image is None
        entry = {name: row[name] for name in ("id", "label", *shares)}
        entry |= {"certified": row["status"] == "certified", "mask": _encoded(Image.fromarray(mask))}
        waiting.append(entry | {"image": image})
        if len(waiting) == FILE_ROWS:
            flush()
    if waiting or not number:
        flush()
    return count, unread


def _input(uri: str, preprocessing: Preprocessing) -> Row | None:
    """The picture as the model saw it, on which the mask lies; None where it is no longer there."""
    try:
        pixels = preprocessing.pixels(load_uri(uri))
    except (MinexpError, OSError):
        return None
    return _encoded(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _encoded(image: Image.Image) -> Row:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


_WRITERS: dict[str, Callable[[_Rows, dict[str, Any], Path], tuple[int, int]]] = {
    "coco": _coco,
    "png": _png,
    "huggingface": _huggingface,
}
