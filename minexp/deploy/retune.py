"""An exported file with another threshold or other numbers of its predicate, without the models it was made of."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx

from ..errors import RequestError
from ..predicate import Predicate
from .bake import make_plan
from .job import selftest_images
from .metadata import EXPLAINER, MASKER, About, fingerprint_of, read_about
from .ops import set_constants
from .plan import Plan
from .runtime import Explainer
from .sealed import finished, opened, selftest_rows
from .untrusted import read_model


def retune(
    path: str | Path, *, threshold: float | None = None, rho: float | None = None, tau: float | None = None
) -> bytes:
    """The explainer.onnx or masker.onnx at ``path`` with these in place of its own.

    threshold: of the masker's probabilities, in (0, 1). rho, tau: as in `minexp.Predicate`, of a robust and of a score
    predicate. The metadata names the file this was made from, whose comparison with torch it carries as that file's:
    torch has not seen this one. Its pictures are explained anew, in the runtime at hand.
    Raises RequestError for what the file has not, and for files written before they could be retuned.
    """
    path = Path(path)
    content, metadata = read_model(path)
    about = read_about(content, metadata, path, (EXPLAINER, MASKER))
    given = {"threshold": threshold, "rho": rho, "tau": tau}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise RequestError(f"{path} is exported already: give --page FILE.html, --threshold, --rho or --tau")
    if threshold is not None and not 0 < threshold < 1:
        raise RequestError(f"threshold {threshold:g}; give one between 0 and 1, both excluded")
    if about.format == MASKER and set(changes) != {"threshold"}:
        raise RequestError(f"{path}: a masker has a threshold and no predicate; retune its explainer")
    plan, new = _retuned(about, changes, path)
    model = onnx.load_from_string(content)
    settings = (
        plan.settings if about.format == EXPLAINER else {"minexp.threshold": np.float32(plan.threshold)}
    )
    try:
        set_constants(model, settings)
    except KeyError as error:
        raise RequestError(
            f"{path}: was exported before files could be retuned ({error}); export it again"
        ) from error
    if about.format == EXPLAINER and (images := selftest_images(Explainer(path))):
        found = opened(finished(model, new)).explain(np.stack(images))
        new = replace(new, extra={**new.extra, "selftest": selftest_rows(found)})
    return finished(model, new)


def _retuned(about: About, changes: dict[str, float], path: Path) -> tuple[Plan, About]:
    """The plan and the metadata with these changes."""
    try:
        old = Plan.from_json(about.extra["plan"])
        kept, identity = str(about.extra.get("kept", "top-1 kept")), dict(about.extra["identity"])
        first = old.sets[0]
        predicate = Predicate(
            old.kind, old.rho, first.draws, old.tau, first.early, first.repeats, dilated=old.dilated
        )
        wanted = {"rho": "robust", "tau": "score"}
        for name, kind in wanted.items():
            if name in changes and predicate.kind != kind:
                raise RequestError(f"{path}: its predicate is {predicate.kind}, which has no {name}")
        predicate = replace(predicate, rho=changes.get("rho", old.rho), tau=changes.get("tau", old.tau))
        plan = replace(
            make_plan(predicate, kept, old.number), threshold=changes.get("threshold", old.threshold)
        )
        if (
            replace(plan, rho=old.rho, tau=old.tau, threshold=old.threshold, sets=old.sets, text=old.text)
            != old
        ):
            raise RequestError(f"{path}: was exported by another version; export it again")
    except (KeyError, TypeError, IndexError) as error:
        raise RequestError(f"{path}: its metadata has no plan ({error}); export it again") from error
    identity |= {"predicate": repr(predicate), "threshold": plan.threshold}
    retuned = {"from": about.fingerprint, "parity": about.extra.get("parity"), "changes": changes}
    extra = {**about.extra, "identity": identity, "plan": asdict(plan), "parity": None, "retuned": retuned}
    return plan, replace(
        about,
        fingerprint=fingerprint_of(identity),
        rho=plan.rho if plan.kind == "robust" else None,
        predicate=plan.text,
        threshold=plan.threshold,
        extra=extra,
    )
