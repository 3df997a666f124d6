"""A dataset through explain() on one machine: one row for every input, resumable, whatever the inputs are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..classifier import Classifier
from ..data.sources import ImageSource, Item
from ..data.store import MANIFEST, StoreWriter, read_store
from ..errors import MinexpError, RequestError
from ..explanation import explain, make_backgrounds
from ..masker import Masker
from ..minimise import Minimisation
from ..objective import Match
from ..predicate import Predicate
from ..search import Effort
from ..weights import state_digest

Row = dict[str, Any]
ROWS_PER_SHARD = 256  # what a killed job may have to do again
REFERENCES = 32  # images of the data that backgrounds are made from, where no masker brings its own


def explain_dataset(
    classifier: Classifier,
    source: ImageSource,
    masker: Masker | None,
    out: str | Path,
    *,
    predicate: Predicate | None = None,
    effort: Effort = "fast",
    minimisation: Minimisation | None = None,
    preset: str = "default",
    match: Match | None = None,
    background: str = "mean",
    seed: int = 0,
    batch: int = 32,
    resume: bool = True,
    progress: bool = True,
    explain: Callable[..., Any] = explain,
) -> dict[str, Any]:
    """Explain every image of `source` and store one row for each in the directory `out`, in the source's order.

    An input that cannot be decoded, or whose explanation throws, becomes a row with its error. A job that was
    stopped goes on behind its last stored row; `resume=False` starts over. The batch size changes no answer.
    explain: what to call instead of `minexp.explain`, with its signature.
    Returns the summary of all rows in `out` (shares of 1; None where nothing was explained). RequestError when
    `out` holds another job.
    """
    predicate = Predicate() if predicate is None else predicate
    run = _describe(
        classifier, source, masker, predicate, effort, minimisation, preset, match, background, seed
    )
    truths = _truths(source, classifier)
    started = time.perf_counter()
    # Made once: every image of the job, and of the job resumed, meets the same draws.
    backgrounds = make_backgrounds(
        classifier,
        masker,
        reference=_reference(source, classifier) if masker is None else None,
        background=background,
        seed=seed,
    )

    def call(x: Tensor) -> list[Row]:
        return list(
            explain(
                classifier,
                x,
                masker,
                predicate=predicate,
                effort=effort,
                backgrounds=backgrounds,
                minimisation=minimisation,
                preset=preset,
                match=match,
            ).rows()
        )

    store = StoreWriter(out, run=run, rows_per_shard=ROWS_PER_SHARD, resume=resume)
    resumed, total = store.rows_done, len(source)
    written = certified = 0
    try:
        with (
            store,
            tqdm(total=total, initial=resumed, unit="image", disable=None if progress else True) as bar,
        ):
            ready = (prepare(classifier, item) for item in source.range(resumed, total))
            for items in _batches(ready, batch):
                rows = explain_items(classifier, items, call)
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
    return {
        **summarise(out),
        "resumed": resumed,
        "seconds": round(seconds, 3),
        "images_per_second": round(written / seconds, 3),
        "provider": run["provider"],
        "precision": run["precision"],
        "out": str(out),
    }


def prepare(classifier: Classifier, item: Item) -> Item:
    """The item with its image as the classifier takes it, uint8 [H, W, C], or with the reason why there is none.

    Done image by image, because a large photograph decoded takes a thousand times the memory of a model's input.
    """
    if item.image is None:
        return item
    try:
        return replace(item, image=classifier.preprocessing.pixels(item.image))
    except Exception as error:
        return replace(item, image=None, error=_text(error))


def explain_items(
    classifier: Classifier, items: Sequence[Item], call: Callable[[Tensor], list[Row]]
) -> list[Row]:
    """One row for each prepared item, in order; `call` explains [B, C, H, W] in pixel space.

    When it throws for a batch, the images are tried one by one, so that only the culprit's row carries the error.
    """
    images = [item.image for item in items if item.image is not None]
    explained: Iterator[Row] = iter(())
    if images:
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255).to(classifier.device)
        explained = iter(_each(call, x))
    return [_error_row(item.error) if item.image is None else next(explained) for item in items]


def _each(call: Callable[[Tensor], list[Row]], x: Tensor) -> list[Row]:
    try:
        return call(x)
    except RequestError:
        raise  # no single image is at fault
    except Exception as error:
        if len(x) == 1:
            return [_error_row(_text(error))]
    return [_each(call, image)[0] for image in x.split(1)]


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


def _describe(
    classifier: Classifier,
    source: ImageSource,
    masker: Masker | None,
    predicate: Predicate,
    effort: str,
    minimisation: Minimisation | None,
    preset: str,
    match: Match | None,
    background: str,
    seed: int,
) -> dict[str, Any]:
    """What identifies the job, and what a reader of the store wants to know about it."""
    identity = {
        "classifier": classifier.fingerprint,
        "masker": None if masker is None else state_digest(masker.state_dict()),
        "source": source.fingerprint(),
        "predicate": repr(predicate),
        "effort": effort,
        **({} if minimisation is None else {"minimisation": repr(minimisation)}),
        **({} if preset == "default" else {"preset": preset}),
        **({} if match is None else {"match": match}),
        "background": background,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {
        "fingerprint": digest,
        **identity,
        "predicate": str(predicate),
        "source_name": source.name,
        "model": type(classifier.model).__name__,
        "preprocessing": classifier.preprocessing.to_json(),
        "class_names": list(classifier.class_names),
        "provider": f"torch-{classifier.device.type}",
        "precision": str(next(classifier.model.parameters(), torch.zeros(0)).dtype).removeprefix("torch."),
        "versions": {"minexp": __version__, "torch": torch.__version__},
    }


def _reference(source: ImageSource, classifier: Classifier) -> Tensor | None:
    """Some of the job's images, evenly spaced, for backgrounds with the data's statistics: float [M,C,H,W].

    None for a short source: an image would often be its own background.
    """
    if len(source) < 2 * REFERENCES:
        return None
    pixels = []
    for number in range(REFERENCES):
        place = number * len(source) // REFERENCES
        for item in source.range(place, place + 1):
            with contextlib.suppress(Exception):  # unreadable here, an error row later
                if item.image is not None:
                    pixels.append(classifier.preprocessing.pixels(item.image))
    if len(pixels) < 2:
        return None
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)


def _truths(source: ImageSource, classifier: Classifier) -> Callable[[int | None], int | None]:
    """From the source's label to the classifier's class: by name where the names agree, else as it is if it can be."""
    names = source.class_names
    if names is None:
        return lambda label: label
    places = {name: index for index, name in enumerate(classifier.class_names)}
    if all(name in places for name in names):
        return lambda label: None if label is None else places[names[label]]
    same = len(names) == classifier.num_classes
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
