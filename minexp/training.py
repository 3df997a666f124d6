"""Fit a masker to a classifier over a dataset: soft masks first, then thresholded straight-through."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .backgrounds import random_mixture
from .classifier import Classifier
from .data.files import replacing
from .data.sources import ImageSource
from .errors import RequestError
from .masker import Architecture, Masker, straight_through
from .microbatch import out_of_memory
from .objective import AreaDual, Objective, evaluate_terms, make_target, preset
from .ranks import ALONE, Ranks, joined, whole_batches

REFERENCES = 32  # images stored with the masker, for the backgrounds of explanations
CHECKPOINT_EVERY = 200  # steps
MEMORY = 4 * 2**30  # bytes of pixels held; a masker learns from a sample of a larger set
COLLAPSED_EMPTY, COLLAPSED_FULL = 0.001, 0.95  # mean areas that mean the masker explains nothing


@dataclass(frozen=True)
class Step:
    """One line of the training curve; shares and areas are of the batch's masks as trained on."""

    step: int
    loss: float
    area: float
    kept: float
    robust: float
    area_weight: float
    hard: bool


def fit(
    classifier: Classifier,
    images: np.ndarray | Tensor | Iterable[Any],
    *,
    preset_name: str = "default",
    objective: Objective | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch: int = 32,
    lr: float = 3e-3,
    out: str | Path | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> Masker:
    """Train a masker for ``classifier`` on ``images``: uint8 [N,H,W,C], float [N,C,H,W] in [0,1], or a source of items.

    steps (default 1500) or epochs over the images bound the training. With ``out`` (a .safetensors path) the
    masker is written there, its training curve beside it (.csv, .png), and a killed run resumes from its last
    checkpoint: every step draws from (seed, step) alone, so that a resumed run equals an undisturbed one.
    Under torchrun the processes share each batch and get the masker that one process would, up to rounding; the
    first of them writes. Raises RequestError for fewer than two images or a size the masker cannot take.
    """
    with joined(classifier.device) as ranks:
        return _fit(
            classifier,
            images,
            ranks,
            preset_name=preset_name,
            objective=preset(preset_name) if objective is None else objective,
            steps=steps,
            epochs=epochs,
            batch=batch,
            lr=lr,
            out=out,
            seed=seed,
            resume=resume,
            progress=progress and ranks.first,
            on_step=on_step,
        )


def _fit(
    classifier: Classifier,
    images: Any,
    ranks: Ranks,
    *,
    preset_name: str,
    objective: Objective,
    steps: int | None,
    epochs: float | None,
    batch: int,
    lr: float,
    out: str | Path | None,
    seed: int,
    resume: bool,
    progress: bool,
    on_step: Callable[[Step], None] | None,
) -> Masker:
    pixels = as_pixels(images, classifier, progress=progress)
    batch = min(batch, len(pixels))
    if batch < ranks.count:
        raise RequestError(f"a batch of {batch} images for {ranks.count} processes; give each at least one")
    steps = _steps(steps, epochs, len(pixels), batch)
    _, channels, height, width = pixels.shape
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        masker = Masker(Architecture(channels=channels, stride=2 if min(height, width) < 128 else 4))
    masker.to(classifier.device)
    picks = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:REFERENCES]
    masker.reference = pixels[picks].to(classifier.device)
    masker.mean = _mean_colour(pixels).to(classifier.device)
    run = _Run(classifier, masker, objective, pixels, steps, batch, lr, seed, ranks)
    checkpoint = _Checkpoint(Path(out), run.identity(preset_name)) if out is not None else None
    resumed = checkpoint.restore(run) if checkpoint is not None and resume else False
    if not ranks.agree(run.step):
        raise RequestError("the processes find different checkpoints; give an --out that all of them share")
    with (
        classifier.frozen(),
        whole_batches(masker, ranks),
        tqdm(total=steps, initial=run.step, desc="masker", disable=None if progress else True) as bar,
    ):
        while run.step < steps:
            record = _advance(run)
            bar.update()
            if record.step % 10 == 0:
                bar.set_postfix(
                    area=f"{record.area:.3f}",
                    kept=f"{record.kept:.2f}",
                    robust=f"{record.robust:.2f}",
                    refresh=False,
                )
            if on_step is not None:
                on_step(record)
            if (
                checkpoint is not None
                and ranks.first
                and run.step % CHECKPOINT_EVERY == 0
                and run.step < steps
            ):
                checkpoint.save(run)
    masker.eval()
    metrics = _final_metrics(run.curve)
    masker.metadata = {
        "classifier": classifier.fingerprint,
        "preset": preset_name,
        "objective": asdict(objective),
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "images": len(pixels),
        "seconds": round(run.seconds + time.perf_counter() - run.started, 2),
        "resumed": resumed,
        "metrics": metrics,
    }
    if ranks.first:
        _warn_if_collapsed(metrics)
    if checkpoint is not None and ranks.first:
        masker.save(checkpoint.out)
        write_curve(run.curve, checkpoint.out)
        checkpoint.discard()
    return masker


class _Run:
    """The state of one training run; ``advance`` is a pure function of it and the step's number."""

    def __init__(
        self,
        classifier: Classifier,
        masker: Masker,
        objective: Objective,
        pixels: Tensor,
        steps: int,
        batch: int,
        lr: float,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.classifier, self.masker, self.objective, self.ranks = classifier, masker, objective, ranks
        self.pixels, self.steps, self.batch, self.lr, self.seed = pixels, steps, batch, lr, seed
        self.optimiser = torch.optim.AdamW(masker.parameters(), lr=lr, weight_decay=1e-4)
        self.dual = AreaDual(objective)
        self.step = 0
        self.seconds, self.started = 0.0, time.perf_counter()  # seconds: of the processes before this one
        self.curve: list[Step] = []

    def identity(self, preset_name: str) -> dict[str, Any]:
        """What must agree for a checkpoint to be this run's."""
        return {
            "classifier": self.classifier.fingerprint,
            "preset": preset_name,
            "objective": asdict(self.objective),
            "steps": self.steps,
            "batch": self.batch,
            "lr": self.lr,
            "seed": self.seed,
            "images": [*self.pixels.shape, int(self.pixels[:: max(1, len(self.pixels) // 64)].sum())],
        }

    def indices(self) -> Tensor:
        """The step's images: consecutive slices of one permutation an epoch."""
        per_epoch = len(self.pixels) // self.batch
        epoch, place = divmod(self.step, per_epoch)
        order = torch.randperm(
            len(self.pixels), generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        )
        return order[place * self.batch : (place + 1) * self.batch]

    def advance(self) -> Step:
        objective, masker = self.objective, self.masker.train()
        rng = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.step)
        x = self.pixels[self.indices()].to(self.classifier.device).float() / 255
        hard = self.step >= objective.soft * self.steps
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * _rate(self.step, self.steps)
        drawn = random_mixture(x, masker.mean, rng)  # for all images: a draw depends on those before it
        mine = self.ranks.share(len(x))
        x, drawn = x[mine], drawn[mine]
        target = make_target(self.classifier, x, objective, reused=False)
        p = torch.sigmoid(masker(x))
        mask = straight_through(p) if hard else p
        background = masker.mean.view(1, -1, 1, 1)
        terms = evaluate_terms(objective, self.classifier, x, p, mask, target, background, drawn)
        loss = terms.total(objective, self.dual.value) * (len(x) / self.batch)
        with torch.no_grad():
            figures = (
                (mask > 0.5).float().mean((1, 2, 3)),
                terms.kept,
                terms.robust,
                terms.kept & terms.robust,
            )
            sums = [figure.float().sum() / self.batch for figure in figures]
            whole, area, kept, robust, held = self.ranks.sum(torch.stack([loss, *sums])).tolist()
        if not math.isfinite(whole):
            raise RequestError(
                f"training diverged at step {self.step} (loss {whole}); lower --lr, or check the weights for NaN"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.sum_gradients(masker)
        torch.nn.utils.clip_grad_norm_(masker.parameters(), 1.0)
        self.optimiser.step()
        record = Step(self.step, whole, area, kept, robust, self.dual.value, hard)
        self.dual.update(held, hard=hard)
        self.curve.append(record)
        self.step += 1
        return record


def _advance(run: _Run) -> Step:
    try:
        return run.advance()
    except Exception as error:
        if not out_of_memory(error):
            raise
        # another batch is another training: it is for the caller to choose
        raise RequestError(
            f"not enough memory for a step on {run.batch} images; give --batch {max(2, run.batch // 2)}"
        ) from error


class _Checkpoint:
    """One safetensors file with everything a killed run needs; whole or absent, never half."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        if out.suffix != ".safetensors":
            raise RequestError(
                f"{out}: a masker is written as .safetensors; name it {out.with_suffix('.safetensors')}"
            )
        self.out = out
        self.path = out.with_suffix(".fit")
        self.identity = json.loads(json.dumps(identity))
        out.parent.mkdir(parents=True, exist_ok=True)

    def save(self, run: _Run) -> None:
        state = {f"masker.{k}": v.detach().cpu().contiguous() for k, v in run.masker.state_dict().items()}
        for index, moments in run.optimiser.state_dict()["state"].items():
            for name, value in moments.items():
                state[f"optimiser.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        about = {
            "identity": self.identity,
            "step": run.step,
            "area_weight": run.dual.value,
            "seconds": run.seconds + time.perf_counter() - run.started,
            "curve": [list(asdict(s).values()) for s in run.curve],
        }
        with replacing(self.path) as temporary:
            save_file(state, temporary, metadata={"minexp": json.dumps(about)})

    def restore(self, run: _Run) -> bool:
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("minexp", "{}"))
            state = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise RequestError(
                f"{self.path}: not a readable checkpoint ({error}); delete it, or give --no-resume"
            ) from error
        if about.get("identity") != self.identity:
            raise RequestError(
                f"{self.path}: checkpoint of another fit (model, data or settings differ); "
                "finish that one, delete it, or give --no-resume"
            )
        run.masker.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("masker.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimiser."):
                _, index, name = key.split(".", 2)
                moments.setdefault(int(index), {})[name] = value
        run.optimiser.load_state_dict({**run.optimiser.state_dict(), "state": moments})
        run.step = about["step"]
        run.dual.value = about["area_weight"]
        run.seconds = about["seconds"]
        run.curve = [Step(*values) for values in about["curve"]]
        return True

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def as_pixels(images: Any, classifier: Classifier, *, progress: bool = False) -> Tensor:
    """uint8 [N,C,H,W] of model size from arrays or from a source of items; undecodable items are left out."""
    if isinstance(images, Tensor):
        pixels = images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)
    elif isinstance(images, np.ndarray):
        pixels = torch.from_numpy(images)
        pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels
    else:
        bar = tqdm(
            _affordable(images, classifier), desc="reading", disable=None if progress else True, leave=False
        )
        ready = [classifier.preprocessing.pixels(i.image) for i in bar if i.image is not None]
        if not ready:
            raise RequestError(
                "no image of the data could be read; `minexp explain` writes the reason beside each"
            )
        pixels = torch.from_numpy(np.stack(ready)).permute(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] != classifier.input_shape[0]:
        raise RequestError(
            f"images of shape {list(pixels.shape)}; give uint8 [N,H,W,{classifier.input_shape[0]}] or float [N,C,H,W]"
        )
    if len(pixels) < 2 or min(pixels.shape[2:]) < 16:
        raise RequestError(
            f"{len(pixels)} images of {list(pixels.shape[2:])} pixels; give at least 2 of at least 16×16"
        )
    return pixels.contiguous()


def _affordable(images: Iterable[Any], classifier: Classifier) -> Iterable[Any]:
    """All items or, where their pixels would not fit into memory, evenly spaced runs of as many as do."""
    affordable = MEMORY // math.prod(classifier.input_shape)
    if not isinstance(images, ImageSource) or len(images) <= affordable:
        return images
    runs = min(256, affordable)
    starts = [run * len(images) // runs for run in range(runs)]
    return chain.from_iterable(images.range(start, start + affordable // runs) for start in starts)


def _steps(steps: int | None, epochs: float | None, count: int, batch: int) -> int:
    if steps is not None and epochs is not None:
        raise RequestError("give --steps or --epochs, not both")
    total = math.ceil(epochs * (count // batch)) if epochs is not None else 1500 if steps is None else steps
    if total < 1:
        raise RequestError(f"{total} training steps; give at least 1")
    return total


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return (
        (step + 1) / warm if step < warm else 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / steps))
    )


def _mean_colour(pixels: Tensor) -> Tensor:
    return pixels[:1024].float().mean((0, 2, 3)) / 255


def _final_metrics(curve: list[Step]) -> dict[str, float]:
    last = curve[-50:]
    return {
        name: float(np.mean([getattr(s, name) for s in last])) for name in ("area", "kept", "robust", "loss")
    }


def _warn_if_collapsed(metrics: dict[str, float]) -> None:
    if metrics["area"] < COLLAPSED_EMPTY:
        warnings.warn(
            "the masks are empty: the area weighs too much; fit again with a lower area weight or more soft steps",
            stacklevel=3,
        )
    elif metrics["area"] > COLLAPSED_FULL:
        warnings.warn(
            "the masks keep everything: the decision does not survive on other backgrounds; give more steps, "
            "or train the classifier with noise and erased regions",
            stacklevel=3,
        )


def write_curve(curve: list[Step], out: Path) -> None:
    """The training curve as CSV and, drawn with Pillow, as PNG beside the masker."""
    from .report.curve import draw_curve

    with replacing(out.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Step.__annotations__)
        writer.writerows(asdict(s).values() for s in curve)
    draw_curve(
        {name: [getattr(s, name) for s in curve] for name in ("area", "kept", "robust")},
        out.with_suffix(".png"),
        switch=next((s.step for s in curve if s.hard), None),
    )
