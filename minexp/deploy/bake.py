"""What an explainer carries of the torch path: the plan of its stages, and the pictures of its backgrounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..backgrounds import Backgrounds
from ..certify import Predicate
from ..errors import RequestError
from ..explanation import GROW, RETRIES
from ..families import FROM_IMAGE, HELD_OUT, OTHER, POOL, RANDOM
from ..repair import BISECTIONS, STEP_UP
from .graph import Pictures
from .plan import Plan

THRESHOLD = 0.5


def make_plan(predicate: Predicate, kept: str, *, fresh: int) -> Plan:
    """The stages of a fast explanation; kept: the target in words; fresh: certificate draws a family."""
    attempts = range(RETRIES + 1)
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
        growth=STEP_UP,
        bisections=BISECTIONS,
        enlarge=GROW,
        texts=tuple(p.claim(kept) for p in stricter),
    )


def make_pictures(
    plan: Plan, backgrounds: Backgrounds, shape: tuple[int, int, int], empty: npt.NDArray[np.float32]
) -> Pictures:
    """The plan's backgrounds for images of ``shape`` (C,H,W); empty: class probabilities of the default one."""
    like = torch.zeros(1, *shape)
    colour = (backgrounds.default(like).reshape(-1) * 255).round().to(torch.uint8).numpy()
    drawn, first, count = [np.broadcast_to(colour[None, :, None, None], like.shape)], {}, 1
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
        colour=colour,
        drawn=np.concatenate(drawn),
        first=first,
        blur=(rows.numpy(), columns.numpy()),
        empty=empty,
    )
