"""A dataset through an explainer, whatever runs it: one row for every input, resumable. No torch."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from tqdm import tqdm

from ..data.preprocessing import Preprocessing
from ..data.sources import ImageSource, Item
from ..data.store import MANIFEST, StoreWriter, read_store
from ..errors import MinexpError, RequestError

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]
ROWS_PER_SHARD = 256  # what a killed job may have to do again


def run_job(
    call: Callable[[Pixels], Sequence[Row]],
    source: ImageSource,
    out: str | Path,
    *,
    run: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    batch: int,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Store one row for every image of ``source`` in the directory ``out``, in the source's order.

    call: explains uint8 [B,H,W,C]; one row an image. run: facts about the job, with `fingerprint`, `provider` and
    `precision`. An input that cannot be decoded, or whose explanation throws, becomes a row with its error. A job that
    was stopped goes on behind its last stored row; ``resume=False`` starts over. What was left out of images (colour
    profiles) is said in a warning.
    Returns the summary of all rows in ``out`` (shares of 1; None where nothing was explained). RequestError when
    ``out`` holds another job.
    """
    truths = _truths(source, class_names)
    started = time.perf_counter()
    store = StoreWriter(out, run=run, rows_per_shard=ROWS_PER_SHARD, resume=resume)
    resumed, total = store.rows_done, len(source)
    written = certified = 0
    notes: Counter[str] = Counter()
    try:
        with (
            store,
            tqdm(total=total, initial=resumed, unit="image", disable=None if progress else True) as bar,
        ):
            # the next batch is decoded while this one is explained
            ready = source.range(resumed, total, prepare=preprocessing.pixels, ahead=batch)
            for items in _batches(ready, batch):
                notes.update(item.note for item in items if item.note)
                rows = _rows(items, call)
                for item, row in zip(items, rows, strict=True):
                    row |= {"id": item.id, "uri": item.uri, "truth": truths(item.label)}
                store.write(rows)
                written += len(rows)
                certified += sum(row["status"] == "certified" for row in rows)
                bar.update(len(rows))
                bar.set_postfix(certified=f"{certified / written:.1%}", refresh=False)
    except BaseException:
        if store.rows_done == 0:  # an empty store would refuse the corrected request as another job
            (store.directory / MANIFEST).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                store.directory.rmdir()
        raise
    seconds = time.perf_counter() - started
    for note, count in notes.items():
        warnings.warn(f"{count} of {written} images: {note}", stacklevel=2)
    return {
        **summarise(out),
        "resumed": resumed,
        "seconds": round(seconds, 3),
        "images_per_second": round(written / seconds, 3),
        "provider": run["provider"],
        "precision": run["precision"],
        "out": str(out),
    }


def _rows(items: Sequence[Item], call: Callable[[Pixels], Sequence[Row]]) -> list[Row]:
    """One row for each prepared item, in order.

    When ``call`` throws for a batch, the images are tried one by one, so that only the culprit's row carries the error.
    """
    images = [item.image for item in items if item.image is not None]
    explained: Iterator[Row] = iter(_each(call, np.stack(images)) if images else ())
    return [_error_row(item.error) if item.image is None else next(explained) for item in items]


def _each(call: Callable[[Pixels], Sequence[Row]], images: Pixels) -> list[Row]:
    try:
        return list(call(images))
    except RequestError:
        raise  # no single image is at fault
    except Exception as error:
        if len(images) == 1:
            return [_error_row(_text(error))]
    return [_each(call, images[place : place + 1])[0] for place in range(len(images))]


def summarise(out: str | Path) -> dict[str, Any]:
    """Counts and means over all rows stored in `out`; a mean is None when no row has the figure."""
    means = {
        "mean_area": "area",
        "kept": "kept",
        "robust_train": "robust_train",
        "robust_heldout": "robust_heldout",
        "evaluations_per_image": "evaluations",
    }
    table = read_store(out, columns=["status", *means.values()])
    counts = {status: pc.sum(pc.equal(table["status"], status)).as_py() or 0 for status in _STATUS_KEYS}
    summary: dict[str, Any] = {"rows": table.num_rows}
    summary |= {key: counts[status] for status, key in _STATUS_KEYS.items()}
    for key, column in means.items():
        mean = pc.mean(table[column]).as_py()
        summary[key] = None if mean is None else round(mean, 6)
    return summary


_STATUS_KEYS = {"certified": "certified", "uncertified": "failed", "error": "errors"}


def _truths(source: ImageSource, class_names: Sequence[str]) -> Callable[[int | None], int | None]:
    """From the source's label to the classifier's class: by name where the names agree, else as it is if it can be."""
    names = source.class_names
    if names is None:
        return lambda label: label
    places = {name: index for index, name in enumerate(class_names)}
    if all(name in places for name in names):
        return lambda label: None if label is None else places[names[label]]
    same = len(names) == len(class_names)
    return lambda label: label if same else None


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _error_row(text: str | None) -> Row:
    return {"status": "error", "error": text or "could not be decoded"}


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, MinexpError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:500]
