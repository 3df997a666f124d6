"""Paths from the image to the scores, on graphs small enough to follow by eye."""

import torch
from torch import Tensor, nn

from minexp.tracing import Trace, trace


class Wired(nn.Module):
    """Two blocks, the second with a skip around its inner layer; a branch whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.aside = nn.Conv2d(4, 4, 1)
        self.inner = nn.Conv2d(4, 4, 1)
        self.last = nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.aside(x)
        x = self.last(x + self.inner(x))
        x = self.last(x * 2)
        return self.head(x.mean((2, 3)))


def traced(model: nn.Module) -> Trace:
    return trace(model, torch.rand(2, 3, 4, 4), model, lambda output: output)


def names(found: Trace, nodes: object) -> list[str]:
    return [f"{r.name}@{r.call}" for r in found.records if r.node in nodes]  # type: ignore[operator]


def test_waypoints_are_what_no_path_goes_around() -> None:
    found = traced(Wired())
    assert names(found, found.waypoints) == ["first@1", "last@1", "last@2", "head@1"]
    assert names(found, found.path) == ["first@1", "inner@1", "last@1", "last@2", "head@1"]
    assert [record.shape for record in found.records][-1] == (2, 2)
    assert found.calls == {"first": 1, "aside": 1, "inner": 1, "last": 2, "head": 1}
    order = [found.waypoints[r.node] for r in found.records if r.node in found.waypoints]
    assert order == sorted(order)


def test_a_skip_from_the_image_itself_leaves_no_waypoint_in_between() -> None:
    class Skip(Wired):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean((2, 3))[:, :2]

    found = traced(Skip())
    assert names(found, found.waypoints) == []
    assert "inner@1" in names(found, found.path)


def test_a_model_without_gradients_has_no_path() -> None:
    class Cut(Wired):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    found = traced(Cut())
    assert not found.path and not found.waypoints and len(found.records) == 6


def test_no_activation_is_kept_and_the_model_is_as_it_was() -> None:
    model = Wired()
    alive = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        import weakref

        alive.append(weakref.ref(output))

    handle = model.first.register_forward_hook(watch)
    found = traced(model)
    handle.remove()
    assert found.path and alive[0]() is None
    assert not any(module._forward_hooks for module in model.modules())
