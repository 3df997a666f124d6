"""The operators under pytest-benchmark, over the whole grid.

    pytest bench --benchmark-enable --benchmark-group-by=group [--benchmark-json=FILE]

Without --benchmark-enable (in CI) a small part of the grid runs once and only its results are checked. The bound of
the same run is in each benchmark's extra_info.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from minexp._ops import KLTarget, activation_kl, edge_position_topk, edge_topk

pytestmark = pytest.mark.benchmark(disable_gc=True)
POSITIONS = [(512, 512, 7), (256, 256, 14)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The whole grid where times are measured, its smallest part where only results are checked."""
    small = metafunc.config.getoption("benchmark_disable") or not metafunc.config.getoption(
        "benchmark_enable"
    )
    grids: dict[str, list[Any]] = {
        "network": ["resnet18"] if small else list(kernels.NETWORKS),
        "batch": [1, 8] if small else [1, 8, 32, 64],
        "threads": [1] if small else [1, 2],
        "edges": [(128, 512, 16), (256, 256, 16)] if small else kernels.EDGES,
        "positions": [(64, 64, 7)] if small else POSITIONS,
    }
    for name, values in grids.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=str)


@pytest.fixture
def timed(benchmark: Any, threads: int) -> Iterator[Any]:
    """The benchmark with that many threads, on the thread's own clock where it is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    benchmark._timer = time.thread_time if threads == 1 else time.perf_counter
    yield benchmark
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", ["eager", "eager cached", "minexp", "minexp cached"])
def test_activation_kl(timed: Any, network: str, batch: int, threads: int, provider: str) -> None:
    timed.group = f"activation_kl {network} B={batch}, {threads} thread(s)"
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(batch, *shape, generator=generator) for shape in kernels.NETWORKS[network]]
    inputs = [(t + 0.1 * torch.randn(t.shape, generator=generator)).requires_grad_() for t in targets]
    target = KLTarget(targets)
    entropy = target.entropy[..., 0].sum(1).float()
    losses: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: kernels.eager(targets, inputs),
        "eager cached": lambda: kernels.cached_form(target.probabilities, entropy, inputs),
        "minexp": lambda: activation_kl(targets, inputs),
        "minexp cached": lambda: activation_kl(target, inputs),
    }

    def run() -> tuple[Tensor, ...]:
        value = losses[provider]()
        return value, *torch.autograd.grad(value.sum(), inputs)

    out = [torch.empty_like(t) for t in targets]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for t, x, o in zip(targets, inputs, out, strict=True):
            torch.add(t, x.detach(), alpha=2.0, out=o)
        times.append(time.perf_counter() - started)
    timed.extra_info |= {
        "bytes": 12 * sum(t.numel() for t in targets),
        "triad_seconds": statistics.median(times),
    }
    got = timed(run)
    value = kernels.eager(targets, inputs)
    for actual, expected in zip(got, (value, *torch.autograd.grad(value.sum(), inputs)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("provider", ["eager", "minexp"])
def test_edge_topk(timed: Any, edges: tuple[int, int, int], batch: int, threads: int, provider: str) -> None:
    targets, sources, k = edges
    timed.group = f"edge_topk {targets}x{sources} k={k} B={batch}, {threads} thread(s)"
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(targets, sources, generator=generator)
    energy = torch.rand(batch, sources, generator=generator)
    calls: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: torch.topk(strength * energy.unsqueeze(1), k, dim=2).values,
        "minexp": lambda: edge_topk(strength, energy, k)[0],
    }
    assert torch.equal(timed(calls[provider]), calls["eager"]())


@pytest.mark.parametrize("provider", ["eager", "minexp"])
def test_edge_position_topk(timed: Any, positions: tuple[int, int, int], threads: int, provider: str) -> None:
    targets, sources, size = positions
    timed.group = f"edge_position_topk {targets}x{sources} {size}x{size} k=16 B=2, {threads} thread(s)"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(targets, sources, 3, 3, generator=generator)
    x = torch.rand(2, sources, size, size, generator=generator)
    calls: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: kernels.naive_positions(weight, x, 16),
        "minexp": lambda: edge_position_topk(weight, x, 16, padding=1)[0],
    }
    torch.testing.assert_close(timed(calls[provider]), calls["eager"](), rtol=1e-4, atol=1e-4)


def test_the_runner_measures_checks_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NETWORKS", {"resnet18": [(4, 6, 6)]})
    rows = kernels.kl_case("resnet18", 2, 1, torch.device("cpu"), compiled=False)
    rows += kernels.edge_case(8, 32, 4, batch=2, threads=1, device=torch.device("cpu"))
    kernels._write(rows, torch.device("cpu"), tmp_path)
    written = (tmp_path / "kernels-cpu.csv").read_text().splitlines()
    assert written[0].split(",") == list(kernels.COLUMNS) and len(written) == 1 + len(rows)
    assert all(row["p20"] <= row["p50"] <= row["p80"] and row["peak"] > 0 for row in rows)
