"""What an explainer carries of the torch path: the plan of its stages, and the pictures of its backgrounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..backgrounds import Backgrounds
from ..errors import RequestError
from ..explanation import FRESH, RETRIES
from ..families import FROM_IMAGE, HELD_OUT, OTHER, POOL, RANDOM
from ..judge import WAVE
from ..predicate import Predicate
from ..repair import SPARING, Repair
from ..search import REPEATS
from ..targets import Binary, ChosenClass, Score, Target
from ..targets import Value as RegressionValue
from .pictures import Pictures
from .plan import Number, Plan, Sets

THRESHOLD = 0.5


def number_of(target: Target) -> Number | None:
    """The number that a target keeps; None for the class with the highest score. RequestError for any other."""
    if type(target) in (Target, Binary):
        return None
    if isinstance(target, ChosenClass):
        return Number(target.column, "sigmoid" if target.sigmoid else "softmax", target.keep)
    if isinstance(target, Score) and target.function is None:
        both = isinstance(target, RegressionValue)
        return Number(target.column, "scores", target.keep, getattr(target, "tolerance", None), both)
    raise RequestError(
        f"an explainer file cannot answer for '{target}', only for the class with the highest score, a class, a label "
        "or a value; load the classifier with another --target"
    )


def make_plan(
    predicate: Predicate, kept: str, number: Number | None = None, repair: Repair = SPARING
) -> Plan:
    """The stages of a fast explanation with this predicate; kept: the target in words."""
    if repair.again:
        raise RequestError(
            "an explainer file asks for the scores of the kept pixels once; set Repair.again to False"
        )
    if predicate.clean:
        raise RequestError(
            "an explainer file asks all draws of a set that has a miss; set Predicate.clean to False"
        )
    asked = [predicate.stricter(REPEATS["fast"] * 2**attempt) for attempt in range(RETRIES + 1)]
    return Plan(
        kind=predicate.kind,
        rho=predicate.rho,
        tau=predicate.tau,
        dilated=predicate.dilated,
        sets=tuple(Sets(p.repeats, p.draws, p.early, p.misses) for p in asked),
        families=(*RANDOM, *HELD_OUT, OTHER),
        fresh=FRESH["fast"],
        wave=WAVE,
        threshold=THRESHOLD,
        start=repair.start,
        growth=repair.growth,
        bisections=repair.bisections,
        enlarge=repair.enlarge,
        hints=repair.hints,
        text=asked[0].claim(kept),
        number=number,
    )


def make_pictures(
    plan: Plan, backgrounds: Backgrounds, shape: tuple[int, int, int], empty: npt.NDArray[np.float32]
) -> Pictures:
    """The plan's backgrounds for images of ``shape`` (C,H,W); empty: the numbers [K] of the default one."""
    like = torch.zeros(1, *shape)
    drawn, first, count = [], {}, 0
    for (purpose, family), draws in plan.pools.items():
        if family in FROM_IMAGE:
            continue
        if not backgrounds.shared(family):
            raise RequestError(
                "the masker carries no images to draw backgrounds from, and an explainer needs them; fit it again"
            )
        pool = backgrounds.pool(family, like, purpose=purpose, count=draws)
        first[purpose, family] = count
        drawn.append((pool * 255).round().to(torch.uint8).numpy())
        count += draws
    rows, columns = backgrounds.blurs(shape[1:], purpose="certificate", count=POOL)
    return Pictures(
        colour=backgrounds.default(like).reshape(-1).numpy(),
        drawn=np.concatenate(drawn),
        first=first,
        blur=(rows.numpy(), columns.numpy()),
        empty=empty,
    )
