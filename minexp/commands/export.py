"""`minexp export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RequestError
from .base import DONE, WithModel, at_least_one, table

if TYPE_CHECKING:
    from ..data.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Export(WithModel):
    """Write a classifier and its masker as ONNX: masker.onnx, and explainer.onnx with the whole certificate."""

    example = "minexp export --model torchvision:resnet18 --masker masker.safetensors --out deployed/"

    model: str = ""
    """The classifier: torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory, file.py:factory or .onnx."""
    masker: Path | None = None
    """Masker made by `minexp fit` for this classifier."""
    out: Path | None = None
    """Directory of the files; with --onnx, the file to write."""
    onnx: Path | None = None
    """An exported file, in place of --model and --masker: for --page (no torch needed), --threshold, --rho or --tau."""
    page: Path | None = None
    """Also one HTML file that explains images in a browser, offline."""
    web_runtime: Path | None = None
    """With --page: a tarball or folder of onnxruntime-web, in place of the one that npm fetches once."""
    data: str | None = None
    """Images on which the files are compared with torch; by default those the masker carries."""
    limit: int = 64
    """How many of them."""
    predicate: Literal["robust", "top1", "score"] = "robust"
    """What a mask has to do, as in `minexp explain`."""
    rho: float | None = None
    """With robust: share of the random backgrounds on which the class has to stay, by default 0.95."""
    draws: int = 20
    """With robust: number of random backgrounds."""
    tau: float | None = None
    """With score: the probability to reach, by default 0.5."""
    threshold: float | None = None
    """With --onnx: the threshold of the masker's probabilities in the file that is written, in place of 0.5."""
    background: Literal["mean", "black", "white"] = "mean"
    """What removed pixels become in the kept image."""
    seed: int = 0
    """Seed of the random backgrounds."""
    quantize: Literal["int8"] | None = None
    """8-bit networks, calibrated on the same images; refused when they change more than a few answers."""
    layout: Literal["flat", "triton"] = "flat"
    """triton: a model repository for Triton, OpenVINO Model Server and KServe."""

    def run(self) -> int:
        summary = self._files() if self.onnx is None else self._again(self.onnx)
        if self.page is not None:
            from ..deploy.page import write_page

            summary["page"] = str(write_page(summary["explainer"], self.page, web_runtime=self.web_runtime))
        text = table(summary | {"files": ", ".join(summary["files"])})
        self.show(summary, f"{text}\nnext: minexp explain --onnx {summary['explainer']} --data DIR --out DIR")
        return DONE

    def _again(self, onnx: Path) -> dict[str, Any]:
        """The file that is there or, with another threshold, rho or tau, the one written in its likeness."""
        changes = {"threshold": self.threshold, "rho": self.rho, "tau": self.tau}
        if self.page is None or any(value is not None for value in changes.values()):
            from ..data.files import replacing
            from ..deploy.retune import retune

            content = retune(onnx, **changes)
            if self.out is None or self.out.suffix != ".onnx":
                raise RequestError("give --out FILE.onnx: what is written with the new settings")
            with replacing(self.out) as temporary:
                temporary.write_bytes(content)
            onnx = self.out
        return {"files": [str(onnx)], "explainer": str(onnx)}

    def _files(self) -> dict[str, Any]:
        from ..certify import Predicate
        from ..deploy.export import export
        from ..deploy.onnx_classifier import adopt_masker
        from ..masker import load_masker

        if self.threshold is not None:
            raise RequestError("--threshold changes an exported file: give it as --onnx")
        if not self.model or self.masker is None or self.out is None:
            raise RequestError("give --model SPEC, --masker FILE and --out DIR; see minexp export --help")
        classifier = self.classifier()
        load = adopt_masker if self.model.endswith(".onnx") else load_masker
        done = export(
            classifier,
            load(self.masker, classifier),
            self.out,
            images=self._images(classifier.preprocessing),
            predicate=Predicate(
                self.predicate,
                rho=0.95 if self.rho is None else self.rho,
                draws=self.draws,
                tau=0.5 if self.tau is None else self.tau,
            ),
            background=self.background,
            seed=self.seed,
            quantize=self.quantize,
            layout=self.layout,
        )
        return done.summary()

    def _images(self, preprocessing: Preprocessing) -> Any:
        """uint8 [N,H,W,C], or None for those the masker carries."""
        if self.data is None:
            return None
        import numpy as np

        from ..data.sources import open_source

        at_least_one("--limit", self.limit)
        items = open_source(self.data, limit=self.limit)
        ready = [preprocessing.pixels(item.image) for item in items if item.image is not None]
        if not ready:
            raise RequestError(
                f"{self.data}: none of the first {self.limit} images could be read; give others"
            )
        return np.stack(ready)
