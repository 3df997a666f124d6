"""What each term of the objective is worth: per-image searches with one of them switched off or exchanged.

Same classifier, images, steps and predicate. `alone` figures are of the last step's mask at 0.5, before any repair; the
others of the smallest mask found that satisfies the predicate, audited on draws that nobody has seen.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import AUDIT_POOL, own_draws, prepared
from peers_table import interval
from torch import Tensor

from minexp.backgrounds import HELD_OUT, RANDOM
from minexp.data import scenes
from minexp.explanation import make_backgrounds
from minexp.judge import Judge
from minexp.objective import Objective, make_target
from minexp.predicate import Predicate
from minexp.refine import COLD, Refinement, descend, refine

COLUMNS = (
    *("variant", "images", "area", "area_ci", "train", "held", "inside"),
    *("alone_area", "alone_kept", "alone_train", "alone_inside", "seconds"),
)
BASE = Refinement().objective
VARIANTS: dict[str, Objective] = {
    "default": BASE,
    "activations: off": replace(BASE, match="off"),
    "activations: MSE": replace(BASE, match="mse"),
    "activations: cosine": replace(BASE, match="cosine"),
    "activations: KL × 10": replace(BASE, act=10 * BASE.act),
    "no cross-entropy": replace(BASE, ce=0.0),
    "no output KL": replace(BASE, kl=0.0),
    "no robustness": replace(BASE, rob=0.0),
    "no crispness": replace(BASE, crisp=0.0),
    "no total variation": replace(BASE, tv=0.0),
    "fixed area weight": replace(BASE, dual=False, area=15.0),
    "thresholded from the first step": replace(BASE, soft=0.0),
}


def measure(
    quiet: bool, *, images: int = 100, out: str | None = None, steps: int = COLD, seed: int = 0
) -> list[dict[str, Any]]:
    """A row a variant, on scenes of the validation split; the classifier of `--out`/plain, or one trained for this."""
    classifier, masker = prepared("plain", None if out is None else Path(out))
    data = scenes.make("plain", images, seed=seed, split="validation")
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    truth = torch.from_numpy(data.truth)
    judge = Judge(classifier, Predicate(), make_backgrounds(classifier, masker))
    rows, size = [], judge.micro_batch.size
    for name, objective in VARIANTS.items():
        started = time.process_time()
        settings = Refinement(steps=steps, check=10, objective=objective)
        found, alone = [], []
        for first in range(0, images, size):
            part = x[first : first + size]
            numbers = torch.arange(first, first + len(part))
            found.append(refine(judge, part, settings, numbers=numbers).masks)
        seconds = (time.process_time() - started) / images
        with classifier.frozen():
            for first in range(0, images, size):
                part = x[first : first + size]
                numbers = torch.arange(first, first + len(part))
                target = make_target(classifier, part, objective, reused=True)
                *_, p = descend(judge, part, target, settings, None, numbers)
                alone.append(p > 0.5)
        masks = torch.cat(found)
        figures = of(judge, x, masks, truth)
        low, high = interval(masks.flatten(1).float().mean(1).numpy())
        line = {"variant": name, "images": images, "area_ci": f"{low:.3f}–{high:.3f}", "seconds": seconds}
        line |= {key: figures[key] for key in ("area", "train", "held", "inside")}
        line |= {f"alone_{key}": value for key, value in of(judge, x, torch.cat(alone), truth).items()}
        rows.append(line)
        if not quiet:
            print({k: v for k, v in line.items() if k in COLUMNS[:7]}, file=sys.stderr)
    return rows


def of(judge: Judge, x: Tensor, masks: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over images of area, class kept, robust on training and held-out families, share inside the truth."""
    label = judge.logits(x).argmax(1)
    kept = judge.logits(torch.where(masks, x, judge.backgrounds.default(x))).argmax(1) == label
    figures = {"area": masks.float().mean().item(), "kept": kept.float().mean().item()}
    for name, families in (("train", RANDOM), ("held", HELD_OUT)):
        draws: list[tuple[str, int | Tensor]] = [(family, n) for family in families for n in own_draws(x)]
        figures[name] = judge.kept_on(x, label, masks, draws, "audit", AUDIT_POOL).float().mean().item()
    pixels = masks[:, 0].flatten(1).sum(1)
    inside = (masks[:, 0] & truth).flatten(1).sum(1) / pixels.clamp_min(1)
    figures["inside"] = inside.mean().item()
    return figures
