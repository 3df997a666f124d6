"""A frozen model with its preprocessing, labels and tapped layers: the subject of every explanation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data.preprocessing import Preprocessing
from .errors import RequestError, one_line
from .execution import Agreement, Execution, agree
from .layouts import Layout
from .microbatch import MicroBatch
from .specs import build
from .taps import find_taps, mark_overwritten, recording
from .targets import Target, parse_target
from .tracing import trace
from .weights import load_weights, state_digest
from .zoos import Built

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
PROBES = 2  # images in the pass that finds the taps: a lone one would hide which axis is the batch


class Classifier:
    """Any `nn.Module` that maps images to class scores, without changing it.

    Inputs are float32 [B, C, H, W] in [0, 1] ("pixel space"); mean and standard deviation are applied here, so that
    masks and backgrounds act on pixels. The model runs in eval mode and with frozen parameters inside every call
    and is as it was afterwards, also when it throws.

    preprocessing: how a decoded image becomes [C, H, W]; `mean`, `std` and `size` override or replace it.
    taps: names of the layers whose activations are matched; by default the stem and the last stage output at each
    resolution. A DataParallel or compiled wrapper is taken off: `model` is what it wraps.
    target: what of the output is explained, by default the class with the highest score (`minexp.targets`).
    execution: precision, memory layout, compilation (`minexp.execution`); refused where scores then differ too much.
    Raises RequestError when the model does not run on such an input or a name is unknown.
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
        target: Target | str = "top1",
        execution: Execution | None = None,
    ) -> None:
        self.model = model = unwrapped(model)
        self._depth = 0
        # Compiled code passes hooks over in silence: such parts run as they were written.
        self._compiled = any(map(_is_compiled, model.modules()))
        self._micro_batch: MicroBatch | None = None
        self.execution, self.agreement = Execution(), Agreement(0.0, 1.0)
        self._forward: Callable[[Tensor], Any] = model
        self._macs: dict[tuple[int, int], int] = {}
        self.preprocessing = _preprocessing(model, preprocessing, mean, std, size)
        self.target = parse_target(target) if isinstance(target, str) else target
        channels, height, width = self.input_shape
        with self.frozen(), torch.no_grad():
            probe = torch.full((PROBES, channels, height, width), 0.5, device=self.device)
            try:
                seen = trace(model, probe, self._run, lambda output: self._scores(output, PROBES))
            except RequestError:
                raise
            except Exception as error:
                raise RequestError(
                    f"{type(model).__name__} fails on an input of [{PROBES},{channels},{height},{width}] "
                    f"({one_line(error)}); give the size and channels it was made for"
                ) from error
            found = find_taps(model, seen, PROBES, (height, width), taps)
            self._taps = mark_overwritten(model, found, lambda: self._run(probe))
        self.num_classes: int = self._scores(seen.output, PROBES).shape[1]
        if class_names is not None and len(class_names) != self.num_classes:
            raise RequestError(
                f"{len(class_names)} class names for a model with {self.num_classes} outputs; give one for each"
            )
        names = range(self.num_classes) if class_names is None else class_names
        self.class_names: tuple[str, ...] = tuple(str(name) for name in names)
        self.target = self.target.bound(self.class_names)
        if execution is not None and not execution.plain:
            self._adopt(execution)

    def _adopt(self, execution: Execution) -> None:
        """Run the model that way from now on; RequestError where its scores of noise are not the plain ones."""
        noise = torch.rand(2 * PROBES, *self.input_shape, generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        with torch.no_grad():
            plain = self.logits(noise)
        self.execution, self._forward = execution, execution.compiled(self.model)
        self.agreement = agree(plain, self.logits, noise, execution)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the tapped layers, in the order of `features`."""
        return tuple(tap.name for tap in self._taps)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Layout of each tapped layer's output: where its grid is, and how many tokens are ahead of it."""
        return tuple(tap.layout for tap in self._taps)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image in pixel space."""
        return (self.preprocessing.channels, *self.preprocessing.size)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def precision(self) -> str:
        """Of its convolutions and products: "float32", "bfloat16" …"""
        precision = self.execution.precision
        return precision if precision != "float32" else str(self.dtype).removeprefix("torch.")

    def to(self, device: torch.device | str) -> Classifier:
        """Move the model; returns this classifier."""
        self.model.to(device)
        self._micro_batch = None
        return self

    @property
    def micro_batch(self) -> MicroBatch:
        """How many images go through the model at once, for every job on this device."""
        if self._micro_batch is None:
            self._micro_batch = MicroBatch.for_input(self.input_shape, self.device.type)
        return self._micro_batch

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of weights, preprocessing, taps and target; computed anew, so that it never lags."""
        settings = {"preprocessing": self.preprocessing.to_json(), "taps": self.taps}
        if self.target.key() != Target().key():
            settings["target"] = self.target.key()
        text = state_digest(self.model.state_dict()) + json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _run(self, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Any:
        """What the model returns for x in pixel space, in the precision and layout asked for."""
        inputs = self.execution.layout(self._normalise(x).to(self.dtype))
        as_written = self._compiled and forward is not self._forward
        with (
            torch.compiler.set_stance("force_eager") if as_written else nullcontext(),
            self.execution.context(x.device),
        ):
            return (forward or self.model)(inputs)

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
            return self._scores(self._run(x, self._forward), x.shape[0]).to(x.dtype)

    def probabilities(self, x: Tensor) -> Tensor:
        """Softmax of the class scores, [B, K]."""
        return self.logits(x).softmax(1)

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Class scores [B, K] and the taps' activations, [B,C,h,w], tokens as [B,C,N], vectors as [B,C].

        Differentiable in x. `layouts[l].spatial(features[l])` is the map of a transformer's image tokens.
        """
        with self.frozen(), recording(self.model, self._taps) as outputs:
            scores = self._scores(self._run(x), x.shape[0]).to(x.dtype)
            missing = [tap.name for tap in self._taps if tap.name not in outputs]
            if missing:
                raise RequestError(
                    f"the forward pass did not reach the tapped layer '{missing[0]}'; tap another"
                )
            return scores, [tap.layout.arrange(outputs[tap.name]).to(x.dtype) for tap in self._taps]

    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-adds of one forward pass on one image of (H, W), convolutions and matrix products counted."""
        from torch.utils.flop_counter import FlopCounterMode

        size = self.preprocessing.size if size is None else size
        if size not in self._macs:
            x = torch.full((1, self.preprocessing.channels, *size), 0.5, device=self.device)
            with torch.no_grad(), self.frozen(), FlopCounterMode(display=False) as counter:
                self._run(x)
            self._macs[size] = counter.get_total_flops() // 2
        return self._macs[size]

    def _scores(self, output: Any, batch: int) -> Tensor:
        """The [B, K] scores that the target finds in what the model returned."""
        scores, name, least = self.target.scores(output), type(self.model).__name__, self.target.outputs
        if scores is None or scores.ndim != 2 or scores.shape[0] != batch or scores.shape[1] < least:
            shape = "no tensor" if scores is None else str(list(scores.shape))
            single = scores is not None and scores.numel() == batch
            hint = "; for one output give --target binary or --target value" if single else ""
            raise RequestError(
                f"{name} returned {shape} for {batch} image(s); a classifier gives [B,K] scores, K ≥ {least}{hint}"
            )
        return scores

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
    ema: bool = False,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    taps: Sequence[str] | None = None,
    target: Target | str | None = None,
    execution: Execution | None = None,
    device: torch.device | str = "cpu",
    trust_model: bool = False,
) -> Classifier:
    """The classifier that SPEC names.

    spec: `torchvision:NAME`, `timm:NAME`, `hf:PATH_OR_ID`, `package.module:factory` or `file.py:factory`.
    weights: a .safetensors file, or a .pth file that needs no pickle; without it, torchvision, timm and Hugging
    Face models come with their own weights (downloaded on first use). ema: take a checkpoint's averaged weights
    where it holds both. Preprocessing and labels are the source's
    own where it has them; `mean`, `std`, `size` and `class_names` override them. A factory is called with no
    argument, or with `num_classes`, and returns a module or a Classifier. target: what of the output is explained, as
    `minexp.targets` or as the command line writes it. execution: precision and the like, `minexp.execution`.
    Raises RequestError, one line with the way out, for whatever cannot be loaded.
    """
    built = build(spec, num_classes=num_classes, pretrained=weights is None, trust_model=trust_model)
    if isinstance(built, Classifier):
        taps = built.taps if taps is None else taps
        target = built.target if target is None else target
        execution = built.execution if execution is None else execution
        built = Built(built.model, built.preprocessing, built.class_names)
    elif isinstance(built, nn.Module):
        built = Built(built)
    elif not isinstance(built, Built):
        raise RequestError(
            f"{spec} returned {type(built).__name__}; a factory returns a torch.nn.Module or a Classifier"
        )
    if weights is not None:
        load_weights(built.model, Path(weights), ema=ema)
    try:
        built.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device '{device}' is not usable ({one_line(error)}); give --device cpu"
        ) from error
    target = parse_target(target) if isinstance(target, str) else target or Target()
    return Classifier(
        built.model,
        preprocessing=built.preprocessing,
        mean=mean,
        std=std,
        size=size,
        class_names=class_names if class_names is not None or not target.of_classes else built.class_names,
        taps=taps,
        target=target,
        execution=execution,
    )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, torch.compile and AveragedModel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


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
        takes = 1 if first is not None and first.in_channels == 1 else 3
        channels = len(mean or std or ()) or takes
        return Preprocessing(
            size=size or (224, 224),
            mean=tuple(mean or (0.0,) * channels),
            std=tuple(std or (1.0,) * channels),
            channels=channels,
        )
    if size is not None and size != given.size:
        given = given.resized(size)
    if mean is not None or std is not None:
        given = replace(given, mean=tuple(mean or given.mean), std=tuple(std or given.std))
    return given
