"""export(): a classifier and its masker as ONNX files, checked against torch before they are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor

from .. import __version__
from ..backgrounds import Backgrounds
from ..certificate import Certificate
from ..classifier import Classifier
from ..data.files import replacing
from ..data.store import unpack_mask
from ..errors import RequestError
from ..explanation import Explanation, bind, explain, make_backgrounds
from ..masker import Masker
from ..predicate import Predicate
from ..repair import SPARING
from ..weights import state_digest
from .bake import make_pictures, make_plan, number_of
from .graph import explainer_graph, masker_graph
from .metadata import EXPLAINER, MASKER, About, fingerprint_of
from .networks import classifier_network, masker_network, quantised_masker
from .ops import OPSET
from .parity import Parity, compare
from .plan import Plan
from .quantise import CALIBRATION, Cost, quantised
from .repository import write_repository
from .runtime import Explained, Explainer, open_session
from .sealed import finished, opened, selftest_rows
from .ties import MOST, certify_again, tied

Quantize = Literal["int8"]
Layout = Literal["flat", "triton"]


@dataclass(frozen=True)
class Exported:
    """What was written: the files, how far they agree with torch on the images of the check, and what int8 costs."""

    files: tuple[Path, ...]
    parity: Parity
    cost: Cost | None = None
    opset: int = OPSET

    @property
    def explainer(self) -> Path:
        """The file that explains."""
        folder = "minexp_explainer"
        return next(p for p in self.files if p.name == "explainer.onnx" or folder == p.parent.parent.name)

    def summary(self) -> dict[str, Any]:
        """The keys of `minexp export --json`."""
        out = {
            "files": [str(path) for path in self.files],
            "explainer": str(self.explainer),
            "opset": self.opset,
            "precision": "float32" if self.cost is None else "int8",
            "parity_images": self.parity.images,
            "parity_mask_flips": self.parity.mask_flips,
            "parity_mask_ties": self.parity.mask_ties,
            "parity_max_abs": self.parity.max_abs,
            "parity_certificates": self.parity.certificates,
        }
        return out if self.cost is None else out | {"quantize": self.cost.summary()}


def export(
    classifier: Classifier,
    masker: Masker,
    out: str | Path,
    *,
    images: np.ndarray | Tensor | None = None,
    predicate: Predicate | None = None,
    background: str | tuple[float, ...] = "mean",
    seed: int = 0,
    quantize: Quantize | None = None,
    layout: Layout = "flat",
) -> Exported:
    """Write ``out``/masker.onnx and ``out``/explainer.onnx.

    images: what the files are checked on, uint8 [N,H,W,C] of the classifier's size; by default the images that the
    masker carries of its training data. The explainer stands for effort "fast" with this predicate and background.
    quantize "int8": 8-bit networks, calibrated on the same images; refused, with the figures, when they change more
    than a few answers. layout "triton": a model repository for Triton, OpenVINO Model Server and KServe.
    Raises RequestError when the model cannot be exported or, with the figures, when ONNX Runtime's answers are not
    torch's: no pixel of a mask, no class and no certificate may differ, no probability by more than 1e-4. Pixels whose
    side of a mask's level float32 rounding decides are counted as ties, and torch certifies the mask with them.
    """
    out = Path(out)
    draft = Draft.make(classifier, masker, predicate or Predicate(), background, seed)
    pixels = check_images(classifier, masker, images)
    reference = draft.torch(pixels)
    networks = draft.networks()
    content, found, parity = draft.checked(networks, pixels, reference)
    masks = draft.masker_file(networks[0], pixels)
    cost = None
    if quantize is not None:
        networks = draft.quantised(networks, pixels)
        plain, (content, after, changes) = (
            content,
            draft.checked(networks, pixels, reference, precision=quantize),
        )
        cost = Cost.of(found, after, changes, _speedup(plain, content, pixels[:8]))
        if not cost.acceptable:
            raise RequestError(f"{cost}: too many other answers, so nothing is written; export in float32")
        masks = draft.masker_file(networks[0], None)
    writer = {"flat": write_flat, "triton": write_repository}[layout]
    files = writer(out, content, masks, draft.about("float32" if quantize is None else quantize))
    return Exported(tuple(files), parity, cost)


def write_flat(out: Path, explainer: bytes, masker: bytes, about: About) -> list[Path]:
    """The two files, each whole or not at all."""
    files = [out / "masker.onnx", out / "explainer.onnx"]
    for path, content in zip(files, (masker, explainer), strict=True):
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return files


def check_images(classifier: Classifier, masker: Masker, images: np.ndarray | Tensor | None) -> np.ndarray:
    """uint8 [N,H,W,C] of the classifier's size."""
    c, h, w = classifier.input_shape
    if images is None:
        images = masker.reference.permute(0, 2, 3, 1).cpu().numpy()
    pixels = images.cpu().numpy() if isinstance(images, Tensor) else images
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (h, w, c) or not len(pixels):
        raise RequestError(
            f"images of {pixels.dtype} {list(pixels.shape)} to check the export on; give uint8 [N,{h},{w},{c}]"
        )
    return pixels


@dataclass(frozen=True, eq=False)
class Draft:
    """One explainer on its way: what it stands for, and the networks it is made of."""

    classifier: Classifier
    masker: Masker
    predicate: Predicate
    backgrounds: Backgrounds
    background: str | tuple[float, ...]
    seed: int
    plan: Plan

    @classmethod
    def make(
        cls,
        classifier: Classifier,
        masker: Masker,
        predicate: Predicate,
        background: str | tuple[float, ...],
        seed: int,
    ) -> Draft:
        backgrounds = make_backgrounds(classifier, masker, background=background, seed=seed)
        target = classifier.target
        plan = make_plan(predicate, str(target), number_of(target))
        return cls(classifier, masker, predicate, backgrounds, background, seed, plan)

    def networks(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """Masker and classifier as networks of x, float [B,C,H,W] in [0,1]."""
        return masker_network(self.masker, self.classifier.input_shape[1:]), classifier_network(
            self.classifier
        )

    def torch(self, pixels: np.ndarray) -> Explanation:
        """The torch path's explanations of uint8 images [N,H,W,C]."""
        return explain(
            self.classifier,
            _floats(pixels),
            self.masker,
            predicate=self.predicate,
            effort="fast",
            backgrounds=self.backgrounds,
            repair=SPARING,
        )

    def quantised(
        self, networks: tuple[onnx.ModelProto, onnx.ModelProto], pixels: np.ndarray
    ) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """Both networks in 8 bits. The classifier's ranges are seen on images and on what masks leave of them."""
        seen = pixels[:CALIBRATION]
        x = seen.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        masked = self.torch(seen).kept_images().cpu().numpy()
        masker = quantised_masker(self.masker, seen)
        return masker, quantised(networks[1], np.concatenate([x, masked]))

    def checked(
        self,
        networks: tuple[onnx.ModelProto, onnx.ModelProto],
        pixels: np.ndarray,
        reference: Explanation,
        *,
        precision: str = "float32",
    ) -> tuple[bytes, Explained, Parity]:
        """The explainer's file, what it finds, and how that compares with torch. RequestError where float32 differs."""
        graph = self._graph(networks)
        about = self.about(precision)
        explainer = opened(finished(graph, about))
        found = Explained.join(list(explainer.stream(list(pixels))))
        parity = self._parity(found, reference, explainer if precision == "float32" else None)
        if precision == "float32" and not parity.exact:
            raise RequestError(
                f"ONNX Runtime does not give torch's answers, so nothing is written: {parity}; "
                "check on other images with --data, or report the model"
            )
        extra = dict(about.extra) | {"parity": asdict(parity), "selftest": selftest_rows(found)}
        return finished(graph, replace(about, extra=extra)), found, parity

    def _graph(self, networks: tuple[onnx.ModelProto, onnx.ModelProto]) -> onnx.ModelProto:
        masker, classifier = networks
        pictures = make_pictures(
            self.plan, self.backgrounds, self.classifier.input_shape, self._empty(classifier)
        )
        return explainer_graph(masker, classifier, self.plan, pictures, self.classifier.input_shape[1:])

    def _empty(self, classifier: onnx.ModelProto) -> np.ndarray:
        """Numbers [K] of the default background alone, as the exported network gives them: probabilities of classes."""
        session = open_session(classifier.SerializeToString(), "cpu", 1, "the classifier")
        colour = self.backgrounds.default(torch.zeros(1))
        blank = colour.expand(2, *self.classifier.input_shape).numpy()
        scores = torch.from_numpy(session.run(None, {"x": np.ascontiguousarray(blank)})[0][0]).double()
        of = "softmax" if self.plan.number is None else self.plan.number.of
        values = {"softmax": scores.softmax(0), "sigmoid": scores.sigmoid(), "scores": scores}[of]
        return values.float().numpy()

    def about(self, precision: str) -> About:
        """Everything a reader or a runtime wants to know, but for the check's outcome."""
        identity = {
            "classifier": self.classifier.fingerprint,
            "masker": state_digest(self.masker.state_dict()),
            "predicate": repr(self.predicate),
            "background": self.background,
            "effort": "fast",
            "seed": self.seed,
            "precision": precision,
            "threshold": self.plan.threshold,
        }
        colour = self.backgrounds.default(torch.zeros(1)).reshape(-1).tolist()
        return About(
            format=EXPLAINER,
            fingerprint=fingerprint_of(identity),
            preprocessing=self.classifier.preprocessing,
            class_names=self.classifier.class_names,
            families=self.plan.families,
            fresh=self.plan.fresh,
            rho=self.plan.rho if self.plan.kind == "robust" else None,
            predicate=self.plan.text,
            threshold=self.plan.threshold,
            background=tuple(colour),
            precision=precision,
            explained=self._explained(),
            extra={
                "model": type(self.classifier.model).__name__,
                "identity": identity,
                "kept": str(self.classifier.target),
                "plan": asdict(self.plan),
                "versions": {"minexp": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
            },
        )

    def _explained(self) -> str | None:
        """The name of the number that is explained, the same of every image."""
        if self.plan.number is None:
            return None
        return self.classifier.target.name(
            torch.zeros(len(self.classifier.class_names)), self.classifier.class_names
        )

    def _parity(self, found: Explained, reference: Explanation, explainer: Explainer | None) -> Parity:
        """explainer: where given, masks of its that differ from torch's by rounding are certified by torch."""
        p = self._probabilities(reference.x)
        masks, certificates = reference.masks.cpu().numpy().copy(), list(reference.certificates)
        ties = 0
        for b in np.flatnonzero((masks != found.masks).any((1, 2))) if explainer is not None else ():
            assert explainer is not None
            if tied(p[b], found.probabilities[b], masks[b], found.masks[b], self.plan.threshold):
                ties += int((masks[b] != found.masks[b]).sum())
                attempt = int(explainer.run(found.images[b : b + 1])["attempt"][0])
                masks[b] = found.masks[b]
                certificates[b] = self._certified(
                    reference.x[b : b + 1], masks[b], attempt, found.certificates[b]
                )
        return compare(
            found.masks, found.certificates, found.probabilities, masks, certificates, p, ties=ties
        )

    def _certified(self, x: Tensor, mask: np.ndarray, attempt: int, certificate: Certificate) -> Certificate:
        """torch's certificate of the mask [H,W] that the runtime found for one image."""
        judge, x, logits = bind(
            self.classifier, x, self.masker, predicate=self.predicate, backgrounds=self.backgrounds
        )
        with self.classifier.frozen():
            given = torch.from_numpy(mask)[None, None].to(x.device)
            return certify_again(judge, x, logits, given, attempt, certificate)

    def _probabilities(self, x: Tensor) -> np.ndarray:
        """The masker's in torch, [N,H,W]."""
        p = torch.cat([self.masker.probabilities(part) for part in x.split(32)])
        return p[:, 0].cpu().numpy()

    def masker_file(self, network: onnx.ModelProto, pixels: np.ndarray | None) -> bytes:
        """masker.onnx: image → probabilities and mask, for any size, without a classifier; compared on ``pixels``."""
        graph = masker_graph(network, self.classifier.input_shape[0], self.plan.threshold)
        content = finished(graph, replace(self.about("float32"), format=MASKER))
        if pixels is not None and (flips := self._flips(content, pixels)):
            raise RequestError(
                f"masker.onnx flips {flips} mask pixels of {len(pixels)} images against torch, so nothing is written"
            )
        return content

    def _flips(self, content: bytes, pixels: np.ndarray) -> int:
        """Mask pixels in which masker.onnx differs from torch by more than the rounding of a probability."""
        session = open_session(content, "cpu", 1, "masker.onnx")
        other, bits = session.run(["prob", "mask_bits"], {"image": np.ascontiguousarray(pixels)})
        p = self._probabilities(_floats(pixels))
        masks = np.stack([unpack_mask(row.tobytes(), *pixels.shape[1:3]) for row in bits])
        flips = masks != (p > self.plan.threshold)
        return int((flips & (np.abs(p - other) > MOST * self.plan.threshold)).sum())


def _floats(pixels: np.ndarray) -> Tensor:
    """uint8 [N,H,W,C] → float [N,C,H,W] in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)


def _speedup(one: bytes, other: bytes, pixels: np.ndarray) -> float:
    """How many times as fast the other file explains these images; the two take turns."""
    explainers = [opened(one), opened(other)]
    times = [[explainer.explain(pixels).milliseconds for explainer in explainers] for _ in range(6)]
    slow, fast = np.median(times[1:], axis=0)
    return float(slow / fast)
