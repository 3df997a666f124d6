"""`minexp explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RequestError
from .base import DONE, PARTLY, WithModel, at_least_one, table
from .engine import WithEngine, gpus_here

if TYPE_CHECKING:
    from ..classifier import Classifier
    from ..masker import Masker


@dataclass(frozen=True, kw_only=True)
class Explain(WithModel, WithEngine):
    """Explain a set of images: one certified minimal mask and one stored row for each."""

    example = "minexp explain --model torchvision:resnet18 --masker masker.safetensors --data photos/ --out runs/photos"

    model: str = ""
    """The classifier: torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory or file.py:factory."""
    onnx: Path | None = None
    """An explainer.onnx of `minexp export` in place of --model and --masker: runs without torch."""
    data: str
    """Images: a folder, a glob, one image, a .txt of paths, .npz, .npy, IDX, WebDataset .tar or Parquet."""
    out: Path
    """Directory of the Parquet store."""
    masker: Path | None = None
    """Masker made by `minexp fit` for this classifier; without it each image is optimised on its own."""
    effort: Literal["fast", "refined", "minimal"] | None = None
    """fast: the masker's mask, repaired; refined: optimised image by image (the default without a masker);
    minimal: reduced until no single cell can go."""
    repair: Literal["guided", "levels"] = "guided"
    """How a mask that fails grows: by the classifier's gradient, or by a lower threshold, as in exported files."""
    preset: Literal["default", "kl", "paper"] = "default"
    """Objective where masks are optimised image by image; paper: the published recipe, a network for every image."""
    match: Literal["kl", "mse", "cosine", "off"] | None = None
    """How that objective compares activations, in place of the preset's way."""
    cell: int | None = None
    """Side of a cell in pixels; a quarter of the image for minimal, an eighth for --why-not and --necessary."""
    max_evals: int | None = None
    """With those: classifier evaluations an image may take to be reduced; what is left then is not called minimal."""
    multiple: int = 1
    """Up to so many disjoint explanations of each image, each enough on its own: the second in OUT/2, and so on."""
    why_not: str | None = None
    """A class, by name or number: the fewest pixels that keep the image's own class ahead of that one."""
    necessary: bool = False
    """The fewest pixels without which the class is lost, in place of those that are enough for it."""
    predicate: Literal["robust", "top1", "score"] = "robust"
    """What a mask has to do: keep the class on random backgrounds, on the plain background, or keep its probability."""
    rho: float = 0.95
    """With robust: share of the random backgrounds on which the class has to stay."""
    draws: int = 20
    """With robust: number of random backgrounds."""
    dilated: bool = False
    """Keep the class also when the mask grows by a pixel on all sides."""
    tau: float = 0.5
    """With score: the probability to reach."""
    background: Literal["mean", "black", "white"] = "mean"
    """What removed pixels become in the kept image."""
    seed: int = 0
    """Seed of the random backgrounds."""
    provider: Literal["cpu", "cuda", "tensorrt", "openvino"] = "cpu"
    """With --onnx: where it runs; what is not there is an error."""
    threads: int = 1
    """With --onnx: threads of one image's operators."""

    def run(self) -> int:
        at_least_one("--batch", self.batch)
        summary = self._with_torch() if self.onnx is None else self._without_torch(self.onnx)
        self.show(summary, table(summary) + f"\nnext: minexp report {self.out}")
        return PARTLY if summary["failed"] or summary["errors"] else DONE

    def _without_torch(self, path: Path) -> dict[str, Any]:
        from ..data.sources import open_source
        from ..deploy.job import explain_dataset
        from ..deploy.runtime import Explainer

        decided = [f.name for f in fields(self) if f.name in _EXPORTED and getattr(self, f.name) != f.default]
        if decided:
            raise RequestError(
                f"--{decided[0].replace('_', '-')} was decided when {path} was exported; leave it out, or export again"
            )
        at_least_one("--threads", self.threads)
        source = open_source(self.data, limit=self.limit)
        return explain_dataset(
            Explainer(path, provider=self.provider, threads=self.threads),
            source,
            self.out,
            batch=self.batch,
            resume=self.resume,
            progress=not self.quiet,
            placement=self.placement(gpus_here() if self.provider in ("cuda", "tensorrt") else 0),
        )

    def _with_torch(self) -> dict[str, Any]:
        if not self.model:
            raise RequestError(
                "no classifier: give --model SPEC, or --onnx explainer.onnx; see minexp explain --help"
            )
        from ..data.sources import open_source
        from ..jobs.local import explain_dataset
        from ..minimise import Minimisation
        from ..predicate import Predicate
        from ..questions import FROM_ALL
        from ..repair import REPAIRS

        if self.cell is not None:
            at_least_one("--cell", self.cell)
        if self.max_evals is not None:
            at_least_one("--max-evals", self.max_evals)
        minimisation = None
        if self._asks():
            minimisation = replace(FROM_ALL, cell=self.cell, max_evals=self.max_evals)
        elif self.effort == "minimal":
            minimisation = Minimisation(cell=self.cell, max_evals=self.max_evals)
        elif self.cell is not None or self.max_evals is not None:
            raise RequestError("--cell and --max-evals belong to --effort minimal; add it, or leave them out")
        source = open_source(self.data, limit=self.limit)
        placement = self.placement(0 if self.device == "cpu" else gpus_here())
        classifier, masker = self.subject(None if placement.engine == "local" else "cpu")
        questions = self._questions(classifier)
        job = partial(
            explain_dataset,
            classifier,
            source,
            masker,
            predicate=Predicate(
                self.predicate, rho=self.rho, draws=self.draws, tau=self.tau, dilated=self.dilated
            ),
            minimisation=minimisation,
            preset=self.preset,
            match=self.match,
            repair=REPAIRS[self.repair],
            effort=self.effort or ("refined" if masker is None else "fast"),
            background=self.background,
            seed=self.seed,
            batch=self.batch,
            resume=self.resume,
            progress=not self.quiet,
            placement=placement,
            load=self.subject,
        )
        summary = job(self.out, **questions[0])
        for number, question in enumerate(questions[1:], 2):
            further = job(self.out / str(number), **question)
            summary[f"certified_{number}"] = further["certified"]
        return summary

    def subject(self, device: str | None) -> tuple[Classifier, Masker | None]:
        """The classifier and the masker that these options name, on a device (None: as the options say)."""
        from ..masker import load_masker

        classifier = self.classifier(device)
        return classifier, None if self.masker is None else load_masker(self.masker, classifier)

    def _asks(self) -> bool:
        """Is it another question than which pixels are enough?"""
        return self.necessary or self.why_not is not None

    def _questions(self, classifier: Classifier) -> list[dict[str, Any]]:
        """For each store to write, what explains its images in place of `explain`."""
        from ..jobs.asked import Another, Needed, WhyNot

        at_least_one("--multiple", self.multiple)
        if (self.multiple > 1) + (self.why_not is not None) + self.necessary > 1:
            raise RequestError(
                "--multiple, --why-not and --necessary are questions of their own; give one of them"
            )
        if self._asks() and (self.effort is not None or self.preset != "default" or self.match is not None):
            raise RequestError(
                "--why-not and --necessary are always reduced until no cell can go; leave --effort, --preset and"
                " --match out"
            )
        if self.necessary:
            return [{"explain": Needed()}]
        if self.why_not is not None:
            return [{"explain": WhyNot(_class(self.why_not, classifier.class_names))}]
        return [{}, *({"explain": Another(number)} for number in range(2, self.multiple + 1))]


def _class(text: str, names: Sequence[str]) -> int:
    """The number of the class called ``text``, or numbered so."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    near = get_close_matches(text, names, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise RequestError(
        f"--why-not {text}: no class of that name, nor number from 0 to {len(names) - 1}{hint}"
    )


# Settings that an explainer.onnx carries.
_EXPORTED = (
    *(
        "model",
        "weights",
        "num_classes",
        "class_names",
        "size",
        "mean",
        "std",
        "taps",
        "device",
        "trust_model",
    ),
    *("ema", "target", "keep", "tolerance", "precision", "channels_last", "compile"),
    *("masker", "effort", "predicate", "rho", "draws", "tau", "dilated", "background", "seed"),
    *("repair", "preset", "match", "cell", "max_evals", "multiple", "why_not", "necessary"),
)
