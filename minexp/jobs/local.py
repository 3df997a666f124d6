"""A dataset through explain() on one machine: one row for every input, resumable, whatever the inputs are."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..classifier import Classifier
from ..data.sources import ImageSource
from ..explanation import explain, make_backgrounds
from ..masker import Masker
from ..minimise import Minimisation
from ..objective import Match
from ..predicate import Predicate, Sufficient
from ..search import Effort
from ..weights import state_digest
from .engine import Pixels, Row, run_job

_EXPLAIN = explain
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
    What was left out of images (colour profiles) is said in a warning.
    explain: what to call instead of `minexp.explain`, with its signature (`minexp.jobs.asked`).
    Returns the summary of all rows in `out` (shares of 1; None where nothing was explained). RequestError when
    `out` holds another job.
    """
    predicate = Predicate() if predicate is None else predicate
    search = {"minimisation": minimisation, "preset": preset, "match": match}
    asked = None if explain is _EXPLAIN else explain
    run = _describe(classifier, source, masker, predicate, effort, search, background, seed, asked)
    # Made once: every image of the job, and of the job resumed, meets the same draws.
    backgrounds = make_backgrounds(
        classifier,
        masker,
        reference=_reference(source, classifier) if masker is None else None,
        background=background,
        seed=seed,
    )

    def call(images: Pixels) -> list[Row]:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).to(classifier.device)
        return list(
            explain(
                classifier, x, masker, predicate=predicate, effort=effort, backgrounds=backgrounds, **search
            ).rows()
        )

    return run_job(
        call,
        source,
        out,
        run=run,
        preprocessing=classifier.preprocessing,
        class_names=classifier.class_names,
        batch=batch,
        resume=resume,
        progress=progress,
    )


def _describe(
    classifier: Classifier,
    source: ImageSource,
    masker: Masker | None,
    predicate: Predicate,
    effort: str,
    search: dict[str, Any],
    background: str,
    seed: int,
    asked: Callable[..., Any] | None,
) -> dict[str, Any]:
    """What identifies the job, and what a reader of the store wants to know about it."""
    identity = {
        "classifier": classifier.fingerprint,
        "masker": None if masker is None else state_digest(masker.state_dict()),
        "source": source.fingerprint(),
        "predicate": repr(predicate),
        "effort": effort,
        **{k: v if isinstance(v, str) else repr(v) for k, v in search.items() if v not in (None, "default")},
        "background": background,
        "seed": seed,
    }
    if asked is not None:
        identity["asked"] = repr(asked)
    if not classifier.execution.plain:
        identity["execution"] = str(classifier.execution)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {
        "fingerprint": digest,
        **identity,
        "predicate": predicate.claim(getattr(asked, "question", Sufficient()).claim(str(classifier.target))),
        "source_name": source.name,
        "model": type(classifier.model).__name__,
        "preprocessing": classifier.preprocessing.to_json(),
        "class_names": list(classifier.class_names),
        "provider": f"torch-{classifier.device.type}",
        "precision": classifier.precision,
        "execution": f"{classifier.execution}: {classifier.agreement}",
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
