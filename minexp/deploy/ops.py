"""ONNX graph values with numpy's operators, so that a graph reads like the formula it computes.

Built on spox, which checks types and shapes while the graph is written. Opset 18: later ones send Resize to the CPU
in ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import spox
import spox.opset.ai.onnx.v18 as op

OPSET = 18


class Value:
    """A tensor of the graph; constants on either side of an operator take its type."""

    def __init__(self, var: spox.Var) -> None:
        self.var = var

    @property
    def dtype(self) -> Any:
        return self.var.unwrap_tensor().dtype

    def _other(self, other: Any) -> spox.Var:
        return other.var if isinstance(other, Value) else op.const(np.asarray(other, self.dtype))

    def __add__(self, other: Any) -> Value:
        return Value(op.add(self.var, self._other(other)))

    def __sub__(self, other: Any) -> Value:
        return Value(op.sub(self.var, self._other(other)))

    def __mul__(self, other: Any) -> Value:
        return Value(op.mul(self.var, self._other(other)))

    def __truediv__(self, other: Any) -> Value:
        return Value(op.div(self.var, self._other(other)))

    def __mod__(self, other: Any) -> Value:
        return Value(op.mod(self.var, self._other(other)))

    def __matmul__(self, other: Value) -> Value:
        return Value(op.matmul(self.var, other.var))

    def __gt__(self, other: Any) -> Value:
        return Value(op.greater(self.var, self._other(other)))

    def __ge__(self, other: Any) -> Value:
        return Value(op.greater_or_equal(self.var, self._other(other)))

    def __lt__(self, other: Any) -> Value:
        return Value(op.less(self.var, self._other(other)))

    def __le__(self, other: Any) -> Value:
        return Value(op.less_or_equal(self.var, self._other(other)))

    def equals(self, other: Any) -> Value:
        return Value(op.equal(self.var, self._other(other)))

    def __and__(self, other: Value) -> Value:
        return Value(op.and_(self.var, other.var))

    def __or__(self, other: Value) -> Value:
        return Value(op.or_(self.var, other.var))

    def __invert__(self) -> Value:
        return Value(op.not_(self.var))

    def cast(self, dtype: Any) -> Value:
        return Value(op.cast(self.var, to=dtype))

    def transpose(self, *axes: int) -> Value:
        return Value(op.transpose(self.var, perm=axes))

    def reshape(self, *shape: int) -> Value:
        """0 keeps a side, -1 takes what is left."""
        return Value(op.reshape(self.var, op.const(np.array(shape, np.int64))))

    def side(self, axis: int) -> Value:
        """Its length along an axis, [1]."""
        return Value(op.shape(self.var, start=axis, end=axis + 1))

    def resize(self, *sides: Value | int) -> Value:
        """Interpolated linearly to these sides, given as numbers or [1]."""
        sizes = [
            side.var if isinstance(side, Value) else op.const(np.array([side], np.int64)) for side in sides
        ]
        return Value(op.resize(self.var, sizes=op.concat(sizes, axis=0), mode="linear"))

    def shaped_like(self, other: Value) -> Value:
        return Value(op.reshape(self.var, op.shape(other.var)))

    def unsqueeze(self, *axes: int) -> Value:
        return Value(op.unsqueeze(self.var, op.const(np.array(axes, np.int64))))

    def squeeze(self, *axes: int) -> Value:
        return Value(op.squeeze(self.var, op.const(np.array(axes, np.int64))))

    def take(self, index: Value | int, axis: int = 0) -> Value:
        """Slices of these numbers along an axis (one number: without that axis)."""
        picks = index if isinstance(index, Value) else constant(np.int64(index))
        return Value(op.gather(self.var, picks.var, axis=axis))

    def take_along(self, index: Value, axis: int = 1) -> Value:
        return Value(op.gather_elements(self.var, index.var, axis=axis))

    def at(self, index: Value) -> Value:
        """The slices at multi-indices [N,k]."""
        return Value(op.gather_nd(self.var, index.var))

    def put(self, index: Value, values: Value) -> Value:
        """A copy with ``values`` at multi-indices [N,k]."""
        return Value(op.scatter_nd(self.var, index.var, values.var))

    def columns(self, start: int, stop: int) -> Value:
        """[:, start:stop]"""
        ends = (op.const(np.array([end], np.int64)) for end in (start, stop, 1))
        return Value(op.slice(self.var, *ends))

    def sum(self, axis: int, keep: bool = False) -> Value:
        return Value(op.reduce_sum(self.var, op.const(np.array([axis], np.int64)), keepdims=int(keep)))

    def any(self, axis: int) -> Value:
        """Is any true along the axis, which stays?"""
        return Value(op.reduce_max(self.cast(np.int32).var, op.const(np.array([axis], np.int64)))) > 0

    def argmax(self, axis: int) -> Value:
        return Value(op.arg_max(self.var, axis=axis, keepdims=0))

    def softmax(self, axis: int) -> Value:
        return Value(op.softmax(self.var, axis=axis))

    def cumsum(self, axis: int) -> Value:
        return Value(op.cumsum(self.var, op.const(np.int64(axis))))

    def sigmoid(self) -> Value:
        """1/(1+e^-x). ONNX Runtime's own is inexact where it is small, and the repair ranks pixels there."""
        return constant(np.float32(1)) / (Value(op.exp(op.neg(self.var))) + 1)

    def ceil(self) -> Value:
        return Value(op.ceil(self.var))

    def round(self) -> Value:
        return Value(op.round(self.var))

    def sqrt(self) -> Value:
        return Value(op.sqrt(self.var))

    def clip(self, low: Value | float | None = None, high: Value | float | None = None) -> Value:
        result = self
        if low is not None:
            result = Value(op.max([result.var, self._other(low)]))
        if high is not None:
            result = Value(op.min([result.var, self._other(high)]))
        return result

    def nonzero(self) -> Value:
        """Multi-indices [N,k] of what is true."""
        return Value(op.non_zero(self.cast(np.uint8).var)).transpose(1, 0)

    def sort_descending(self, count: int) -> Value:
        """Along the last axis of [B,count]."""
        values, _ = op.top_k(self.var, op.const(np.array([count], np.int64)), axis=1, largest=1, sorted=1)
        return Value(values)

    def largest(self, count: int) -> Value:
        """Where the ``count`` largest of each row of [B,N] are, the largest first: [B,count]."""
        _, places = op.top_k(self.var, op.const(np.array([count], np.int64)), axis=1, largest=1, sorted=1)
        return Value(places)

    def max_pool(self, side: int) -> Value:
        """Maximum over side×side pixels around each of [N,1,H,W]."""
        pooled, _ = op.max_pool(self.var, kernel_shape=[side, side], pads=[side // 2] * 4)
        return Value(pooled)


def constant(value: Any) -> Value:
    return Value(op.const(value))


def concat(values: Sequence[Value]) -> Value:
    """One after the other along the first axis."""
    return Value(op.concat([value.var for value in values], axis=0))


def where(condition: Value, yes: Any, no: Any) -> Value:
    """Elementwise choice; at least one of the two is a Value."""
    like = yes if isinstance(yes, Value) else no
    if like.dtype == np.bool_:  # ONNX Runtime chooses no booleans
        return (condition & Value(like._other(yes))) | (~condition & Value(like._other(no)))
    return Value(op.where(condition.var, like._other(yes), like._other(no)))


def setting(name: str, value: Any) -> Value:
    """A constant that `set_constants` finds again in the finished file."""
    var = op.const(value)
    var._rename(name)
    return Value(var)


def set_constants(model: onnx.ModelProto, values: dict[str, Any]) -> None:
    """Give the constants of these names other values, in place. Raises KeyError for a name that is not there."""
    missing = set(values)
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs += _subgraphs(node)
            if node.op_type == "Constant" and node.output[0] in values:
                (attribute,) = node.attribute
                old = onnx.numpy_helper.to_array(attribute.t)
                new = np.asarray(values[node.output[0]], old.dtype).reshape(old.shape)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(new))
                missing.discard(node.output[0])
    if missing:
        raise KeyError(*missing)


def pad_columns(value: Value, multiple: int) -> Value:
    """[B,N] with zeros on the right, so that N becomes a multiple."""
    missing = (constant(np.int64(multiple)) - value.side(1) % multiple) % multiple
    zero = op.const(np.zeros(3, np.int64))
    return Value(op.pad(value.var, op.concat([zero, missing.var], axis=0)))


def argument(dtype: Any, *shape: int | str) -> Value:
    """An input of the graph; a side given by name is dynamic."""
    return Value(spox.argument(spox.Tensor(dtype, shape)))


def loop(
    body: Callable[..., tuple[Value, Sequence[Value]]], state: Sequence[Value], bound: int
) -> list[Value]:
    """Repeat ``body(*state) -> (go on?, state)`` while it says so, at most ``bound`` times; the last state."""

    def inner(_number: spox.Var, _go_on: spox.Var, *carried: spox.Var) -> list[spox.Var]:
        go_on, new = body(*map(Value, carried))
        return [go_on.var, *(value.var for value in new)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the types of what a loop leaves are not inferred: restored below
        last = op.loop(
            op.const(np.array([bound], np.int64)),
            op.const(np.array([True])),
            v_initial=[value.var for value in state],
            body=inner,
        )
    sides = [[int(str(side)) for side in (value.var.unwrap_tensor().shape or ())[1:]] for value in state]
    return [Value(var).reshape(-1, *rest) for var, rest in zip(last, sides, strict=True)]


def choose(
    condition: Value, yes: Callable[[], Sequence[Value]], no: Callable[[], Sequence[Value]]
) -> list[Value]:
    """What one of two branches gives, which alone is computed; condition: one value."""
    branches = [lambda branch=branch: [value.var for value in branch()] for branch in (yes, no)]
    out = op.if_(condition.var, then_branch=branches[0], else_branch=branches[1])
    return [Value(var) for var in out]


def call(network: onnx.ModelProto, x: Value) -> Value:
    """The first output of a network of one input, its nodes becoming part of this graph."""
    (name,) = (value.name for value in network.graph.input)
    outputs = spox.inline(network)(**{name: x.var})
    return Value(outputs[network.graph.output[0].name])


def build(
    inputs: dict[str, Value], outputs: dict[str, Value], shapes: dict[str, Sequence[int | str]]
) -> onnx.ModelProto:
    """The model from these inputs to these outputs. shapes: sides of an output after its first, the batch."""
    model = spox.build(
        {name: value.var for name, value in inputs.items()},
        {name: value.var for name, value in outputs.items()},
    )
    _hoist(model.graph)
    _drop_places(model.graph)
    for output in model.graph.output:
        kind = output.type.tensor_type.elem_type
        sides = ["batch", *shapes.get(output.name, ())]
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, kind, sides))
    return model


def _hoist(graph: onnx.GraphProto) -> None:
    """Move what a loop computes anew at every turn, from nothing that turns change, to before the loop.

    A network's weights stay inside: only there does ONNX Runtime lay them out for the CPU.
    """
    for place, loop_node in reversed(list(enumerate(graph.node))):
        if loop_node.op_type == "Loop":
            (body,) = _subgraphs(loop_node)
            for node in reversed(_take_unchanging(body, {value.name for value in body.input})):
                graph.node.insert(place, node)


def _take_unchanging(graph: onnx.GraphProto, changing: set[str]) -> list[onnx.NodeProto]:
    """Take out the nodes of a graph, and of its branches, that no name in ``changing`` reaches; in order."""
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    given = {value.name for value in graph.output}  # a graph gives only what it computes itself
    moving: set[str] = set()
    taken: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in constants:
            continue
        from_outside = not constants.issuperset(filter(None, node.input))
        if changing.isdisjoint(node.input) and from_outside and given.isdisjoint(node.output):
            moving |= {*node.output, *constants.intersection(node.input)}
        else:
            changing.update(node.output)
            for branch in _subgraphs(node):
                taken += _take_unchanging(branch, changing)
    mine = [node for node in graph.node if node.output[0] in moving]
    for node in mine:
        graph.node.remove(node)
    return mine + taken


def _drop_places(graph: onnx.GraphProto) -> None:
    """Leave out where each maximum of a pooling is: nobody asks, and ONNX Runtime is ten times as fast without."""
    for node in graph.node:
        if node.op_type == "MaxPool":
            del node.output[1:]
        for branch in _subgraphs(node):
            _drop_places(branch)


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]
