"""A dataset through explain(): the core unit with torch, and what identifies a job of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..classifier import Classifier
from ..data.sources import ImageSource
from ..data.table import Columns
from ..explanation import explain, make_backgrounds
from ..masker import Masker
from ..minimise import Minimisation
from ..objective import Match
from ..predicate import Predicate, Sufficient
from ..repair import GUIDED, Repair
from ..search import Effort
from ..weights import state_digest
from .engine import ONE_PROCESS, Placement, run_job
from .subject import Given, Load, images_on, load_for, some_of
from .unit import ImageUnit, Pixels, Row, Unit

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
    repair: Repair = GUIDED,
    background: str = "mean",
    seed: int = 0,
    batch: int = 32,
    resume: bool = True,
    progress: bool = True,
    placement: Placement = ONE_PROCESS,
    load: Load | None = None,
    explain: Callable[..., Any] = explain,
) -> dict[str, Any]:
    """Explain every image of `source` and store one row for each in the directory `out`, in the source's order.

    An input that cannot be decoded, or whose explanation throws, becomes a row with its error. A job that was
    stopped goes on with the rows that are missing; `resume=False` starts over. Neither the batch size nor the
    placement changes an answer.
    load: makes the classifier and the masker on a device, in each worker process; without it those given are sent
    there. explain: what to call instead of `minexp.explain`, with its signature (`minexp.jobs.asked`).
    Returns the summary of the rows in `out` (shares of 1; None where nothing was explained). RequestError when
    `out` holds another job. What was left out of images (colour profiles) is said in a warning.
    """
    predicate = Predicate() if predicate is None else predicate
    device = str(classifier.device) if placement.engine == "local" else "cuda" if placement.gpus else "cpu"
    search = {"minimisation": minimisation, "preset": preset, "match": match, "repair": repair}
    asked = explain if hasattr(explain, "question") else None  # of `jobs.asked`, whose repr says what it asks
    run = _describe(classifier, source, masker, predicate, effort, search, background, seed, asked)
    run["provider"] = f"torch-{torch.device(device).type}"
    given = load is None or placement.in_process
    units = _Units(
        load=Given(classifier, masker) if given or load is None else load,
        device=device,
        fingerprints=(run["classifier"], run["masker"]),
        reference=_reference(source, classifier) if masker is None else None,
        background=background,
        seed=seed,
        explain=explain,
        settings={"predicate": predicate, "effort": effort, **search},
    )
    return run_job(
        units,
        source,
        out,
        run=run,
        preprocessing=classifier.preprocessing,
        class_names=classifier.class_names,
        batch=batch,
        resume=resume,
        progress=progress,
        placement=placement,
    )


@dataclass(frozen=True)
class _Units:
    """Makes the core unit of a worker. fingerprints: of the classifier and the masker that the job is about."""

    load: Load
    device: str
    fingerprints: tuple[str, str | None]
    reference: Pixels | None
    background: str
    seed: int
    explain: Callable[..., Any]
    settings: Mapping[str, Any]

    def __call__(self, number: int) -> Unit:
        classifier, masker = load_for(self.load, self.device, number, self.fingerprints)
        backgrounds = make_backgrounds(
            classifier,
            masker,
            reference=None if self.reference is None else images_on("cpu", self.reference),
            background=self.background,
            seed=self.seed,
        )

        def call(batch: Columns) -> list[Row]:
            x = images_on(classifier.device, batch["image"])
            return list(self.explain(classifier, x, masker, backgrounds=backgrounds, **self.settings).rows())

        return ImageUnit(call)


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
        "precision": classifier.precision,
        "execution": f"{classifier.execution}: {classifier.agreement}",
        "versions": {"minexp": __version__, "torch": torch.__version__},
    }


def _reference(source: ImageSource, classifier: Classifier) -> Pixels | None:
    """Some of the job's images, for backgrounds with the data's statistics: uint8 [M,H,W,C].

    None for a short source: an image would often be its own background.
    """
    if len(source) < 2 * REFERENCES:
        return None
    return some_of(source, classifier.preprocessing, REFERENCES)
