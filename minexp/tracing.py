"""One forward pass watched: what every module gives, and which outputs the decision passes through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Node = Any  # a node of the autograd graph


@dataclass(frozen=True)
class Record:
    """One call of a module: which (counted from 1), the shape of its output, and where that is in the graph."""

    name: str
    call: int
    shape: tuple[int, ...]
    node: Node


@dataclass(frozen=True)
class Trace:
    """A forward pass. records: every call that gave a tensor, in the order of their ends. calls: how many a module.

    path: graph nodes from the image to the scores. waypoints: those that every path passes, in order.
    """

    output: Any
    records: tuple[Record, ...]
    calls: dict[str, int]
    path: frozenset[Node]
    waypoints: dict[Node, int]


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of interest in what a module returned (a tensor, a tuple, a mapping or an output object)."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    return None


@contextmanager
def hooked(model: nn.Module, names: Sequence[str], hook: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `hook(name, output)` after each named module; every hook is gone afterwards, whatever happened."""
    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(
                module.register_forward_hook(lambda _module, _input, output, name=name: hook(name, output))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], Any], scores: Callable[[Any], Tensor]
) -> Trace:
    """`run` a forward pass of the model on an image batch x with every module hooked; no activation is kept.

    scores: the decision [B, K] in the model's output; paths from x to it are followed through the autograd graph.
    """
    records: list[Record] = []
    calls: dict[str, int] = defaultdict(int)

    def keep(name: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            calls[name] += 1
            records.append(Record(name, calls[name], tuple(tensor.shape), tensor.grad_fn))

    x = x.detach().requires_grad_()
    names = [name for name, _ in model.named_modules() if name]
    # Only the graph's shape is wanted: what its nodes would save for a backward pass is dropped at once.
    dropped = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda tensor: tensor)
    with torch.enable_grad(), dropped, hooked(model, names, keep):
        output = run(x)
        path = _path(scores(output).grad_fn, x)
    return Trace(output, tuple(records), dict(calls), frozenset(path), _waypoints(path))


def _path(end: Node, x: Tensor) -> list[Node]:
    """Nodes on the paths from the leaf x to `end`, each before those it is computed from."""
    if end is None:
        return []
    reaches: dict[Node, bool] = {}
    order: list[Node] = []
    stack = [(end, False)]
    while stack:
        node, done = stack.pop()
        if done:
            inputs = [source for source, _ in node.next_functions if source is not None]
            reaches[node] = getattr(node, "variable", None) is x or any(reaches[source] for source in inputs)
            order.append(node)
        elif node not in reaches:
            reaches[node] = False
            stack.append((node, True))
            stack += [(source, False) for source, _ in node.next_functions if source is not None]
    return [node for node in reversed(order) if reaches[node]]


def _waypoints(path: Sequence[Node]) -> dict[Node, int]:
    """The nodes that no edge jumps over, numbered from the image to the scores."""
    place = {node: index for index, node in enumerate(path)}
    furthest, found = 0, []
    for index, node in enumerate(path):
        if furthest <= index:
            found.append(node)
        sources = (place[source] for source, _ in node.next_functions if source in place)
        furthest = max([furthest, *sources])
    return {node: index for index, node in enumerate(reversed(found))}
