"""A frozen model with its preprocessing, labels and tapped layers: the subject of every explanation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data.preprocessing import Preprocessing
from .errors import RequestError
from .specs import Built, build, one_line
from .taps import Tap, find_taps, first_tensor, recording, trace
from .weights import load_weights, state_digest


class Classifier:
    """Any `nn.Module` that maps images to class scores, without changing it.

    Inputs are float32 [B, C, H, W] in [0, 1] ("pixel space"); mean and standard deviation are applied here, so that
    masks and backgrounds act on pixels. The model runs in eval mode and with frozen parameters inside every call
    and is as it was afterwards, also when it throws.

    preprocessing: how a decoded image becomes [C, H, W]; `mean`, `std` and `size` override or replace it.
    taps: names of the layers whose activations are matched; by default the stem and the last stage output at each
    resolution. Raises RequestError when the model does not run on such an input or a name is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: Preprocessing | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
        class_names: Sequence[str] | None = None,
        taps: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self._depth = 0
        self._macs: dict[tuple[int, int], int] = {}
        self.preprocessing = _preprocessing(model, preprocessing, mean, std, size)
        channels, height, width = self.input_shape
        with self.frozen(), torch.no_grad():
            probe = torch.full((1, channels, height, width), 0.5, device=self.device)
            try:
                output, records = trace(model, self._normalise(probe))
            except Exception as error:
                raise RequestError(
                    f"{type(model).__name__} fails on an input of [1,{channels},{height},{width}] "
                    f"({one_line(error)}); give the size and channels it was made for"
                ) from error
        self.num_classes: int = _scores(output, model, 1).shape[1]
        if class_names is not None and len(class_names) != self.num_classes:
            raise RequestError(
                f"{len(class_names)} class names for a model with {self.num_classes} outputs; give one for each"
            )
        names = range(self.num_classes) if class_names is None else class_names
        self.class_names: tuple[str, ...] = tuple(str(name) for name in names)
        self._taps: tuple[Tap, ...] = find_taps(model, records, taps, height == width)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the tapped layers, in the order of `features`."""
        return tuple(tap.name for tap in self._taps)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image in pixel space."""
        return (self.preprocessing.channels, *self.preprocessing.size)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def to(self, device: torch.device | str) -> Classifier:
        """Move the model; returns this classifier."""
        self.model.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the weights, the preprocessing and the taps; computed anew, so that it never lags."""
        settings = {"preprocessing": self.preprocessing.to_json(), "taps": self.taps}
        text = state_digest(self.model.state_dict()) + json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The model in eval mode with no parameter requiring a gradient; undone on exit. Nesting costs nothing."""
        if self._depth:
            self._depth += 1
            try:
                yield self.model
            finally:
                self._depth -= 1
            return
        modes = [(module, module.training) for module in self.model.modules()]
        grads = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._depth = 1
        try:
            for module, _ in modes:
                module.training = False
            for parameter, _ in grads:
                parameter.requires_grad_(False)
            yield self.model
        finally:
            self._depth = 0
            for module, training in modes:
                module.training = training
            for parameter, required in grads:
                parameter.requires_grad_(required)

    def logits(self, x: Tensor) -> Tensor:
        """Class scores [B, K] of x [B, C, H, W] in pixel space; differentiable in x."""
        with self.frozen():
            return _scores(self.model(self._normalise(x)), self.model, x.shape[0])

    def probabilities(self, x: Tensor) -> Tensor:
        """Softmax of the class scores, [B, K]."""
        return self.logits(x).softmax(1)

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Class scores [B, K] and the taps' activations, each [B, C_l, positions...]; differentiable in x."""
        with self.frozen(), recording(self.model, self._taps) as outputs:
            scores = _scores(self.model(self._normalise(x)), self.model, x.shape[0])
            missing = [tap.name for tap in self._taps if tap.name not in outputs]
            if missing:
                raise RequestError(
                    f"the forward pass did not reach the tapped layer '{missing[0]}'; tap another"
                )
            return scores, [tap.arrange(outputs[tap.name]) for tap in self._taps]

    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-adds of one forward pass on one image of (H, W), convolutions and matrix products counted."""
        from torch.utils.flop_counter import FlopCounterMode

        size = self.preprocessing.size if size is None else size
        if size not in self._macs:
            x = torch.full((1, self.preprocessing.channels, *size), 0.5, device=self.device)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.logits(x)
            self._macs[size] = counter.get_total_flops() // 2
        return self._macs[size]

    def _normalise(self, x: Tensor) -> Tensor:
        settings = self.preprocessing
        if x.ndim != 4 or x.shape[1] != settings.channels or not x.is_floating_point():
            raise RequestError(
                f"an input of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}; "
                f"give float [B,{settings.channels},H,W] in [0,1]"
            )
        if not any(settings.mean) and all(value == 1 for value in settings.std):
            return x
        mean, std = (
            torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
            for v in (settings.mean, settings.std)
        )
        return (x - mean) / std

    def __repr__(self) -> str:
        channels, height, width = self.input_shape
        return (
            f"Classifier({type(self.model).__name__}, {channels}×{height}×{width} → {self.num_classes} classes, "
            f"taps: {', '.join(self.taps)})"
        )


def load_classifier(
    spec: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    taps: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    trust_model: bool = False,
) -> Classifier:
    """The classifier that SPEC names.

    spec: `torchvision:NAME`, `timm:NAME`, `hf:PATH_OR_ID`, `package.module:factory` or `file.py:factory`.
    weights: a .safetensors file, or a .pth file that needs no pickle; without it, torchvision, timm and Hugging
    Face models come with their own weights (downloaded on first use). Preprocessing and labels are the source's
    own where it has them; `mean`, `std`, `size` and `class_names` override them. A factory is called with no
    argument, or with `num_classes`, and returns a module or a Classifier.
    Raises RequestError, one line with the way out, for whatever cannot be loaded.
    """
    built = build(spec, num_classes=num_classes, pretrained=weights is None, trust_model=trust_model)
    if isinstance(built, Classifier):
        taps = built.taps if taps is None else taps
        built = Built(built.model, built.preprocessing, built.class_names)
    elif isinstance(built, nn.Module):
        built = Built(built)
    elif not isinstance(built, Built):
        raise RequestError(
            f"{spec} returned {type(built).__name__}; a factory returns a torch.nn.Module or a Classifier"
        )
    if weights is not None:
        load_weights(built.model, Path(weights))
    try:
        built.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device '{device}' is not usable ({one_line(error)}); give --device cpu"
        ) from error
    return Classifier(
        built.model,
        preprocessing=built.preprocessing,
        mean=mean,
        std=std,
        size=size,
        class_names=built.class_names if class_names is None else class_names,
        taps=taps,
    )


def _preprocessing(
    model: nn.Module,
    given: Preprocessing | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: int | tuple[int, int] | None,
) -> Preprocessing:
    if isinstance(size, int):
        size = (size, size)
    if given is None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        channels = len(mean or std or ()) or (first.in_channels if first is not None else 3)
        return Preprocessing(
            size=size or (224, 224),
            mean=tuple(mean or (0.0,) * channels),
            std=tuple(std or (1.0,) * channels),
            channels=channels,
        )
    changes: dict[str, Any] = {}
    if mean is not None:
        changes["mean"] = tuple(mean)
    if std is not None:
        changes["std"] = tuple(std)
    if size is not None and size != given.size:
        scale = min(size) / min(given.size)
        resize = None if given.resize is None else max(max(size), round(given.resize * scale))
        changes |= {"size": size, "resize": resize}
    return replace(given, **changes) if changes else given


def _scores(output: Any, model: nn.Module, batch: int) -> Tensor:
    """The [B, K] scores in whatever the model returned (a tensor, a tuple, an object with `.logits`)."""
    scores = getattr(output, "logits", None)
    if not isinstance(scores, Tensor):
        scores = output.get("logits") if isinstance(output, Mapping) else None
    if not isinstance(scores, Tensor):
        scores = first_tensor(output)
    if scores is None or scores.ndim != 2 or scores.shape[0] != batch or scores.shape[1] < 2:
        shape = "no tensor" if scores is None else str(list(scores.shape))
        raise RequestError(
            f"{type(model).__name__} returned {shape} for {batch} image(s); a classifier gives [B,K] scores, K ≥ 2"
        )
    return scores
