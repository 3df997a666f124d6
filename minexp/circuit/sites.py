"""Where the units of a network are: channels, neurons and heads in the operations of a traced program."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .program import Program, sizes

Kind = Literal["channel", "neuron", "head", "gate", "stream", "stage"]


@dataclass(frozen=True)
class Site:
    """A tensor whose units are nodes of the circuit.

    name: of the layer that computes it. units: how many there are. axis: where they lie once the leading axis
    of the value, [B * each, ...], is split into [B, each, ...]. place: what computes it, for `Network.run`.
    ablated: whether its units count as nodes that an ablation may remove; a residual stream only carries what others
    wrote into it.
    """

    name: str
    kind: Kind
    units: int
    axis: int
    each: int = 1
    place: Any = field(default=None, repr=False)

    @property
    def ablated(self) -> bool:
        return self.kind != "stream"

    def split(self, value: Tensor) -> Tensor:
        """The value as [B, units, positions]."""
        value = value.unflatten(0, (-1, self.each))
        return value.movedim(self.axis, 1).flatten(2)

    def spread(self, factors: Tensor, value: Tensor) -> Tensor:
        """Factors [B, units] shaped to broadcast against a value that is split into [B, each, ...]."""
        shape = [1] * value.ndim
        shape[0], shape[self.axis] = factors.shape
        return factors.reshape(shape)


def _ops(*names: str) -> frozenset[Any]:
    """Every overload of the named ATen operations that this torch has."""
    packets = (getattr(torch.ops.aten, name, None) for name in names)
    return frozenset(getattr(p, overload) for p in packets if p is not None for overload in p.overloads())


LINEAR = _ops(
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "linear", "addmm"
)
CONVOLUTION = LINEAR - _ops("linear", "addmm")
NORM = _ops("layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm", "native_group_norm")
SUM = _ops("add", "sub", "addcmul", "addcdiv")
PRODUCT = _ops("mul", "div")
_ATTENTION = _ops("scaled_dot_product_attention")
_MATMUL = _ops("matmul", "bmm", "baddbmm")
_SOFTMAX = _ops("softmax", "_softmax", "_safe_softmax")
# One tensor in, the same shape out, each entry from the entry at its place (batch norm: in evaluation mode).
ELEMENTWISE = (
    _ops("relu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu", "celu")
    | _ops("selu", "mish", "softplus", "hardtanh", "relu6", "prelu", "clamp", "clamp_min", "clamp_max", "neg")
    | _ops(
        "exp", "abs", "square", "sqrt", "pow", "log_sigmoid", "dropout", "feature_dropout", "alpha_dropout"
    )
    | _ops("clone", "alias", "detach", "contiguous", "_to_copy", "to", "lift_fresh_copy")
    | _ops(
        "batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm"
    )
)
_POOL = (
    _ops("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
    | _ops("adaptive_max_pool2d", "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d")
    | _ops("pad", "constant_pad_nd", "reflection_pad2d", "roll", "expand", "pixel_unshuffle")
)
_VIEW = _ops(
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "unsafe_split"
)
_PERMUTE, _TRANSPOSE = _ops("permute"), _ops("transpose", "t", "mT")
_COPY = _ops("clone", "alias", "detach", "contiguous", "_to_copy", "to", "dropout", "expand")
_MEAN, _SELECT, _SLICE, _CAT = _ops("mean", "amax", "sum"), _ops("select"), _ops("slice"), _ops("cat")
_UNITWISE = ELEMENTWISE | NORM | SUM | PRODUCT | _VIEW | _PERMUTE | _TRANSPOSE | _SLICE | _ops("roll", "pad")


def find_sites(program: Program) -> tuple[Site, ...]:
    """The sites of a program, in order of execution.

    A convolution or linear layer's output is one, behind the normalisation and nonlinearity that follow it; so is
    the output of an attention, per head, and a residual sum, which absorbs the layers that feed it directly: their
    weights are edges into the sum, and an identity skip is an edge from channel to channel.
    """
    return _Finder(program).find()


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.varying = program.behind([program.image]) | {program.image}
        self.attentions = {node for node in program.steps if self._is_attention(node)}
        self.axes: dict[fx.Node, int] = {}
        for node in program.steps:
            axis = self._axis(node) if isinstance(node.meta.get("val"), (Tensor, tuple, list)) else None
            if axis is not None:
                self.axes[node] = axis

    def find(self) -> tuple[Site, ...]:
        found: dict[fx.Node, tuple[fx.Node, Kind]] = {}  # the site's place -> what it began with
        for node in self.program.steps:
            if node not in self.axes or self._feeds_attention(node):
                continue
            kind: Kind
            if node in self.attentions:
                kind = "head"
            elif self._is_linear(node):
                kind = "channel" if node.target in CONVOLUTION and max(sizes(node)[2:]) > 1 else "neuron"
            elif self._is_sum(node) and self._joins(node, found):
                kind = "stream" if self._is_stream(node) else "channel"
            else:
                continue
            end = self._end(node)
            if end is None:
                continue
            if kind == "neuron" and any(self._is_product(user) for user in self._users(end)):
                kind = "gate"
            found.setdefault(end, (node, kind))
        names: dict[str, int] = {}
        sites = []
        for end, (node, kind) in sorted(found.items(), key=lambda item: self.program.place(item[0])):
            name = self.program.layer(node) or ("sum" if node.target in SUM else kind)
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name}:{names[name]}"
            sites.append(self._site(name, kind, end))
        return tuple(sites)

    def _site(self, name: str, kind: Kind, node: fx.Node) -> Site:
        where = self.program.batch_axis(node)
        assert where is not None
        axis = self.axes[node]
        units = where[1] if axis == 0 else sizes(node)[axis]
        return Site(name, kind, units, axis + 1, where[1], node)

    def _usable(self, node: fx.Node) -> bool:
        """Can units be told apart in the node's value: images along its first axis, units along another?"""
        where = self.program.batch_axis(node)
        if where is None or where[0] != 0 or node not in self.axes:
            return False
        return self.axes[node] > 0 or where[1] > 1

    def _users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user.op == "call_function" and self._is_tensor(user)]

    @staticmethod
    def _is_tensor(node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), (Tensor, tuple, list))

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """What an operation reads that depends on the image."""
        return [
            source for source in node.all_input_nodes if source in self.varying and self._is_tensor(source)
        ]

    def _is_linear(self, node: fx.Node) -> bool:
        return node.target in LINEAR and len(self._operands(node)) == 1

    def _is_sum(self, node: fx.Node) -> bool:
        return node.target in SUM and len(self._operands(node)) > 1

    def _is_product(self, node: fx.Node) -> bool:
        return node.target in PRODUCT and len(self._operands(node)) > 1

    def _is_attention(self, node: fx.Node) -> bool:
        """Attention by name, or a product whose first factor comes out of a softmax."""
        if node.target in _ATTENTION:
            return True
        if node.target not in _MATMUL or len(self._operands(node)) < 2:
            return False
        ahead, seen = [node.args[0]], set()
        while ahead:
            source = ahead.pop()
            if not isinstance(source, fx.Node) or source in seen or source not in self.varying:
                continue
            if source.target in _SOFTMAX:
                return True
            seen.add(source)
            if source.target not in LINEAR and source.target not in _MATMUL:
                ahead += source.all_input_nodes
        return False

    def _feeds_attention(self, node: fx.Node) -> bool:
        """Do the outputs become queries, keys or values before anything else is computed from them?"""
        ahead, seen = [node], set()
        while ahead:
            for user in ahead.pop().users:
                if user in self.attentions:
                    return True
                if user not in seen and user.target not in LINEAR and not self._is_sum(user):
                    seen.add(user)
                    ahead.append(user)
        return False

    def _joins(self, node: fx.Node, found: Collection[fx.Node]) -> bool:
        """Does a sum bring anything together: two sites, or a site and a new layer?"""
        sites, ahead, seen = set(), self._operands(node), set()
        while ahead:
            source = ahead.pop()
            if source in found:
                sites.add(source)
            elif self._is_linear(source) or source in self.attentions:
                return True
            elif source not in seen:
                seen.add(source)
                ahead += self._operands(source)
        return len(sites) > 1

    def _is_stream(self, node: fx.Node) -> bool:
        """Is the sum one of a residual stream, whose sums only normalisations and further sums read?"""
        ahead, seen = [node], {node}
        while ahead:
            near = ahead.pop()
            readers = {end for user in self._users(near) for end in self._past_views(user)}
            others = readers - {near}
            if any(user.target in LINEAR or user.target in ELEMENTWISE for user in others):
                return False
            for other in [*others, *(s for o in self._operands(near) for s in self._before_views(o))]:
                if self._is_sum(other) and other not in seen:
                    seen.add(other)
                    ahead.append(other)
        normed = (user for s in seen for first in self._users(s) for user in self._past_views(first))
        return len(seen) > 1 and any(user.target in NORM for user in normed)

    def _past_views(self, node: fx.Node) -> list[fx.Node]:
        """The first operations from here on that do more than rearrange."""
        if node.target in _COPY | _VIEW | _PERMUTE | _TRANSPOSE | _SLICE | _CAT | _POOL:
            return [end for user in self._users(node) for end in self._past_views(user)]
        return [node]

    def _before_views(self, node: fx.Node) -> list[fx.Node]:
        if node.target in _COPY | _VIEW | _PERMUTE | _TRANSPOSE:
            return [end for source in self._operands(node) for end in self._before_views(source)]
        return [node]

    def _end(self, node: fx.Node) -> fx.Node | None:
        """The last of the operations on single units that follow a node alone; None where a sum absorbs them."""
        end = node if self._usable(node) else None
        while True:
            users = self._users(node)
            if len(users) != 1:
                break
            user = users[0]
            if self._is_sum(user) and user in self.axes:
                return None
            alone = len(self._operands(user)) == 1 and user in self.axes
            if not alone or not (_is_item(user) or user.target in _UNITWISE):
                break
            node = user
            if isinstance(node.meta["val"], Tensor) and self._usable(node):
                end = node
        return None if self.program.scores in (node, end) else end

    def _axis(self, node: fx.Node) -> int | None:
        """Axis of the units in an operation's output."""
        if node in self.attentions:
            rank = len(sizes(node))
            return {4: 1, 3: 0}.get(rank)
        if self._is_linear(node):
            return 1 if node.target in CONVOLUTION else len(sizes(node)) - 1
        known = [(source, self.axes[source]) for source in self._operands(node) if source in self.axes]
        if not known:
            return None
        source, axis = known[0]
        target = node.target
        if _is_item(node) or target in ELEMENTWISE | NORM | _POOL:
            return axis
        if target in SUM | PRODUCT:
            ranks = {len(sizes(s)) for s, _ in known}
            agreed = len(ranks) == 1 and len({a for _, a in known}) == 1
            return axis if agreed and len(sizes(node)) in ranks else None
        if target in _PERMUTE:
            order = [d % len(node.args[1]) for d in node.args[1]]  # type: ignore[arg-type, union-attr, operator]
            return order.index(axis)
        if target in _TRANSPOSE:
            rank = len(sizes(node))
            first, second = (int(d) % rank for d in (node.args[1:3] or (0, 1)))  # type: ignore[arg-type]
            return {first: second, second: first}.get(axis, axis)
        if target in _VIEW:
            return _through_view(sizes(source), sizes(node), axis)
        if target in _MEAN | _SELECT | _SLICE | _CAT:
            return _through_reduction(node, source, axis)
        return None


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _through_view(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Where an axis is after a reshape that neither splits nor merges it."""
    ahead = prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[:place]) == ahead:
            return place
    return None


def _through_reduction(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    rank = len(sizes(source))
    if node.target in _CAT:
        return axis
    if node.target in _SLICE:
        return None if int(node.args[1] if len(node.args) > 1 else 0) % rank == axis else axis  # type: ignore[arg-type]
    if node.target in _SELECT:
        gone: Collection[int] = {int(node.args[1]) % rank}  # type: ignore[arg-type]
        keep = False
    else:
        dims = node.args[1] if len(node.args) > 1 else None
        if dims is None:
            return None
        gone = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}  # type: ignore[arg-type]
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    if axis in gone:
        return None
    return axis if keep else axis - sum(d < axis for d in gone)
