"""A dataset through an exported explainer, and a store held to it: no torch."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..data.decoding import decode_image
from ..data.sources import ImageSource, load_uri
from ..data.store import Columns, read_rows, read_run, unpack_mask
from ..errors import MinexpError, RequestError
from ..jobs.engine import ONE_PROCESS, Placement, run_job
from ..jobs.unit import ImageUnit, Pixels, Row, Unit
from .runtime import BATCH, Explainer


def explain_dataset(
    explainer: Explainer,
    source: ImageSource,
    out: str | Path,
    *,
    batch: int = BATCH,
    resume: bool = True,
    progress: bool = True,
    placement: Placement = ONE_PROCESS,
) -> dict[str, Any]:
    """`minexp.jobs.engine.run_job` with an exported explainer; the same rows as the torch path stores."""
    if placement.in_process:
        explainer.warm_up(min(batch, len(source)))
    return run_job(
        (lambda number: _unit(explainer)) if placement.in_process else _Units.like(explainer),
        source,
        out,
        run=_describe(explainer, source),
        preprocessing=explainer.about.preprocessing,
        class_names=explainer.class_names,
        batch=batch,
        resume=resume,
        progress=progress,
        placement=placement,
    )


def _unit(explainer: Explainer) -> Unit:
    def call(batch: Columns) -> Sequence[Row]:
        return explainer.explain(batch["image"]).rows()

    return ImageUnit(call)


@dataclass(frozen=True)
class _Units:
    """Opens an explainer again in each worker process; the file was tried in the first one."""

    path: Path
    fingerprint: str
    provider: str
    threads: int

    @classmethod
    def like(cls, explainer: Explainer) -> _Units:
        path = explainer.path.absolute()
        return cls(path, explainer.about.fingerprint, explainer.provider, explainer.threads)

    def __call__(self, number: int) -> Unit:
        explainer = Explainer(self.path, provider=self.provider, threads=self.threads, trusted=True)
        if explainer.about.fingerprint != self.fingerprint:
            raise RequestError(f"{self.path} has changed since the job began: begin again with --no-resume")
        return _unit(explainer)


def _describe(explainer: Explainer, source: ImageSource) -> dict[str, Any]:
    """What identifies the job, and what a reader of the store wants to know about it.

    Provider and precision are facts of each shard and no part of the job's identity: a job may go on elsewhere, and
    `minexp verify` says whether it stays the same.
    """
    about = explainer.about
    identity = {"explainer": about.fingerprint, "source": source.fingerprint()}
    return {
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        **identity,
        "effort": "fast",
        "predicate": about.predicate,
        "source_name": source.name,
        "model": about.extra.get("model"),
        "preprocessing": about.preprocessing.to_json(),
        "class_names": list(about.class_names),
        "provider": explainer.provider_name,
        "precision": about.precision,
        "versions": {"minexp": __version__, "onnxruntime": explainer.version},
    }


def recompute(directory: str | Path, explainer: Explainer, rows: int, *, batch: int = BATCH) -> Iterator[str]:
    """Explain the images of a store again with this explainer, in this runtime: one line for every row that differs.

    rows: how many the store has. Raises RequestError when the store is not this explainer's.
    """
    run = read_run(directory)
    if run.get("class_names") != list(explainer.class_names) or (
        run.get("preprocessing") != explainer.about.preprocessing.to_json()
    ):
        raise RequestError(
            f"{directory} holds explanations of another classifier than {explainer.path}: its classes or its "
            "preprocessing differ; give the explainer that was exported for it"
        )
    for start in range(0, rows, batch):
        stored = read_rows(directory, range(start, min(start + batch, rows)))
        known = [row for row in stored if row["status"] != "error"]
        readable: list[tuple[Row, Pixels]] = []
        for row in known:
            try:
                readable.append((row, explainer.about.preprocessing.pixels(load_uri(row["uri"]))))
            except MinexpError as error:
                yield f"id {row['id']!r}: its image cannot be read again: {error}"
        if readable:
            again = explainer.explain(np.stack([image for _, image in readable])).rows()
            for (row, _), new in zip(readable, again, strict=True):
                if difference := _difference(row, new):
                    yield f"id {row['id']!r}: {difference}"


def selftest_images(explainer: Explainer) -> list[Pixels]:
    """The pictures that travel with an explainer, [H,W,C] each. Raises RequestError where they cannot be read."""
    settings = explainer.about.preprocessing
    try:
        files = [base64.b64decode(row["png"]) for row in explainer.about.extra.get("selftest") or []]
        return [settings.pixels(decode_image(io.BytesIO(file))) for file in files]
    except (KeyError, TypeError, ValueError, RequestError) as error:
        raise RequestError(
            f"{explainer.path}: its own pictures cannot be read ({error}); export it again"
        ) from error


def selftest(explainer: Explainer) -> tuple[int, list[str]]:
    """Explain the pictures that travel with an explainer: their number, and one line for each that differs."""
    rows = explainer.about.extra.get("selftest") or []
    problems = []
    for number, (wanted, image) in enumerate(zip(rows, selftest_images(explainer), strict=True)):
        try:
            new = explainer.explain(image[None]).rows()[0]
            names = ("label", "status", "mask_crc32", "evaluations")
            found = [
                f"{name} {wanted[name]} is {new[name]} here" for name in names if wanted[name] != new[name]
            ]
            names = ("conf", "conf_masked", "area", "robust_train")
            found += [
                f"{name} {wanted[name]:.4f} is {new[name]:.4f} here"
                for name in names
                if abs(wanted[name] - new[name]) > TOLERANCE
            ]
        except (KeyError, TypeError, ValueError, RequestError) as error:
            raise RequestError(
                f"{explainer.path}: its own pictures cannot be read ({error}); export it again"
            ) from error
        problems += [f"picture {number}: {', '.join(found)}"] if found else []
    return len(rows), problems


TOLERANCE = 1e-3  # of a probability stored in 32 bits, over runtimes


def _difference(stored: Row, new: Row) -> str:
    """What another run finds otherwise, in a few words; nothing when it agrees."""
    found = []
    for name in ("label", "status", "kept", "dilation_kept", "robust_train_n", "robust_heldout_n"):
        if stored[name] != new[name]:
            found.append(f"{name} {stored[name]} is {new[name]} here")
    for name in ("conf", "conf_masked", "conf_complement", "conf_empty", "robust_train", "robust_heldout"):
        if abs(stored[name] - new[name]) > TOLERANCE:
            found.append(f"{name} {stored[name]:.4f} is {new[name]:.4f} here")
    if stored["mask"] != new["mask"]:
        masks = [unpack_mask(row["mask"], row["h"], row["w"]) for row in (stored, new)]
        found.append(f"{int((masks[0] != masks[1]).sum())} pixels of the mask differ")
    return ", ".join(found)
