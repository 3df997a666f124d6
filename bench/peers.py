"""minexp beside the explainers people use: same classifier, images, fill and predicate.

A peer's map is binarised by adding pixels in rank order, growing and then bisecting, until the predicate holds; what
that takes is charged to it, as the repair of a mask is to minexp. Every mask is then audited on draws that nobody has
seen, at nobody's cost. Means have bootstrap 95 % intervals; `paired` is the area less that of minexp's `minimal` on the
same images, with its interval; `break_even`, the images after which fitting the masker and explaining by `fast` has
taken less time than the peer. What was measured is written image by image, and a run that was stopped goes on from it.
"""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attributions import PEERS, Peer, Subject, counting, missing
from peers_table import COLUMNS as COLUMNS  # what bench/run.py prints
from peers_table import CURVES, Measured, Results, plot
from torch import Tensor
from tqdm import tqdm

from minexp.backgrounds import HELD_OUT, RANDOM, Backgrounds, draw_numbers
from minexp.classifier import Classifier
from minexp.controls import wrong_class
from minexp.data import scenes, subjects
from minexp.explanation import explain, make_backgrounds
from minexp.judge import Judge, dilate
from minexp.masker import Masker, load_masker
from minexp.minimise import Minimisation
from minexp.predicate import Predicate
from minexp.refine import Refinement
from minexp.regions import components
from minexp.repair import REPAIRS, threshold_masks
from minexp.search import EFFORTS, Effort, held_to
from minexp.training import fit

CHUNK, SMALL_CHUNK = 64, 5  # images measured before they are written
PAPER_SHARE = 0.2  # of the images that costly explainers see: those of the published recipe
CONTROLLED = 60  # images of the wrong-class control
SMALLEST = 0.01  # share of pixels that a peer's binarisation begins with
AUDIT, AUDIT_POOL = (
    4,
    256,
)  # draws a family for each image, its own among that many: none can tilt a whole table
LEVELS = 8  # points of the insertion and deletion curves


@dataclass(frozen=True)
class Found:
    """What one explainer found: masks bool [N,1,H,W], maps [N,H,W], evaluations and CPU seconds an image."""

    name: str
    budget: str
    masks: Tensor
    maps: Tensor
    holds: Tensor
    evaluations: Tensor
    seconds: float


def of_peer(peer: Peer, judge: Judge, x: Tensor, label: Tensor, budget: int | None) -> Found:
    """The peer's maps, and the level sets of them that satisfy the predicate."""
    subject = Subject(judge.classifier, judge.backgrounds.default(x), budget)
    started = time.process_time()
    with judge.classifier.frozen(), counting(judge.classifier) as count, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        maps = torch.cat(
            [peer.attribute(subject, a, b) for a, b in zip(x.split(32), label.split(32), strict=True)]
        )
    spent = count[0] / len(x)
    # a rank of its own for every pixel: ties would join the mask at once
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    order = (1 - rank / rank.shape[1]).view_as(maps)[:, None].float()
    least = torch.full((len(x),), max(1, round(SMALLEST * rank.shape[1])))
    found = threshold_masks(judge, x, label, order, at_least=least)
    seconds = (time.process_time() - started) / len(x)
    shown = "default" if budget is None else str(budget)
    return Found(peer.name, shown, found.masks, maps, found.holds, found.evaluations + spent, seconds)


def of_minexp(
    name: str,
    effort: Effort,
    judge: Judge,
    x: Tensor,
    backgrounds: Backgrounds,
    masker: Masker | None,
    **options: Any,
) -> Found:
    """minexp's masks; the evaluations are all of them, the certificate's included."""
    started = time.process_time()
    found = explain(
        judge.classifier,
        x,
        masker,
        predicate=judge.predicate,
        effort=effort,
        backgrounds=backgrounds,
        **options,
    )
    seconds = (time.process_time() - started) / len(x)
    masks = found.masks[:, None]
    maps = masks[:, 0].float()
    if masker is not None:
        p = masker.probabilities(x)[:, 0]
        maps = torch.where(masks[:, 0], 1 + p, p)
    return Found(
        name,
        "default",
        masks,
        maps,
        torch.tensor([c.certified for c in found.certificates]),
        torch.tensor([float(c.evaluations) for c in found.certificates]),
        seconds,
    )


def own_draws(x: Tensor) -> list[Tensor]:
    """Numbers [B] of the draws of a family that audit each image of x."""
    return [draw_numbers(x) + number for number in range(AUDIT)]


def audit(found: Found, judge: Judge, x: Tensor, label: Tensor, truth: Tensor) -> Measured:
    """The figures of an explainer's masks, measured on draws that nobody has seen, at nobody's cost."""
    figures: dict[str, np.ndarray] = {}
    masks, default = found.masks, judge.backgrounds.default(x)
    for name, families in (("train", RANDOM), ("held", HELD_OUT)):
        draws = [(family, number) for family in families for number in own_draws(x)]
        figures[name] = judge.kept_on(x, label, masks, draws, "audit", AUDIT_POOL).float().mean(1).numpy()
    shown = {"kept": masks, "dilated": dilate(masks)}
    for name, mask in shown.items():
        kept = judge.logits(torch.where(mask, x, default)).argmax(1) == label
        figures[name] = kept.float().numpy()
    rest = judge.logits(torch.where(masks, default, x)).softmax(1)
    figures["complement"] = rest.gather(1, label[:, None])[:, 0].numpy()
    area = masks.flatten(1).float()
    figures["area"] = area.mean(1).numpy()
    figures["components"] = np.array([components(m[0].numpy()) for m in masks], float)
    decided = truth.flatten(1).any(1)
    inside = (masks[:, 0] & truth).flatten(1).sum(1) / area.sum(1).clamp_min(1)
    figures["inside"] = torch.where(decided, inside, torch.nan).numpy()
    top = found.maps.flatten(1).argmax(1)
    hit = truth.flatten(1).gather(1, top[:, None])[:, 0].float()
    figures["pointing"] = torch.where(decided, hit, torch.nan).numpy()
    rank = found.maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    for name in CURVES:
        scores = []
        for level in range(1, LEVELS):
            chosen = (rank < rank.shape[1] * level // LEVELS).view_as(masks)
            kept_part = chosen if name == "insertion" else ~chosen
            p = judge.logits(torch.where(kept_part, x, default)).softmax(1)
            scores.append(p.gather(1, label[:, None])[:, 0])
        figures[name] = torch.stack(scores).mean(0).numpy()
    n = len(x)
    figures["evaluations"] = found.evaluations.double().numpy()
    figures["failed"] = (~found.holds).double().numpy()
    figures["wrong_class"] = np.full(n, math.nan)
    figures["seconds"] = np.full(n, found.seconds)
    figures["memory_mb"] = np.full(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return Measured(found.name, found.budget, figures)


def prepared(variant: scenes.Variant, out: Path | None) -> tuple[Classifier, Masker]:
    """The variant's classifier and masker, as `minexp demo` makes them; a demo's directory ``out``/VARIANT is used."""
    from minexp import demo

    folder = None if out is None else out / variant
    if folder is not None and (folder / "masker.safetensors").is_file():
        from safetensors.torch import load_file

        tiled = variant in ("mosaic", "segments")
        model = subjects.SceneNet(4 if tiled else 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(load_file(folder / "classifier.safetensors"))
        classifier = subjects.classifier(model.eval(), variant)
        return classifier, load_masker(folder / "masker.safetensors", classifier)
    classifier = subjects.classifier(subjects.train_subject(variant), variant)
    training = scenes.make(variant, demo.MASKER_IMAGES[variant], seed=1)
    return classifier, fit(classifier, training.images, steps=demo.STEPS[variant], progress=False)


def measure(
    quiet: bool,
    *,
    images: int = 500,
    costly_images: int | None = None,
    out: str | None = None,
    variant: scenes.Variant = "plain",
    peers: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows for minexp's efforts, the published recipe and every peer that can be imported, on test scenes of this seed.

    costly_images (a tenth of the images): how many of them, the first, are for explainers that take seconds an image,
    for budgets other than the tools' defaults and for finer cells; PAPER_SHARE of those are for the published recipe.
    peers: names of those to run, separated by commas, or "none". With ``out``, also a Markdown and a CSV table, the
    figures of every image, and two plots there; images that a run with the same number of images, seed and models
    has measured there already are not measured again.
    """
    stem = None if out is None else Path(out) / variant
    few = max(2, images // 10) if costly_images is None else min(images, costly_images)
    classifier, masker = prepared(variant, None if out is None else Path(out))
    data = scenes.make(variant, images, seed=seed, split="test")
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    truth = torch.from_numpy(data.patch if variant == "shortcut" else data.truth)
    backgrounds = make_backgrounds(classifier, masker)
    judge = Judge(classifier, Predicate(), backgrounds)
    label = judge.logits(x).argmax(1)
    job = f"{images} images, seed {seed}, classifier {classifier.fingerprint[:12]}, {AUDIT_POOL} audit draws"
    mine = f"{job}, masker {fingerprint(masker)[:12]}"
    results = Results(stem, (job, mine), masker.metadata.get("seconds", math.nan))
    bar = tqdm(disable=None if not quiet else True, unit="image", leave=False)

    def add(name: str, budget: str, n: int, size: int, job: str, find: Callable[[slice], Found]) -> None:
        """Measure the first n images, ``size`` of them at a time, but for those that are known."""
        known = results.images(name, budget)
        bar.reset(n)
        bar.set_description(f"{name} ({budget})")
        bar.update(min(known, n))
        for first in range(known, n, size):
            part = slice(first, min(first + size, n))
            found = find(part)
            measured = audit(found, judge, x[part], label[part], truth[part])
            if name == "minexp minimal" and first < CONTROLLED:
                tried = slice(first, min(part.stop, CONTROLLED))
                bound = held_to(judge, "minimal")  # the predicate that the masks satisfied
                wrong = wrong_class(bound, x[tried], found.masks[: tried.stop - first], Refinement())
                measured.figures["wrong_class"][: len(wrong)] = wrong.double().numpy()
            results.add(measured, job)  # as it goes: a long run that is stopped leaves what it has
            bar.update(part.stop - part.start)

    def ours(name: str, effort: Effort, n: int, size: int = CHUNK, **options: Any) -> None:
        def find(part: slice) -> Found:
            return of_minexp(name, effort, judge, x[part], backgrounds, **{"masker": masker, **options})

        add(name, "default", n, size, mine, find)

    for effort in reversed(EFFORTS):
        ours(f"minexp {effort}", effort, images)
    if "fast" in EFFORTS:
        ours("minexp fast, levels", "fast", images, repair=REPAIRS["levels"])
    fine = Minimisation(cell=max(1, min(x.shape[2:]) // 8))
    if "minimal" in EFFORTS:
        ours(f"minexp minimal, cells of {fine.cell}", "minimal", few, SMALL_CHUNK, minimisation=fine)
    ours("minexp paper", "refined", round(few * PAPER_SHARE), 1, masker=None, preset="paper")
    chosen = None if peers is None else {name.strip() for name in peers.split(",")}
    for peer in PEERS:
        if chosen is not None and peer.name not in chosen:
            continue
        if (why := missing(peer)) is not None:
            print(why, file=sys.stderr)
            continue
        for budget in peer.budgets:
            n = few if peer.costly or budget is not None else images
            shown = "default" if budget is None else str(budget)
            find = partial(_of_part, peer, judge, x, label, budget)
            try:
                add(peer.name, shown, n, CHUNK if n > few else SMALL_CHUNK, job, find)
            except Exception as error:  # a peer that breaks is left out, and said to be
                print(f"{peer.name} failed: {type(error).__name__}: {error}", file=sys.stderr)
    bar.close()
    rows = results.rows()
    if stem is not None:
        results.write(stem)  # also where nothing was left to measure
        plot(rows, stem)
    return rows


def _of_part(peer: Peer, judge: Judge, x: Tensor, label: Tensor, budget: int | None, part: slice) -> Found:
    return of_peer(peer, judge, x[part], label[part], budget)


def fingerprint(masker: Masker) -> str:
    """Of its weights: another masker gives other masks."""
    digest = hashlib.sha256()
    for value in masker.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
