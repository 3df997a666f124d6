"""A classifier as a program of tensor operations, any part of which can be run again with other values in it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind

from ..classifier import Classifier
from ..errors import RequestError, one_line

Value = Any  # a tensor, or a size that an operation computed
Values = dict[fx.Node, Value]
Edit = Callable[[Tensor], Tensor]
_Slice = tuple[frozenset[fx.Node], frozenset[fx.Node]]  # of a program: what is wanted, what is known

_aten = torch.ops.aten
# A view fits the strides of the traced run alone; a reshape gives the same numbers in every memory format.
_ANY_STRIDES = {_aten.view.default: _aten.reshape.default, _aten._unsafe_view.default: _aten.reshape.default}


class _Scores(nn.Module):
    """Pixels in [0, 1] to class scores [B, K]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model  # registered, so that the parameters keep their names
        self._logits = classifier.logits

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x)


class Program:
    """The operations of a classifier's forward pass in order, as torch.export sees them.

    Parameters are looked up in the model at each run, so that a program stays right when they change. Raises
    RequestError with the reason for a model that cannot be exported.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._model, self.input_shape = classifier.model, classifier.input_shape
        self._exported = program = _export(classifier)
        self._constants: Values = {}
        self._bound: dict[fx.Node, str] = {}
        self.image: fx.Node
        inputs = (node for node in program.graph.nodes if node.op == "placeholder")
        for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self.image = node
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                self._constants[node] = program.constants[spec.target]
            else:
                self._bound[node] = str(spec.target).removeprefix("model.")
        output = next(node for node in program.graph.nodes if node.op == "output")
        self.scores: fx.Node = output.args[0][0]
        self.steps: tuple[fx.Node, ...] = tuple(n for n in program.graph.nodes if n.op == "call_function")
        self._place = {node: place for place, node in enumerate(program.graph.nodes)}
        self._plans: dict[_Slice, list[tuple[fx.Node, list[fx.Node]]]] = {}
        self._shares: dict[_Slice, float] = {}
        self._symbol = self.image.meta["val"].shape[0].node.expr
        self._fold_constants()

    def run(
        self,
        known: Mapping[fx.Node, Value],
        wanted: Iterable[fx.Node],
        edits: Mapping[fx.Node, Edit] | None = None,
        functions: Mapping[fx.Node, Callable[..., Value]] | None = None,
    ) -> Values:
        """Values of the wanted operations, from those that are known; only what lies between is computed.

        edits: what to do with an operation's output before others read it. functions: what to call in place of
        an operation. Nothing that is known is computed again, also where an edit would change what it rests on.
        """
        wanted = list(wanted)
        values: Values = {**self._constants, **known}
        for node, released in self._plan(wanted, known):
            if node.op == "placeholder":
                if node not in self._bound:
                    raise KeyError(f"{node.name} needs the image, which is not among the known values")
                values[node] = self._look_up(self._bound[node])
                continue
            function: Any = node.target if functions is None else functions.get(node, node.target)
            arguments, keywords = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            value = _ANY_STRIDES.get(function, function)(*arguments, **keywords)
            if edits is not None and node in edits:
                value = edits[node](value)
            values[node] = value
            for done in released:
                del values[done]
        return {node: values[node] for node in wanted}

    def _plan(
        self, wanted: Collection[fx.Node], known: Mapping[fx.Node, Value]
    ) -> list[tuple[fx.Node, list[fx.Node]]]:
        """What to compute, in order, and after each step what is no longer needed."""
        key = (frozenset(wanted), frozenset(known))
        if key not in self._plans:
            steps = self.between(known, wanted)
            last: dict[fx.Node, fx.Node] = {}
            for node in steps:
                last.update(dict.fromkeys(node.all_input_nodes, node))
            released: dict[fx.Node, list[fx.Node]] = {node: [] for node in steps}
            computed = set(steps) - set(wanted)
            for node, user in last.items():
                if node in computed:
                    released[user].append(node)
            self._plans[key] = [(node, released[node]) for node in steps]
        return self._plans[key]

    def share(self, known: Mapping[fx.Node, Value], wanted: Collection[fx.Node]) -> float:
        """How much of a whole forward pass such a run is, by multiply-adds."""
        key = (frozenset(wanted), frozenset(known))
        if key not in self._shares:
            steps = self.between(known, wanted)
            self._shares[key] = sum(map(multiply_adds, steps)) / max(1, sum(map(multiply_adds, self.steps)))
        return self._shares[key]

    def between(self, known: Collection[fx.Node], wanted: Iterable[fx.Node]) -> list[fx.Node]:
        """The operations and inputs that lead to the wanted ones from the known ones, in order."""
        found: set[fx.Node] = set()
        ahead = [node for node in wanted if node not in known]
        while ahead:
            node = ahead.pop()
            if node not in found and node not in self._constants:
                found.add(node)
                ahead += [source for source in node.all_input_nodes if source not in known]
        return sorted(found, key=self._place.__getitem__)

    def behind(self, sources: Iterable[fx.Node]) -> set[fx.Node]:
        """Every operation that reads from the sources, also through others; not the sources themselves."""
        found: set[fx.Node] = set()
        ahead = list(sources)
        while ahead:
            for user in ahead.pop().users:
                if user not in found and user.op == "call_function":
                    found.add(user)
                    ahead.append(user)
        return found

    def place(self, node: fx.Node) -> int:
        """Position in the order of execution."""
        return self._place[node]

    def modules(self, node: fx.Node) -> list[str]:
        """Names of the modules that the operation belongs to, outermost first, "" for the model itself."""
        stack = (node.meta.get("nn_module_stack") or {}).values()
        return [str(path).removeprefix("model").removeprefix(".") for path, _ in stack]

    def layer(self, node: fx.Node) -> str:
        """Name of the innermost module that the operation belongs to."""
        return (self.modules(node) or [""])[-1]

    def batch_axis(self, node: fx.Node) -> tuple[int, int] | None:
        """(axis, entries of it for one image) where the images of a batch lie; None for what no image is part of."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and self._symbol in size.node.expr.free_symbols:
                return axis, int(size.node.expr.subs(self._symbol, 1))
        return None

    def take(self, node: fx.Node, value: Value, rows: Tensor) -> Value:
        """The value of a batch whose entries are those images (by number) of the value's batch."""
        where = self.batch_axis(node)
        if where is None:
            return value
        axis, each = where
        if value.shape[axis] == each:  # one image: no copy
            shape = [-1] * (value.ndim + 1)
            shape[axis] = len(rows)
            return value.unsqueeze(axis).expand(shape).flatten(axis, axis + 1)
        entries = (rows.unsqueeze(1) * each + torch.arange(each, device=rows.device)).flatten()
        return value.index_select(axis, entries)

    def _look_up(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(self._model.get_submodule(owner), leaf)
        return tensor.detach()

    def _fold_constants(self) -> None:
        """Compute once what depends on neither image nor parameters (the shift masks of a Swin, say)."""
        varying = self.behind([self.image, *self._bound]) | set(self._bound) | {self.image}
        fixed = [node for node in self.steps if node not in varying]
        if fixed:
            self._constants |= self.run({}, fixed)


def sizes(node: fx.Node) -> list[int]:
    """Shape of an operation's (first) output for one image."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0]
    return [_for_one(size) for size in value.shape] if isinstance(value, Tensor) else []


def _for_one(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
    return int(size)


def multiply_adds(node: fx.Node) -> int:
    """Of a convolution, a matrix product or an attention, for one image; 0 for all else."""
    name = str(node.target)
    if name.startswith(("aten.conv", "aten.linear")):
        weight = sizes(node.args[1])  # type: ignore[arg-type]
        return prod(sizes(node)) * prod(weight[1:])
    if name.startswith("aten.scaled_dot_product_attention"):
        query, key = sizes(node.args[0]), sizes(node.args[1])  # type: ignore[arg-type]
        return 2 * prod(query) * key[-2]
    if name.startswith(("aten.matmul", "aten.bmm", "aten.mm")):
        return prod(sizes(node)) * sizes(node.args[0])[-1]  # type: ignore[arg-type]
    return 0


def _export(classifier: Classifier) -> Any:
    channels, height, width = classifier.input_shape
    x = torch.full((2, channels, height, width), 0.5, device=classifier.device)
    try:
        with classifier.frozen(), torch.no_grad(), _silence():
            wrapped = _Scores(classifier).eval()
            program = export(wrapped, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=2**20)},))
            if any(_writes(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # without operations that write into their inputs
    except Exception as error:
        raise RequestError(
            f"{type(classifier.model).__name__} cannot be traced by torch.export ({one_line(error)})"
        ) from error
    return program


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torch.export logs and warns about along the way; why it fails is in its error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
