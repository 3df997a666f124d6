"""On a CUDA device: every kernel once against the reference, launches of an iteration, graph capture, no hidden sync.

`--small` runs the kernels alone, on sizes that compute-sanitizer gets through.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch

from minexp._ops import (
    KLTarget,
    activation_kl,
    edge_position_topk,
    edge_threshold,
    edge_topk,
    edge_total_topk,
)


def main() -> None:
    """Raise on the first check that fails; print what was found."""
    small = "--small" in sys.argv
    kernels(1 if small else 4)
    if not small:
        launches()
        graph_capture()


def features(batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 64, 28, 28), (batch, 128, 7, 7), (batch, 10)]
    targets = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs = [t + 0.1 * torch.randn(t.shape, generator=generator) for t in targets]
    return [t.cuda() for t in targets], [x.cuda().requires_grad_() for x in inputs]


def kernels(batch: int) -> None:
    """The same arguments on the device and on the CPU."""
    targets, inputs = features(batch)
    for axis in ("all", "spatial", "channel"):
        for cached in (False, True):
            answers = []
            for device in ("cuda", "cpu"):
                first = [t.to(device) for t in targets]
                x = [y.detach().to(device).requires_grad_() for y in inputs]
                loss = (
                    activation_kl(KLTarget(first, axis=axis), x)
                    if cached
                    else activation_kl(first, x, axis=axis)
                )
                answers.append([y.cpu() for y in (loss, *torch.autograd.grad(loss.sum(), x))])
            for got, want in zip(*answers, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    strength, energy = torch.randn(40, 300), torch.randn(batch, 300)
    weight, activation = torch.randn(6, 5, 3, 3), torch.randn(batch, 5, 7, 7)
    for op in (
        lambda d: edge_topk(strength.to(d), energy.to(d), 16),
        lambda d: edge_threshold(strength.to(d), energy.to(d), 1.0),
        lambda d: edge_total_topk(strength.to(d), energy.to(d), 100),
        lambda d: edge_position_topk(weight.to(d), activation.to(d), 2, padding=1),
    ):
        for got, want in zip(op("cuda"), op("cpu"), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    print("kernels: as on the CPU")


def launches() -> None:
    """Forward and backward launch one kernel of ours each; nothing of them waits for the device."""
    targets, inputs = features(8)
    one = torch.ones(8, device="cuda")
    activation_kl(targets, inputs).backward(one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = activation_kl(targets, inputs)
        torch.autograd.grad(loss, inputs, one)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    found = Counter(name.split("<")[0] for name in events)
    print("launches of one iteration:", dict(found))
    ours = [name for name in found.elements() if "kl_forward" in name or "kl_backward" in name]
    others = [name for name in found if "kl_" not in name and "mem" not in name.lower()]
    assert len(ours) == 2 and not others, found


def graph_capture() -> None:
    """A captured iteration replays on new data."""
    targets, inputs = features(8)
    target = KLTarget(targets)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(activation_kl(target, inputs).sum(), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = activation_kl(target, inputs)
        grads = torch.autograd.grad(loss.sum(), inputs)
    with torch.no_grad():
        for x in inputs:
            x.mul_(1.5)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    expected = activation_kl(target, inputs)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(got, want)
    print("graph capture: replays on new data")


if __name__ == "__main__":
    main()
