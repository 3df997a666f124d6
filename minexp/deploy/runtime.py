"""An exported explainer on ONNX Runtime: numpy in, certified masks out, no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..certificate import Certificate, Measured, write_certificate
from ..data.store import unpack_mask
from ..errors import MinexpError, RequestError
from .metadata import EXPLAINER, read_about
from .trial import try_model
from .untrusted import read_model

Pixels = npt.NDArray[np.uint8]
PROVIDERS: dict[str, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
_FLOATS = ("conf", "conf_masked", "conf_complement", "conf_empty", "threshold", "robust_train", "area")
BATCH = 8  # images a call: four evaluations of each at once stay in a CPU's cache


@dataclass(frozen=True, eq=False)
class Explained:
    """Certified masks of a batch: masks bool [B,H,W] of the pixels kept, images uint8 [B,H,W,C], kept the same with
    removed pixels in the background colour, probabilities float [B,H,W] as the masker gave them; one certificate an
    image. milliseconds: wall time an image, averaged over the call.
    """

    images: Pixels
    masks: npt.NDArray[np.bool_]
    kept: Pixels
    probabilities: npt.NDArray[np.float32]
    certificates: tuple[Certificate, ...]
    milliseconds: float

    def __len__(self) -> int:
        return len(self.certificates)

    def rows(self) -> list[dict[str, Any]]:
        """One row an image with the store's columns, but for where the image came from."""
        pairs = zip(self.masks, self.certificates, strict=True)
        return [certificate.row(mask, self.milliseconds) for mask, certificate in pairs]

    @staticmethod
    def join(parts: Sequence[Explained]) -> Explained:
        """Several batches as one."""
        count = sum(map(len, parts))
        return Explained(
            images=np.concatenate([part.images for part in parts]),
            masks=np.concatenate([part.masks for part in parts]),
            kept=np.concatenate([part.kept for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            certificates=tuple(certificate for part in parts for certificate in part.certificates),
            milliseconds=sum(part.milliseconds * len(part) for part in parts) / count,
        )

    def __repr__(self) -> str:
        if len(self) == 1:
            return f"Explained({self.certificates[0]})"
        good = sum(certificate.certified for certificate in self.certificates)
        return f"Explained({len(self)} images, {good} certified, mean area {self.masks.mean():.1%})"


class Explainer:
    """An explainer.onnx in a session of ONNX Runtime.

    provider: where it runs; asked for and not there is an error, never a silent run on the CPU. threads: of one
    image's operators, by default one, because a job runs a process a core. trusted: leave out the first run in a
    process of its own, which keeps a damaged or hostile file from harming this one.
    Raises RequestError for a file that is not an explainer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        trusted: bool = False,
    ) -> None:
        self.path, self.provider, self.threads = Path(path), provider, threads
        content, metadata = read_model(self.path)
        self.about = read_about(content, metadata, self.path, (EXPLAINER,))
        if not trusted:
            try_model(self.path, provider=provider)
        self.session = open_session(content, provider, threads, self.path)
        self._check_signature()

    @property
    def provider_name(self) -> str:
        """As it is recorded with the rows."""
        return f"onnxruntime-{self.provider}"

    @property
    def version(self) -> str:
        """ONNX Runtime's."""
        import onnxruntime

        return str(onnxruntime.__version__)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.about.class_names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        settings = self.about.preprocessing
        return (*settings.size, settings.channels)

    def _check_signature(self) -> None:
        (h, w, c), session = self.input_shape, self.session
        inputs = [(value.name, value.type, value.shape[1:]) for value in session.get_inputs()]
        draws = len(self.about.families) * self.about.fresh
        wanted: dict[str, tuple[str, list[int]]] = {
            **{name: ("tensor(int64)", []) for name in ("label", "label_masked", "attempt", "evaluations")},
            **{name: ("tensor(bool)", []) for name in ("kept", "holds", "certified", "dilation_kept")},
            **{name: ("tensor(float)", []) for name in _FLOATS},
            "kept_on": ("tensor(bool)", [draws]),
            "mask_bits": ("tensor(uint8)", [-(-h * w // 8)]),
            "prob": ("tensor(float)", [h, w]),
            "explanation": ("tensor(uint8)", [h, w, c]),
        }
        outputs = {value.name: (value.type, value.shape[1:]) for value in session.get_outputs()}
        if inputs != [("image", "tensor(uint8)", [h, w, c])] or outputs != wanted:
            raise RequestError(
                f"{self.path}: its inputs and outputs are not those its metadata describes; export it again"
            )

    def warm_up(self, batch: int = 1) -> None:
        """Run once on grey images, so that the first real call is as fast as the next ones."""
        self.explain(np.full((batch, *self.input_shape), 128, np.uint8))

    def run(self, images: Pixels) -> dict[str, npt.NDArray]:
        """The graph's outputs for uint8 images [B,H,W,C] of the explainer's own size."""
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[1:] != self.input_shape
            or not len(images)
        ):
            raise RequestError(
                f"images of {images.dtype} {list(images.shape)}; give uint8 [B,{','.join(map(str, self.input_shape))}]"
            )
        try:
            return self._run(np.ascontiguousarray(images))
        except Exception as error:
            raise MinexpError(f"ONNX Runtime: {' '.join(str(error).split())[:300]}") from error

    def _run(self, images: Pixels) -> dict[str, npt.NDArray]:
        names = [output.name for output in self.session.get_outputs()]
        if self.provider not in ("cuda", "tensorrt"):
            return dict(zip(names, self.session.run(names, {"image": images}), strict=True))
        # images and results cross to the device once, whatever the graph copies in between
        binding = self.session.io_binding()
        binding.bind_cpu_input("image", images)
        for name in names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def explain(self, images: Pixels) -> Explained:
        """Explain the class of uint8 images [B,H,W,C] of the explainer's own size.

        `about.preprocessing.pixels` brings an image of any size to it. Raises MinexpError for scores that are not
        finite.
        """
        started = time.perf_counter()
        out = self.run(images)
        if not np.isfinite(out["conf"]).all():
            raise MinexpError(
                "the classifier gives NaN or infinite scores; check its weights, and that mean and std are its own"
            )
        if not (out["label"].min() >= 0 and out["label"].max() < len(self.class_names)):
            raise RequestError(
                f"{self.path}: names {len(self.class_names)} classes and gives class {out['label'].max()}; "
                "export it again"
            )
        h, w, _ = self.input_shape
        masks = np.stack([unpack_mask(bits.tobytes(), h, w) for bits in out["mask_bits"]])
        certificates = tuple(self._certificate(out, masks, place) for place in range(len(images)))
        milliseconds = (time.perf_counter() - started) * 1000 / len(images)
        return Explained(images, masks, out["explanation"], out["prob"], certificates, milliseconds)

    def _certificate(
        self, out: dict[str, npt.NDArray], masks: npt.NDArray[np.bool_], place: int
    ) -> Certificate:
        about = self.about
        one = {name: values[place] for name, values in out.items()}
        draws = one["kept_on"].reshape(len(about.families), about.fresh)
        measured = Measured(
            mask=masks[place],
            label=int(one["label"]),
            label_name=about.explained or about.class_names[int(one["label"])],
            conf=float(one["conf"]),
            label_masked=int(one["label_masked"]),
            conf_masked=float(one["conf_masked"]),
            conf_complement=float(one["conf_complement"]),
            conf_empty=float(one["conf_empty"]),
            kept=bool(one["kept"]),
            dilation_kept=bool(one["dilation_kept"]),
            holds=bool(one["holds"]),
            threshold=float(one["threshold"]),
            evaluations=int(one["evaluations"]),
            kept_on=dict(zip(about.families, draws.tolist(), strict=True)),
        )
        return write_certificate(measured, about.predicate, about.rho)

    def stream(self, images: Sequence[Pixels] | Iterator[Pixels], batch: int = BATCH) -> Iterator[Explained]:
        """Explain images [H,W,C] of any size one batch after the other, in order."""
        group: list[Pixels] = []
        for image in images:
            group.append(self.about.preprocessing.pixels(image))
            if len(group) == batch:
                yield self.explain(np.stack(group))
                group = []
        if group:
            yield self.explain(np.stack(group))


def open_session(content: bytes, provider: str, threads: int, name: object) -> Any:
    """A session for the model; RequestError when ONNX Runtime, the provider or the model is not fit."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RequestError(
            f"ONNX Runtime is not installed ({error}); pip install onnxruntime, or onnxruntime-gpu for CUDA"
        ) from error
    if provider not in PROVIDERS:
        raise RequestError(f"no provider '{provider}'; choose {', '.join(PROVIDERS)}")
    wanted, package = PROVIDERS[provider]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise RequestError(
            f"this ONNX Runtime has no {wanted} (it has {', '.join(available)}); pip install {package} in its place"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [wanted] if provider == "cpu" else [wanted, "CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # its exceptions share no base but this
        text = " ".join(str(error).split())[:300]
        raise RequestError(f"{name}: ONNX Runtime does not load it ({text})") from error
    if session.get_providers()[0] != wanted:
        raise RequestError(
            f"{wanted} does not start on this machine (ONNX Runtime would run on "
            f"{session.get_providers()[0]}); check its driver and libraries, or ask for another provider"
        )
    return session
