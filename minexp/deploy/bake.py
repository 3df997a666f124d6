"""What an explainer carries of the torch path: the plan of its stages, and the pictures of its backgrounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..backgrounds import Backgrounds
from ..errors import RequestError
from ..explanation import RETRIES
from ..families import FROM_IMAGE, HELD_OUT, OTHER, POOL, RANDOM
from ..predicate import Predicate
from ..repair import THOROUGH
from .graph import Pictures
from .plan import Plan

THRESHOLD = 0.5


def make_plan(predicate: Predicate, *, fresh: int) -> Plan:
    """The stages of a fast explanation; fresh: certificate draws a family."""
    attempts, predicate = range(RETRIES + 1), predicate.thorough()
    robust = predicate.kind == "robust"
    stricter = [predicate.stricter(2**attempt) for attempt in attempts]
    return Plan(
        kind=predicate.kind,
        rho=predicate.rho,
        tau=predicate.tau,
        draws=tuple(p.draws if robust else 0 for p in stricter),
        misses=tuple(p.misses if robust else 0 for p in stricter),
        families=(*RANDOM, *HELD_OUT, OTHER),
        fresh=fresh,
        wave=len(RANDOM),
        threshold=THRESHOLD,
        growth=THOROUGH.growth,
        bisections=THOROUGH.bisections,
        enlarge=THOROUGH.enlarge,
        texts=tuple(map(str, stricter)),
    )


def make_pictures(
    plan: Plan, backgrounds: Backgrounds, shape: tuple[int, int, int], empty: npt.NDArray[np.float32]
) -> Pictures:
    """The plan's backgrounds for images of ``shape`` (C,H,W); empty: class probabilities of the default one."""
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
