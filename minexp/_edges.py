"""Sparse scoring of the edges between channels, without ever holding the dense [B, O, I] scores.

Schema, plain PyTorch reference (one image at a time) and fake; csrc/edges.* adds faster bodies of the same
meaning. score[b, o, i] = strength[o, i] * energy[b, i] * gradient[b, o], ranked by magnitude, ties by the lowest
index. NaN ranks above everything, so that it is seen. With groups, target o reads only the sources of its
group, strength is [O, I/groups] as in a convolution's weight, and sources are numbered over all of I.
"""

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import RequestError

_library = torch.library.Library("minexp", "FRAGMENT")
_MASKS = "Tensor? gradient, Tensor? source_mask, Tensor? target_mask, int groups"
_library.define(
    f"edge_topk(Tensor strength, Tensor energy, int k, {_MASKS}) -> (Tensor values, Tensor indices)"
)
_library.define(
    f"edge_threshold(Tensor strength, Tensor energy, float threshold, {_MASKS})"
    " -> (Tensor crow, Tensor source, Tensor values)"
)
_library.define(
    f"edge_select(Tensor strength, Tensor energy, int n, {_MASKS}) -> (Tensor values, Tensor flat)"
)
_library.define(
    "edge_position_topk(Tensor weight, Tensor activation, int k, int[] stride, int[] padding, int[] dilation,"
    f" {_MASKS}) -> (Tensor values, Tensor indices)"
)

Masks = tuple[Tensor | None, Tensor | None, Tensor | None, int]


def _candidates(b: int, scores: Tensor, masks: Masks) -> Tensor:
    """Which entries of one image's scores [O, I/groups] the masks leave."""
    _, source, target, groups = masks
    keep = torch.ones_like(scores, dtype=torch.bool)
    if source is not None:
        keep &= _per_target(source[b], scores.shape[0], groups)
    if target is not None:
        keep &= target[b].unsqueeze(1)
    return keep


def _per_target(source: Tensor, targets: int, groups: int) -> Tensor:
    """What each target sees of a vector over sources: [I] -> [O, I/groups]."""
    return source.view(groups, -1).repeat_interleave(targets // groups, 0)


def _offset(scores: Tensor, groups: int) -> Tensor:
    """The number of each target's first source: [O, 1]."""
    targets, width = scores.shape
    group = torch.arange(targets, device=scores.device) // max(targets // groups, 1)
    return (group * width).unsqueeze(1)


def _scores(b: int, strength: Tensor, energy: Tensor, groups: int) -> Tensor:
    return strength * _per_target(energy[b], strength.shape[0], groups)


def _weigh(values: Tensor, gradient: Tensor | None, b: int) -> Tensor:
    return values if gradient is None else values * gradient[b].unsqueeze(1)


def _largest(scores: Tensor, keep: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of largest magnitude of each row among those kept, and their places (-1: no entry left)."""
    place = scores.abs().masked_fill(~keep, -1).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    empty = ~keep.gather(1, place)
    return scores.gather(1, place).masked_fill(empty, 0), place.masked_fill(empty, -1)


def _topk(b: int, scores: Tensor, k: int, masks: Masks) -> tuple[Tensor, Tensor]:
    values, place = _largest(scores, _candidates(b, scores, masks), k)
    values = _weigh(values, masks[0], b).masked_fill(place < 0, 0)
    return values, torch.where(place < 0, place, place + _offset(scores, masks[3]))


def edge_topk_reference(strength: Tensor, energy: Tensor, k: int, *masks: Any) -> tuple[Tensor, Tensor]:
    """What `minexp::edge_topk` means."""
    values, indices = _topk_fake(strength, energy, k)
    for b in range(len(energy)):
        values[b], indices[b] = _topk(b, _scores(b, strength, energy, masks[3]), k, masks)
    return values, indices


def _topk_fake(strength: Tensor, energy: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = energy.shape[0], strength.shape[0], k
    return energy.new_empty(shape), energy.new_empty(shape, dtype=torch.int64)


def edge_threshold_reference(
    strength: Tensor, energy: Tensor, threshold: float, *masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `minexp::edge_threshold` means."""
    counts, sources, found = [torch.zeros(1, dtype=torch.int64, device=energy.device)], [], []
    for b in range(len(energy)):
        scores = _scores(b, strength, energy, masks[3])
        keep = _candidates(b, scores, masks)
        scores = _weigh(scores, masks[0], b)
        keep &= ~(scores.abs() <= threshold)
        target, place = keep.nonzero(as_tuple=True)
        counts.append(keep.sum(1))
        sources.append(place + _offset(scores, masks[3])[target, 0])
        found.append(scores[keep])
    source = torch.cat(sources) if sources else counts[0][:0]
    return torch.cat(counts).cumsum(0), source, torch.cat(found) if found else energy.new_empty(0)


def _threshold_fake(strength: Tensor, energy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    crow = energy.new_empty(energy.shape[0] * strength.shape[0] + 1, dtype=torch.int64)
    return crow, energy.new_empty(count, dtype=torch.int64), energy.new_empty(count)


def edge_select_reference(strength: Tensor, energy: Tensor, n: int, *masks: Any) -> tuple[Tensor, Tensor]:
    """What `minexp::edge_select` means: an image's n largest edges, in the order of o * I/groups + i."""
    values, flat = _select_fake(strength, energy, n)
    for b in range(len(energy)):
        scores = _scores(b, strength, energy, masks[3])
        keep = _candidates(b, scores, masks).view(1, -1)
        scores = _weigh(scores, masks[0], b).view(1, -1)
        _, place = _largest(scores, keep, n)
        place = torch.where(place < 0, scores.numel(), place).sort(-1).values
        empty = place == scores.numel()
        values[b] = scores.gather(1, place.masked_fill(empty, 0)).masked_fill(empty, 0)
        flat[b] = place.masked_fill(empty, -1)
    return values, flat


def _select_fake(strength: Tensor, energy: Tensor, n: int, *_: Any) -> tuple[Tensor, Tensor]:
    return energy.new_empty(len(energy), n), energy.new_empty((len(energy), n), dtype=torch.int64)


def edge_position_topk_reference(
    weight: Tensor,
    activation: Tensor,
    k: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *masks: Any,
) -> tuple[Tensor, Tensor]:
    """What `minexp::edge_position_topk` means."""
    values, indices = _topk_fake(weight, activation, k)
    targets, width, groups = *weight.shape[:2], masks[3]
    kernel = weight.view(groups, targets // groups, width, -1)
    for b, image in enumerate(activation):
        patches = functional.unfold(
            image.unsqueeze(1),
            weight.shape[2:],
            dilation=tuple(dilation),
            padding=tuple(padding),
            stride=tuple(stride),
        )
        patches = patches.view(groups, width, *patches.shape[1:])  # [groups, I/groups, kernel, positions]
        rows = (
            torch.einsum("oik,ikp->oip", w, x).abs().sum(-1) for w, x in zip(kernel, patches, strict=True)
        )
        values[b], indices[b] = _topk(b, torch.cat(list(rows)), k, masks)
    return values, indices


for _name, _reference, _fake in (
    ("edge_topk", edge_topk_reference, _topk_fake),
    ("edge_threshold", edge_threshold_reference, _threshold_fake),
    ("edge_select", edge_select_reference, _select_fake),
    ("edge_position_topk", edge_position_topk_reference, _topk_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minexp::{_name}", _fake, lib=_library)


def edge_topk(
    strength: Tensor,
    energy: Tensor,
    k: int,
    *,
    gradient: Tensor | None = None,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The k strongest incoming edges of every target: (values [B, O, k], source indices [B, O, k]).

    strength [O, I/groups] (say the L1 norm of each kernel, or signed), energy [B, I] (of the source channels),
    gradient [B, O] (a factor of each target: it scales the values, the ranking is by |strength * energy|),
    masks bool, [B, I] or [I] and [B, O] or [O]: only edges between active channels count. Largest magnitude
    first, ties by lowest index, signs kept; where fewer than k edges are left, value 0 and index -1. Half types
    are computed in float32. Not differentiable. Raises RequestError on shapes, dtypes, devices or k that do not fit.
    Formula: the edge score of arXiv 2509.25686.
    """
    tensors, masks = _checked("edge_topk", strength, energy, gradient, source_mask, target_mask, groups)
    _check_count("edge_topk", "k", k, strength.shape[1], "sources of a target")
    return torch.ops.minexp.edge_topk(*tensors, k, *masks)


def edge_threshold(
    strength: Tensor,
    energy: Tensor,
    threshold: float,
    *,
    gradient: Tensor | None = None,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """All edges with |score| > threshold as CSR over rows b * O + o: (crow [B*O+1], source, values).

    Arguments as for `edge_topk`; the gradient is part of the score here. Sources ascend within a row.
    """
    tensors, masks = _checked("edge_threshold", strength, energy, gradient, source_mask, target_mask, groups)
    if not (isinstance(threshold, int | float) and 0 <= threshold < inf):
        raise RequestError(f"edge_threshold: threshold is {threshold!r}, expected a finite number >= 0")
    return torch.ops.minexp.edge_threshold(*tensors, float(threshold), *masks)


def edge_total_topk(
    strength: Tensor,
    energy: Tensor,
    n: int,
    *,
    gradient: Tensor | None = None,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The n strongest edges of each image over all targets: (values, target, source), each [B, n].

    Arguments as for `edge_topk`; the gradient is part of the score here. Ties by the lowest (target, source).
    """
    tensors, masks = _checked("edge_total_topk", strength, energy, gradient, source_mask, target_mask, groups)
    _check_count("edge_total_topk", "n", n, strength.numel(), "edges of an image")
    values, flat = torch.ops.minexp.edge_select(*tensors, n, *masks)
    order = values.abs().masked_fill(flat < 0, -1).sort(dim=-1, descending=True, stable=True).indices
    values, flat, width = values.gather(1, order), flat.gather(1, order), strength.shape[1]
    target = torch.div(flat, width, rounding_mode="floor")
    source = flat - target * width + torch.div(target * groups, len(strength), rounding_mode="floor") * width
    return values, target, torch.where(flat < 0, flat, source)


def edge_position_topk(
    weight: Tensor,
    activation: Tensor,
    k: int,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    gradient: Tensor | None = None,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """`edge_topk` by what a source really adds: score[b, o, i] = sum over positions |W[o, i] * x[b, i]| (convolution).

    weight [O, I/groups, h, w], activation [B, I, H, W]; stride, padding, dilation and groups as in conv2d.
    """
    name = "edge_position_topk"
    for argument, tensor in (("weight", weight), ("activation", activation)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            got = str(list(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise RequestError(f"{name}: {argument} is {got}, expected a tensor of 4 dimensions")
    pairs = []
    for argument, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        pair = [value, value] if isinstance(value, int) else list(value)
        if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
            raise RequestError(f"{name}: {argument} is {value!r}, expected one or two integers >= {least}")
        pairs.append(pair)
    spans = zip(weight.shape[2:], activation.shape[2:], pairs[1], pairs[2], strict=True)
    if 0 in weight.shape[2:] or any(
        (kernel - 1) * step + 1 > size + 2 * pad for kernel, size, pad, step in spans
    ):
        got = f"kernel {list(weight.shape[2:])} on {list(activation.shape[2:])}"
        raise RequestError(
            f"{name}: weight and activation give {got}, expected a kernel that fits the padded image"
        )
    tensors, masks = _checked(name, weight, activation, gradient, source_mask, target_mask, groups)
    _check_count(name, "k", k, weight.shape[1], "sources of a target")
    return torch.ops.minexp.edge_position_topk(*tensors, k, *pairs, *masks)


def _check_count(op: str, name: str, count: int, most: int, what: str) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= most:
        raise RequestError(f"{op}: {name} is {count!r}, expected an integer from 1 to {most}, the {what}")


def _checked(
    op: str,
    strength: Tensor,
    energy: Tensor,
    gradient: Tensor | None,
    source_mask: Tensor | None,
    target_mask: Tensor | None,
    groups: int,
) -> tuple[tuple[Tensor, Tensor], Masks]:
    """Everything contiguous, of one compute dtype, the masks with their batch dimension; or RequestError."""
    first, second = ("weight", "activation") if op == "edge_position_topk" else ("strength", "energy")
    dims = 4 if op == "edge_position_topk" else 2

    def check(name: str, what: str, got: Any, expected: Any, fits: bool) -> None:
        if not fits:
            raise RequestError(f"{op}: {name} {what} {got}, expected {expected}")

    for name, x in ((first, strength), (second, energy)):
        check(name, "is a", type(x).__name__, "a tensor", isinstance(x, Tensor))
        check(name, "has shape", list(x.shape), f"{dims} dimensions", x.dim() == dims)
        check(name, "has dtype", x.dtype, "a floating dtype", x.is_floating_point())
    targets, sources, batch = strength.shape[0], energy.shape[1], energy.shape[0]
    check("groups", "is", repr(groups), "an integer >= 1", isinstance(groups, int) and groups >= 1)
    fits = targets > 0 and targets % groups == 0 and sources > 0 and strength.shape[1] * groups == sources
    shape = f"[O, I/groups, ...] for I = {sources} ({second}) and groups = {groups}, O a multiple of groups"
    check(first, "has shape", list(strength.shape), shape, fits)
    others: tuple[tuple[str, Tensor | None, int | None, torch.dtype], ...] = (
        ("gradient", gradient, targets, energy.dtype),
        ("source_mask", source_mask, sources, torch.bool),
        ("target_mask", target_mask, targets, torch.bool),
        (first, strength, None, energy.dtype),
    )
    for name, other, width, dtype in others:
        if other is None:
            continue
        check(name, "has dtype", other.dtype, dtype, other.dtype == dtype)
        check(name, "is on", other.device, f"{energy.device} as {second}", other.device == energy.device)
        if width is not None:
            shapes = [[batch, width]] if name == "gradient" else [[batch, width], [width]]
            check(
                name,
                "has shape",
                list(other.shape),
                " or ".join(map(str, shapes)),
                list(other.shape) in shapes,
            )
    compute = torch.float64 if energy.dtype == torch.float64 else torch.float32
    pair = strength.detach().to(compute).contiguous(), energy.detach().to(compute).contiguous()
    slope = None if gradient is None else gradient.detach().to(compute).contiguous()
    source, target = (
        None if mask is None else mask.expand(batch, width).contiguous()
        for mask, width in ((source_mask, sources), (target_mask, targets))
    )
    return pair, (slope, source, target, groups)
