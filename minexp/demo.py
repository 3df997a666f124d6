"""`minexp demo`: the whole job on the built-in scenes, whose deciding pixels are known."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .backgrounds import GREY
from .classifier import Classifier
from .data import scenes as scene_data
from .data import subjects
from .data.files import replacing, write_text
from .data.scenes import Scenes, Variant
from .data.sources import open_source
from .data.store import read_rows, read_store, unpack_mask
from .demo_circuits import circuits
from .errors import RequestError
from .jobs.local import explain_dataset
from .masker import Masker, load_masker
from .objective import preset
from .predicate import Predicate
from .report import Figure, Panel, Section, write_montage, write_report
from .training import fit

MASKER_IMAGES = dict.fromkeys(scene_data.VARIANTS, 6000) | {"mosaic": 16_000}
MOST_IMAGES = 48_000
STEPS = dict.fromkeys(scene_data.VARIANTS, 1200) | {"mosaic": 2000}  # of the masker
EXPORT_CHECKS = 64  # scenes on which the exported files are compared with torch
PREDICATE = Predicate()


@dataclass(frozen=True)
class Truth:
    """How masks relate to what decides the label; shares in [0, 1], None where the variant has no such figure.

    inside: mean share of a mask inside the truth region; mostly_inside: share of masks with more than half there;
    mostly_inside_right: the same among scenes that the classifier gets right (a wrong answer rests on other pixels);
    on_patch: among images that the corner patch decides, share whose mask covers most of the patch.
    """

    inside: float | None
    mostly_inside: float | None
    mostly_inside_right: float | None
    patch_decides: int
    on_patch: float | None


def run(
    out: str | Path,
    *,
    variant: Variant = "plain",
    images: int = 1000,
    steps: int | None = None,
    scenes: int | None = None,
    augmented: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a classifier, fit a masker, explain and certify held-out scenes, write the report; returns the figures.

    What is already in ``out`` is used, and what was interrupted goes on. scenes, steps: by default as many as the
    variant takes (subjects.SCENES, STEPS).
    """
    steps = STEPS[variant] if steps is None else steps
    scenes = subjects.SCENES[variant] if scenes is None else scenes
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    say = _Narrator(quiet)
    settings = {"variant": variant, "scenes": scenes, "augmented": augmented, "seed": seed}
    classifier = _classifier(out, settings, say)
    held_out = scene_data.make(variant, images, seed=seed, split="test")
    right = subjects.accuracy(classifier.model, held_out)
    say.stage(f"classifier: {right:.1%} of {images} held-out scenes right")
    masker = _masker(out, classifier, variant, steps, seed, say)
    alone = masker_alone(classifier, masker, held_out)
    say.stage(f"masker alone: keeps {alone['area']:.1%} of the pixels, decision kept in {alone['kept']:.1%}")
    say.stage(f"masker alone: {alone['mostly_inside']:.1%} of the masks mostly in the truth region")
    data = out / "scenes.npz"
    if not _same_scenes(data, held_out):
        with replacing(data) as temporary:
            np.savez(temporary, images=held_out.images, labels=held_out.labels)
    summary = explain_dataset(
        classifier,
        open_source(str(data)),
        masker,
        out / "explanations",
        predicate=PREDICATE,
        effort="fast",
        batch=64,
        progress=not quiet,
    )
    say.stage(f"explained: {summary['certified']} of {summary['rows']} certified")
    masks = stored_masks(out / "explanations")
    truth = compare(classifier, held_out, masks)
    opening = _opening_picture(out, held_out, masks)
    about = masker.metadata
    result = {
        **summary,
        "accuracy": right,
        "masker_alone_kept": alone["kept"],
        "masker_alone_area": alone["area"],
        "masker_alone_mostly_inside_truth": alone["mostly_inside"],
        "inside_truth": truth.inside,
        "mostly_inside_truth": truth.mostly_inside,
        "mostly_inside_truth_where_right": truth.mostly_inside_right,
        "patch_decides": truth.patch_decides,
        "on_patch": truth.on_patch,
        "p_empty": float(np.mean(read_store(out / "explanations", columns=["conf_empty"])["conf_empty"])),
        "masker_share_of_classifier_macs": masker.macs(held_out.images.shape[1:3]) / classifier.macs(),
        "fit_seconds": about["seconds"],
    }
    circuit_page, circuit_section = circuits(out, classifier, _tensors(held_out)[0])
    say.stage(f"circuits: {circuit_page}")
    page = write_report(
        out / "explanations",
        out=out / "report.html",
        sections=[*_sections(out, held_out, masks, truth, alone, result), circuit_section],
    )
    result |= {"circuits": str(circuit_page)}
    result |= {"report": str(page), "opening": str(opening)}
    result |= _export(out, classifier, masker, held_out, say)
    result |= {"total_seconds": round(say.seconds(), 1)}
    write_text(out / "summary.json", json.dumps(result, indent=1) + "\n")
    say.table(result)
    return result


def _export(
    out: Path, classifier: Classifier, masker: Masker, scenes: Scenes, say: _Narrator
) -> dict[str, Any]:
    """masker.onnx and explainer.onnx, where what writes them is installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "spox", "onnxruntime")):
        say.stage("export: left out; pip install 'minexp[export,onnx]'")
        return {}
    from .deploy.export import export

    try:
        done = export(classifier, masker, out / "deployed", images=scenes.images[:EXPORT_CHECKS])
    except (
        RequestError
    ) as error:  # rounding can move a pixel that lies on the threshold; the rest of the demo stands
        say.stage(f"export: {error}")
        return {"export_refused": str(error)}
    say.stage(f"exported: {done.explainer}, as torch on {done.parity.images} scenes: {done.parity}")
    return {"explainer": str(done.explainer), "parity_mask_flips": done.parity.mask_flips}


class _Narrator:
    def __init__(self, quiet: bool) -> None:
        self.quiet, self.start = quiet, time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def stage(self, line: str) -> None:
        if not self.quiet:
            print(f"[{self.seconds():5.0f} s] {line}", flush=True)

    def table(self, result: dict[str, Any]) -> None:
        if self.quiet:
            return
        lines = [
            ("classifier, held-out accuracy", f"{result['accuracy']:.1%}"),
            ("explanations certified", f"{result['certified']} of {result['rows']}"),
            ("pixels kept, mean", f"{result['mean_area']:.1%}"),
            ("decision kept: masker alone", f"{result['masker_alone_kept']:.1%}"),
            ("decision kept: certified mask", f"{result['kept']:.1%}"),
            ("robust, training backgrounds", f"{result['robust_train']:.3f}"),
            ("robust, held-out backgrounds", f"{result['robust_heldout']:.3f}"),
            ("p(class | nothing kept), mean", f"{result['p_empty']:.3f}"),
        ]
        if result["inside_truth"] is not None:
            lines.append(("share of the mask in the truth region", f"{result['inside_truth']:.1%}"))
            lines.append(("masks mostly in the truth region", f"{result['mostly_inside_truth']:.1%}"))
            if result["mostly_inside_truth_where_right"] is not None:
                lines.append(
                    ("  where the classifier is right", f"{result['mostly_inside_truth_where_right']:.1%}")
                )
        if result["on_patch"] is not None:
            lines.append(("masks on the patch, where it decides", f"{result['on_patch']:.1%}"))
        lines.append(("classifier evaluations an image", f"{result['evaluations_per_image']:.0f}"))
        width = max(len(name) for name, _ in lines)
        print("", *(f"  {name:<{width}}  {value:>14}" for name, value in lines), sep="\n")
        print(
            f"\n  report   {result['report']}\n  picture  {result['opening']}   ({result['total_seconds']:.0f} s)"
        )


def _classifier(out: Path, settings: dict[str, Any], say: _Narrator) -> Classifier:
    path, about = out / "classifier.safetensors", out / "classifier.json"
    variant = settings["variant"]
    classes = 4 if variant in ("mosaic", "segments") else 10
    model = subjects.SceneNet(classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if path.is_file():
        if not about.is_file() or json.loads(about.read_text()) != settings:
            raise RequestError(f"{out}: holds a demo with other settings; choose another --out, or delete it")
        model.load_state_dict(load_file(path))
        say.stage(f"classifier: {path} exists")
    else:
        model = subjects.train_subject(
            variant,
            augmented=settings["augmented"],
            count=settings["scenes"],
            seed=settings["seed"],
            progress=not say.quiet,
        )
        write_text(about, json.dumps(settings) + "\n")
        with replacing(path) as temporary:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    return subjects.classifier(model.eval(), variant)


def _masker(
    out: Path, classifier: Classifier, variant: Variant, steps: int, seed: int, say: _Narrator
) -> Masker:
    path = out / "masker.safetensors"
    if path.is_file():
        masker = load_masker(path, classifier)
        if masker.metadata.get("steps") != steps:
            raise RequestError(
                f"{path}: fitted with {masker.metadata.get('steps')} steps, not {steps}; "
                "choose another --out, or delete it"
            )
        say.stage(f"masker: {path} exists")
        return masker
    count = max(MASKER_IMAGES[variant], min(4 * steps, MOST_IMAGES))  # a longer fit sees more scenes
    training = scene_data.make(variant, count, seed=seed + 1, split="train")
    return fit(classifier, training.images, steps=steps, out=path, seed=seed, progress=not say.quiet)


def _same_scenes(path: Path, scenes: Scenes) -> bool:
    if not path.is_file():
        return False
    with np.load(path) as stored:
        return np.array_equal(stored["images"], scenes.images)


@torch.no_grad()
def masker_alone(classifier: Classifier, masker: Masker, scenes: Scenes) -> dict[str, float]:
    """Area, kept share and share mostly in the truth region of the masker's own masks at 0.5, before any repair."""
    kept, area, masks = [], [], []
    background = masker.mean.view(1, -1, 1, 1)
    for x in _tensors(scenes):
        mask = masker.probabilities(x) > 0.5
        same = classifier.logits(torch.where(mask, x, background)).argmax(1) == classifier.logits(x).argmax(1)
        kept.append(same.float())
        area.append(mask.float().mean((1, 2, 3)))
        masks.append(mask[:, 0].numpy())
    inside = compare(classifier, scenes, np.concatenate(masks)).mostly_inside
    return {
        "kept": torch.cat(kept).mean().item(),
        "area": torch.cat(area).mean().item(),
        "mostly_inside": math.nan if inside is None else inside,
    }


def _tensors(scenes: Scenes, size: int = 100) -> tuple[Tensor, ...]:
    return (torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 255).split(size)


def stored_masks(directory: Path) -> np.ndarray:
    """All masks of a store whose images share one size: bool [N,H,W]."""
    table = read_store(directory, columns=["mask", "h", "w"])
    return np.stack(
        [
            unpack_mask(mask, h, w)
            for mask, h, w in zip(*(table[name].to_pylist() for name in ("mask", "h", "w")), strict=True)
        ]
    )


@torch.no_grad()
def compare(classifier: Classifier, scenes: Scenes, masks: np.ndarray) -> Truth:
    """Where the masks lie, against what decides the label and, for shortcuts, against what the classifier uses.

    The patch decides an image when greying it changes the classifier's answer and greying the digit does not.
    """
    decided = scenes.truth.any((1, 2))
    share = (masks & scenes.truth).sum((1, 2)) / np.maximum(1, masks.sum((1, 2)))
    inside, mostly = (float(np.mean(v[decided])) if decided.any() else None for v in (share, share > 0.5))
    answer = torch.cat([classifier.logits(x).argmax(1) for x in _tensors(scenes)]).numpy()
    correct = decided & (answer == scenes.labels)
    right = float(np.mean(share[correct] > 0.5)) if correct.any() else None
    if not scenes.patch.any():
        return Truth(inside, mostly, right, 0, None)
    grey = torch.tensor(GREY).view(1, 3, 1, 1)
    answers: dict[str, list[Tensor]] = {"no_patch": [], "no_digit": []}
    patches, boxes = (torch.from_numpy(m).unsqueeze(1).split(100) for m in (scenes.patch, scenes.truth))
    for x, patch, box in zip(_tensors(scenes), patches, boxes, strict=True):
        answers["no_patch"].append(classifier.logits(torch.where(patch, grey, x)).argmax(1))
        answers["no_digit"].append(classifier.logits(torch.where(box, grey, x)).argmax(1))
    no_patch, no_digit = (torch.cat(v).numpy() for v in answers.values())
    decides = (no_patch != answer) & (no_digit == answer)
    covered = (masks & scenes.patch).sum((1, 2)) / scenes.patch.sum((1, 2))
    on_patch = float(np.mean(covered[decides] > 0.5)) if decides.any() else None
    return Truth(inside, mostly, right, int(decides.sum()), on_patch)


def _opening_picture(out: Path, scenes: Scenes, masks: np.ndarray, count: int = 6) -> Path:
    """Image → mask → kept image with the certificate line, for a few scenes of typical area."""
    areas = masks.mean((1, 2))
    order = np.argsort(np.abs(areas - np.median(areas)), kind="stable")
    chosen: list[int] = []
    for index in order.tolist():  # one scene a class
        if all(scenes.labels[index] != scenes.labels[other] for other in chosen):
            chosen.append(index)
        if len(chosen) == count:
            break
    rows = read_rows(out / "explanations", chosen)
    panels = []
    for index, row in zip(chosen, rows, strict=True):
        kept = np.where(masks[index][..., None], scenes.images[index], 128).astype(np.uint8)
        line = (
            f"\u201c{row['label_name']}\u201d from {row['area']:.1%} of the pixels · p {row['conf']:.2f} to "
            f"{row['conf_masked']:.2f} · robust {row['robust_train']:.2f} "
            f"[{row['robust_train_low']:.2f}, {row['robust_train_high']:.2f}] · {row['status']}"
        )
        panels.append(Panel(scenes.images[index], masks[index], kept, line))
    path = out / "opening.png"
    write_montage(panels, path)
    return path


def _sections(
    out: Path,
    scenes: Scenes,
    masks: np.ndarray,
    truth: Truth,
    alone: dict[str, float],
    result: dict[str, Any],
) -> list[Section]:
    table = [
        ["figure", "value"],
        ["classifier, accuracy on held-out scenes", f"{result['accuracy']:.1%}"],
        ["masker alone: pixels kept", f"{alone['area']:.1%}"],
        ["masker alone: decision kept", f"{alone['kept']:.1%}"],
        ["after repair: pixels kept", f"{result['mean_area']:.1%}"],
    ]
    if truth.inside is not None:
        table.append(["share of a mask inside the region that decides", f"{truth.inside:.1%}"])
        table.append(["masks with more than half of their area there", f"{truth.mostly_inside:.1%}"])
        if truth.mostly_inside_right is not None:
            table.append(["the same, where the classifier is right", f"{truth.mostly_inside_right:.1%}"])
    text = (
        "These scenes were composed, so the region that decides each label is known. A good explanation of a good "
        "classifier lies there."
    )
    if truth.on_patch is not None:
        table.append(["images that the corner patch decides", str(truth.patch_decides)])
        table.append(["of these, masks that cover most of the patch", f"{truth.on_patch:.1%}"])
        text = (
            "The colour of a corner patch names the class in most training scenes. Where greying the patch changes "
            "the classifier's answer and greying the digit does not, the patch decides, and an honest explanation "
            "has to show it: this classifier cheats."
        )
    sections = [Section("Against the known truth", text, [Figure(_overlay(scenes, masks), _LEGEND)], table)]
    curve = out / "masker.png"
    if curve.is_file():
        sections.append(
            Section(
                "How the masker was trained",
                "Area of the masks, and the share of decisions kept on the mean colour and on random backgrounds. "
                "The area's weight rises while the decision holds often enough (target "
                f"{preset('default').soft_target:.0%} of the images with soft masks, {preset('default').target:.0%} "
                "with thresholded ones) and falls while it does not.",
                [Figure(curve, "Training curve, running means.")],
            )
        )
    return sections


_LEGEND = "Held-out scenes: the known region in outline, what the mask keeps in colour, the rest faded."


def _overlay(scenes: Scenes, masks: np.ndarray, count: int = 12) -> np.ndarray:
    """Scenes side by side: kept pixels in colour, the rest faded, the truth region outlined."""
    wanted = np.nonzero((scenes.patch if scenes.patch.any() else scenes.truth).any((1, 2)))[0][:count]
    tiles = []
    for index in wanted:
        image = scenes.images[index].astype(np.float32)
        faded = image.mean(2, keepdims=True) * 0.35 + 150
        tile = np.where(masks[index][..., None], image, faded)
        region = scenes.patch[index] | scenes.truth[index] if scenes.patch.any() else scenes.truth[index]
        inner = region.copy()
        inner[1:-1, 1:-1] &= region[:-2, 1:-1] & region[2:, 1:-1] & region[1:-1, :-2] & region[1:-1, 2:]
        inner[[0, -1]], inner[:, [0, -1]] = False, False
        tile[region & ~inner] = (255, 220, 0)
        tiles.append(np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=255))
    half = max(1, len(tiles) // 2)
    rows = [np.concatenate(tiles[i : i + half], 1) for i in range(0, half * 2, half)]
    picture = np.concatenate([r for r in rows if r.shape == rows[0].shape], 0)
    return picture.clip(0, 255).astype(np.uint8).repeat(3, 0).repeat(3, 1)
