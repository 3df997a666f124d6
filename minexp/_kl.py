"""Activation matching: KL(softmax(target/T) || softmax(input/T)) over many layers in one operator.

Schema, plain PyTorch reference, fake and autograd; csrc/kl.* adds faster bodies of the same meaning.
A row is one softmax. With a shared reference m >= max(a, b), S = sum e^(a-m), Delta = sum (e^(b-m) - e^(a-m))
and D = sum e^(a-m) (b-a), KL = log1p(Delta/S) - D/S keeps its digits where a is close to b, which is where
matching ends up; elsewhere each side has a reference of its own and log1p becomes the plain log of the ratio.
A cached target is p = softmax(a) with H = sum p log p and M = sum p of the *rounded* p, and then
KL = H - sum p b + M lse(b) - M + 1, whose first-order rounding error vanishes.
"""

from collections.abc import Sequence
from itertools import pairwise, repeat
from math import inf
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError

AXES = ("all", "spatial", "channel")
MAX_LAYERS = 512  # the layer table travels as one CUDA kernel parameter
_FAR = 16.0  # where the maxima lie further apart, one shared reference would cost digits, then underflow
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_library = torch.library.Library("minexp", "FRAGMENT")
_library.define(
    "activation_kl(Tensor[] targets, Tensor[] inputs, Tensor? entropy, float[] weights, float temperature, str axis)"
    " -> (Tensor total, Tensor layers, Tensor state)",
    tags=(torch.Tag.needs_exact_strides,),
)
_library.define(
    "activation_kl_gradients(Tensor[] targets, Tensor[] inputs, Tensor? entropy, float[] weights, float temperature,"
    " str axis) -> (Tensor total, Tensor layers, Tensor[] grads)",
    tags=(torch.Tag.needs_exact_strides,),
)
_library.define(
    "activation_kl_backward(Tensor[] targets, Tensor[] inputs, bool cached, Tensor state, Tensor? grad_total,"
    " Tensor? grad_layers, float[] weights, float temperature, str axis) -> Tensor[]",
    tags=(torch.Tag.needs_exact_strides,),
)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _precise(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _row_count(x: Tensor, axis: str) -> int:
    """Softmax rows of one image."""
    return {"all": 1, "spatial": x.shape[1], "channel": x.shape[2:].numel()}[axis]


def _rows(x: Tensor, axis: str, temperature: float) -> Tensor:
    """[B, C, ...] as logits [B, rows, elements of a row]."""
    x = x.to(_accumulator(x.dtype)) * (1 / temperature)
    if axis == "all":
        return x.flatten(1).unsqueeze(1)
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return x.transpose(1, 2) if axis == "channel" else x


def _row_losses(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row [B, R] and what the backward needs of it [B, R, 4]: both references and both sums."""
    top_a, top_b = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    near = (top_a - top_b).abs() <= _FAR
    top = torch.maximum(top_a, top_b)
    top_a, top_b = torch.where(near, top, top_a), torch.where(near, top, top_b)
    exp_a, exp_b = (a - top_a).exp(), (b - top_b).exp()
    sum_a, sum_b = exp_a.sum(-1, keepdim=True), exp_b.sum(-1, keepdim=True)
    growth = (exp_b - exp_a).sum(-1, keepdim=True) / sum_a
    log_ratio = torch.where(
        near & (growth.abs() < 0.5), torch.log1p(growth), top_b - top_a + (sum_b / sum_a).log()
    )
    loss = log_ratio - (exp_a * (b - a)).sum(-1, keepdim=True) / sum_a
    return loss.squeeze(-1), torch.cat((top_a, sum_a, top_b, sum_b), -1)


def _cached_row_losses(p: Tensor, entropy: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same from p = softmax(a) and its (H, M) [B, R, 2]."""
    top = b.amax(-1, keepdim=True)
    total = (b - top).exp().sum(-1, keepdim=True, dtype=entropy.dtype)
    cross = (p * (b - top)).sum(-1, dtype=entropy.dtype)
    loss = entropy[..., 0] - cross + entropy[..., 1] * total.squeeze(-1).log() - entropy[..., 1] + 1
    return loss.to(b.dtype), torch.cat((top, total.to(b.dtype)), -1).repeat(1, 1, 2)


def _bounds(inputs: Sequence[Tensor], axis: str) -> list[int]:
    """Where each layer's rows begin in the state [B, R, 4], with R at the end."""
    bounds = [0]
    for x in inputs:
        bounds.append(bounds[-1] + _row_count(x, axis))
    return bounds


def activation_kl_reference(
    targets: list[Tensor],
    inputs: list[Tensor],
    entropy: Tensor | None,
    weights: list[float],
    temperature: float,
    axis: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `minexp::activation_kl` means: (total [B], layers [L, B], state [B, R, 4]), in plain PyTorch."""
    total, layers, state = _activation_kl_fake(targets, inputs, entropy, weights, temperature, axis)
    layers.zero_(), state.zero_()
    rows = pairwise(_bounds(inputs, axis))
    for out, target, x, weight, (begin, end) in zip(layers, targets, inputs, weights, rows, strict=True):
        if weight == 0:
            continue
        b = _rows(x, axis, temperature)
        if entropy is None:
            loss, saved = _row_losses(_rows(target, axis, temperature), b)
        else:
            loss, saved = _cached_row_losses(_rows(target, axis, 1.0), entropy[:, begin:end], b)
        finite = loss.isfinite()  # an infinite logit gives NaN, never an infinite or a lost loss
        out.copy_(torch.where(finite, loss, torch.nan).mean(-1))
        state[:, begin:end] = torch.where(finite.unsqueeze(-1), saved, torch.nan)
    for weight, loss in zip(weights, layers, strict=True):
        total = total + weight * loss if weight != 0 else total
    return total, layers, state


def _activation_kl_fake(
    targets: list[Tensor],
    inputs: list[Tensor],
    entropy: Tensor | None,
    weights: list[float],
    temperature: float,
    axis: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x, rows = inputs[0], _bounds(inputs, axis)[-1]
    shapes = (x.shape[0],), (len(inputs), x.shape[0]), (x.shape[0], rows, 4)
    total, layers, state = (x.new_zeros(shape, dtype=_accumulator(x.dtype)) for shape in shapes)
    return total, layers, state


def activation_kl_backward_reference(
    targets: list[Tensor],
    inputs: list[Tensor],
    cached: bool,
    state: Tensor,
    grad_total: Tensor | None,
    grad_layers: Tensor | None,
    weights: list[float],
    temperature: float,
    axis: str,
) -> list[Tensor]:
    """Gradients to the inputs: c (softmax(b) - softmax(a)) / (T rows), c = weight * grad_total + grad_layers."""
    grads = []
    rows = pairwise(_bounds(inputs, axis))
    for layer, (target, x, weight, (begin, end)) in enumerate(
        zip(targets, inputs, weights, rows, strict=True)
    ):
        grad = torch.zeros_like(x)
        grads.append(grad)
        if weight == 0 or x.numel() == 0:
            continue
        scale = state.new_zeros(x.shape[0])
        if grad_total is not None:
            scale = scale + weight * grad_total
        if grad_layers is not None:
            scale = scale + grad_layers[layer]
        top_a, sum_a, top_b, sum_b = state[:, begin:end].unsqueeze(-2).unbind(-1)
        row = (_rows(x, axis, temperature) - top_b).exp() / sum_b
        if cached:
            row = row - _rows(target, axis, 1.0)
        else:
            row = row - (_rows(target, axis, temperature) - top_a).exp() / sum_a
        row = row * (scale / (temperature * (end - begin)))[:, None, None]
        grad.copy_((row.transpose(1, 2) if axis == "channel" else row).reshape(x.shape))
    return grads


def _backward_fake(targets: list[Tensor], inputs: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs]


def activation_kl_gradients_reference(
    targets: list[Tensor], inputs: list[Tensor], entropy: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `minexp::activation_kl_gradients` means: (total [B], layers [L, B], gradients of total.sum() to the inputs).

    One pass, where `activation_kl` and its backward read everything twice.
    """
    total, layers, state = activation_kl_reference(targets, inputs, entropy, *options)
    ones, cached = torch.ones_like(total), entropy is not None
    return (
        total,
        layers,
        activation_kl_backward_reference(targets, inputs, cached, state, ones, None, *options),
    )


def _gradients_fake(
    targets: list[Tensor], inputs: list[Tensor], entropy: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    total, layers, _ = _activation_kl_fake(targets, inputs, entropy, *options)
    return total, layers, _backward_fake(targets, inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    targets, layers, entropy, *ctx.options = inputs
    ctx.cached, ctx.count = entropy is not None, len(layers)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*targets, *layers, output[2])


def _differentiate(
    ctx: Any, grad_total: Tensor | None, grad_layers: Tensor | None, _: Any
) -> tuple[Any, ...]:
    *tensors, state = ctx.saved_tensors
    targets, inputs = tensors[: ctx.count], tensors[ctx.count :]
    grads: list[Tensor | None]
    if grad_total is None and grad_layers is None:
        grads = [None] * ctx.count
    else:  # an expanded gradient (stride 0) is what sum() and mean() hand down
        total = None if grad_total is None else grad_total.contiguous()
        layers = None if grad_layers is None else grad_layers.contiguous()
        grads = torch.ops.minexp.activation_kl_backward(
            targets, inputs, ctx.cached, state, total, layers, *ctx.options
        )
    return [None] * ctx.count, grads, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("activation_kl has no second derivative (its backward was differentiated)")


_library.impl("activation_kl", activation_kl_reference, "CompositeExplicitAutograd")
_library.impl("activation_kl_gradients", activation_kl_gradients_reference, "CompositeExplicitAutograd")
_library.impl("activation_kl_backward", activation_kl_backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("minexp::activation_kl", _activation_kl_fake, lib=_library)
torch.library.register_fake("minexp::activation_kl_gradients", _gradients_fake, lib=_library)
torch.library.register_fake("minexp::activation_kl_backward", _backward_fake, lib=_library)
torch.library.register_autograd("minexp::activation_kl", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("minexp::activation_kl_backward", _no_second_derivative, lib=_library)


class _TwoPasses(torch.autograd.Function):
    """The operator with the autograd formula registered for it, at half of the dispatcher's cost."""

    @staticmethod
    def forward(
        ctx: Any, targets: list[Tensor], entropy: Tensor | None, options: tuple[Any, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        arguments = targets, inputs, entropy, *options
        output = torch.ops.minexp.activation_kl(*arguments)
        _save(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, *_differentiate(ctx, *grads)[1]


class _OnePass(torch.autograd.Function):
    """The gradients of total.sum() are found on the way: the usual backward has nothing left to do."""

    @staticmethod
    def forward(
        ctx: Any, targets: list[Tensor], entropy: Tensor | None, options: tuple[Any, ...], *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, layers, grads = torch.ops.minexp.activation_kl_gradients(targets, inputs, entropy, *options)
        ctx.weights = options[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, *inputs)
        return total, layers

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_layers: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.weights)
        grads, inputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if grad_total is None and grad_layers is None:
            grads = (None,) * count
        elif grad_total is None or grad_layers is not None or not grad_total.eq(1).all():
            layers = repeat(None) if grad_layers is None else grad_layers
            grads = tuple(map(_scaled, grads, ctx.weights, repeat(grad_total), layers))
        if torch.is_grad_enabled():  # create_graph
            grads = _Once.apply(grads, *inputs)
        return None, None, None, *grads


def _scaled(grad: Tensor, weight: float, total: Tensor | None, layer: Tensor | None) -> Tensor:
    """The gradient of one layer, weight * d, as (weight * total + layer) * d."""
    if weight == 0:
        return grad
    factor = torch.zeros(len(grad), dtype=grad.dtype, device=grad.device)
    if total is not None:
        factor = factor + total
    if layer is not None:
        factor = factor + layer / weight
    return grad * factor.view(-1, *[1] * (grad.dim() - 1))


class _Once(torch.autograd.Function):
    """Gradients that depend on the inputs in a way that is not worked out."""

    @staticmethod
    def forward(ctx: Any, grads: tuple[Tensor | None, ...], *inputs: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    backward = staticmethod(_no_second_derivative)


class KLTarget:
    """The target side of `activation_kl`, computed once and used for many steps.

    targets: one tensor [B, C, ...] a layer. Holds `probabilities` (softmax(target/T) in float32, float64 for
    float64 targets, each of its target's shape and memory format) and `entropy` [B, rows, 2]: sum p log p and
    sum p of every softmax row, in float64.
    """

    def __init__(self, targets: Sequence[Tensor], *, temperature: float = 1.0, axis: str = "all") -> None:
        _check_options(temperature, axis)
        _check_layers("targets", targets)
        self.temperature, self.axis, self.dtype = temperature, axis, targets[0].dtype
        self.probabilities: list[Tensor] = []
        entropies = []
        with torch.no_grad():
            for target in map(_dense, targets):
                logits = _rows(target, axis, temperature)
                rows = logits.softmax(-1)
                shaped = (rows.transpose(1, 2) if axis == "channel" else rows).reshape(target.shape)
                self.probabilities.append(torch.empty_like(target, dtype=rows.dtype).copy_(shaped))
                p = rows.to(_precise(rows))
                known = logits.isfinite().all(-1)
                entropies.append(
                    torch.stack((torch.xlogy(p, p).sum(-1).where(known, torch.nan), p.sum(-1)), -1)
                )
            self.entropy = torch.cat(entropies, 1)

    def select(self, index: Tensor | slice) -> "KLTarget":
        """The same target for a part of the batch: index is a slice, an int64 or a bool tensor over images."""
        part = object.__new__(KLTarget)
        part.temperature, part.axis, part.dtype = self.temperature, self.axis, self.dtype
        part.entropy = self.entropy[index].contiguous()
        part.probabilities = []
        for p in self.probabilities:
            q = p[index]
            part.probabilities.append(q if p.is_contiguous() == q.is_contiguous() else _channels_inner(q))
        return part

    def __len__(self) -> int:
        return len(self.probabilities)


def activation_kl(
    targets: Sequence[Tensor] | KLTarget,
    inputs: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    temperature: float | None = None,
    axis: str | None = None,
    per_layer: bool = False,
) -> Any:
    """Weighted sum over layers of KL(softmax(target/T) || softmax(input/T)), one value an image: [B].

    targets, inputs: one tensor [B, C, ...] a layer, all of one floating dtype and device; a `KLTarget` in place
    of targets saves their softmax. axis: what one softmax runs over: "all" features of an image, "spatial"
    (positions of each channel) or "channel" (channels at each position); rows of one image are averaged, so
    that the value does not grow with resolution. Half types accumulate in float32, the result is float32
    (float64 for float64). The gradient goes to inputs alone. A layer of weight 0 is skipped: its loss reads 0.
    Infinite or NaN features give NaN for their image. temperature (1.0) and axis ("all") are fixed by a
    KLTarget. With per_layer: (total [B], layers [L, B]), layers before weighting.
    Raises RequestError naming the argument, what it got and what was expected.
    Formula: arXiv 2509.23051 (activation matching), with the temperature as in distillation but no T^2.
    """
    if isinstance(targets, KLTarget):
        for name, got, fixed in (
            ("temperature", temperature, targets.temperature),
            ("axis", axis, targets.axis),
        ):
            if got is not None and got != fixed:
                raise RequestError(f"activation_kl: {name} is {got!r}, expected {fixed!r} as in the KLTarget")
        temperature, axis = targets.temperature, targets.axis
        first: Sequence[Tensor] = targets.probabilities
        dtype, entropy = targets.dtype, targets.entropy
    else:
        temperature, axis = 1.0 if temperature is None else temperature, "all" if axis is None else axis
        _check_options(temperature, axis)
        _check_layers("targets", targets)
        first, dtype, entropy = targets, targets[0].dtype, None
    _check_layers("inputs", inputs)
    _check_pairs(first, inputs, dtype)
    if weights is None:
        weights = [1.0] * len(inputs)
    if len(weights) != len(inputs):
        raise RequestError(
            f"activation_kl: weights has {len(weights)} entries, expected {len(inputs)}, one a layer"
        )
    weights = [float(weight) for weight in weights]
    if not all(-inf < weight < inf for weight in weights):
        raise RequestError(f"activation_kl: weights is {weights}, expected finite numbers")
    inputs = [_dense(x) for x in inputs]
    pairs = [_alike(target.detach(), x) for target, x in zip(first, inputs, strict=True)]
    options = weights, float(temperature), axis
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        total, layers, _ = torch.ops.minexp.activation_kl(pairs, inputs, entropy, *options)
    else:
        way = _OnePass if _fuses(inputs) else _TwoPasses
        total, layers, *_ = way.apply(pairs, entropy, options, *inputs)
    return (total, layers) if per_layer else total


def _fuses(inputs: Sequence[Tensor]) -> bool:
    """Whether a gradient will be asked for, of a body that finds it on the way.

    Not in half precision: before it is scaled, a gradient may be too small for that.
    """
    return (
        inputs[0].device.type == "cpu"
        and inputs[0].dtype in (torch.float32, torch.float64)
        and any(x.requires_grad for x in inputs)
        and torch._C._dispatch_has_kernel_for_dispatch_key("minexp::activation_kl_gradients", "CPU")
    )


def _dense(x: Tensor) -> Tensor:
    """x itself if an image is one span of memory, channels outermost or innermost; else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _channels_inner(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _alike(target: Tensor, x: Tensor) -> Tensor:
    """target in the memory format of x."""
    target = _dense(target)
    if target.is_contiguous() == x.is_contiguous():
        return target
    return target.contiguous() if x.is_contiguous() else _channels_inner(target)


def _check_options(temperature: float, axis: str) -> None:
    if not (isinstance(temperature, int | float) and 0 < temperature < inf):
        raise RequestError(
            f"activation_kl: temperature is {temperature!r}, expected a positive finite number"
        )
    if axis not in AXES:
        raise RequestError(f"activation_kl: axis is {axis!r}, expected one of {', '.join(map(repr, AXES))}")


def _check_layers(name: str, layers: Sequence[Tensor]) -> None:
    def wrong(index: int, got: str, expected: str) -> RequestError:
        return RequestError(f"activation_kl: {name}[{index}] {got}, expected {expected}")

    if isinstance(layers, Tensor) or not 1 <= len(layers) <= MAX_LAYERS:
        got = "one tensor" if isinstance(layers, Tensor) else f"a list of {len(layers)}"
        raise RequestError(f"activation_kl: {name} is {got}, expected a list of 1 to {MAX_LAYERS} tensors")
    first = layers[0]
    for index, x in enumerate(layers):
        if not isinstance(x, Tensor):
            raise wrong(index, f"is a {type(x).__name__}", "a tensor")
        if x.dim() < 2 or 0 in x.shape[1:]:
            raise wrong(index, f"has shape {list(x.shape)}", "[B, C, ...] with at least one feature")
        if x.shape[0] != first.shape[0]:
            raise wrong(index, f"has {x.shape[0]} images", f"{first.shape[0]} as in {name}[0]")
        if x.dtype != first.dtype or x.dtype not in _DTYPES:
            kinds = f"{first.dtype} as in {name}[0]" if first.dtype in _DTYPES else "a floating dtype"
            raise wrong(index, f"has dtype {x.dtype}", kinds)
        if x.device != first.device:
            raise wrong(index, f"is on {x.device}", f"{first.device} as {name}[0]")


def _check_pairs(targets: Sequence[Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    if len(targets) != len(inputs):
        raise RequestError(
            f"activation_kl: inputs has {len(inputs)} layers, expected {len(targets)} as in targets"
        )
    for index, (target, x) in enumerate(zip(targets, inputs, strict=True)):
        for what, got, expected in (
            ("shape", list(x.shape), list(target.shape)),
            ("dtype", x.dtype, dtype),
            ("device", x.device, target.device),
        ):
            if got != expected:
                message = f"activation_kl: inputs[{index}] has {what} {got}, expected {expected} as in targets[{index}]"
                raise RequestError(message)
