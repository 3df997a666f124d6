"""The operators under pytest-benchmark; without `--benchmark-enable` each runs once and is only checked.

pytest tests/test_bench_kernels.py --benchmark-enable --benchmark-group-by=group
"""

import sys
import time
from pathlib import Path

import pytest
import torch

from minexp import KLTarget, activation_kl, edge_topk
from minexp._ops import edge_position_topk

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import kernels

pytestmark = pytest.mark.benchmark(timer=time.thread_time, disable_gc=True)
BATCHES = (1, 8)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", ["eager", "eager cached", "minexp", "minexp cached"])
@pytest.mark.parametrize("batch", BATCHES)
def test_activation_kl(benchmark, batch, provider):
    benchmark.group = f"activation_kl resnet18 B={batch}, 1 thread"
    shapes = kernels.NETWORKS["resnet18"]
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    inputs = [(t + 0.1 * torch.randn(t.shape, generator=generator)).requires_grad_() for t in targets]
    target = KLTarget(targets)
    loss = {
        "eager": lambda: kernels.eager(targets, inputs),
        "eager cached": lambda: kernels.cached_form(
            target.probabilities, target.entropy[..., 0].sum(1).float(), inputs
        ),
        "minexp": lambda: activation_kl(targets, inputs),
        "minexp cached": lambda: activation_kl(target, inputs),
    }[provider]

    def run():
        value = loss()
        return value, *torch.autograd.grad(value.sum(), inputs)

    elements = sum(t.numel() for t in targets)
    a, b, out = (torch.zeros(elements) for _ in range(3))
    started = time.thread_time()
    torch.add(a, b, alpha=2.0, out=out)
    benchmark.extra_info |= {"bytes": 12 * elements, "triad_seconds": time.thread_time() - started}
    got = benchmark(run)
    value = kernels.eager(targets, inputs)
    for actual, expected in zip(got, (value, *torch.autograd.grad(value.sum(), inputs)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("provider", ["eager", "minexp"])
@pytest.mark.parametrize(("targets", "sources", "k"), [(128, 512, 16), (256, 256, 16)])
def test_edge_topk(benchmark, targets, sources, k, provider):
    benchmark.group = f"edge_topk {targets}x{sources} k={k} B=8, 1 thread"
    generator = torch.Generator().manual_seed(0)
    strength, energy = (
        torch.rand(targets, sources, generator=generator),
        torch.rand(8, sources, generator=generator),
    )
    expected = torch.topk(strength * energy.unsqueeze(1), k, dim=2).values
    call = {
        "eager": lambda: torch.topk(strength * energy.unsqueeze(1), k, dim=2)[0],
        "minexp": lambda: edge_topk(strength, energy, k)[0],
    }[provider]
    assert torch.equal(benchmark(call), expected)


def test_edge_position_topk(benchmark):
    benchmark.group = "edge_position_topk 64x64 7x7 k=8 B=2, 1 thread"
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, 3, 3, generator=generator), torch.rand(2, 64, 7, 7, generator=generator)
    values, indices = benchmark(lambda: edge_position_topk(weight, x, 8, padding=1))
    assert values.shape == indices.shape == (2, 64, 8) and (values.diff(dim=2) <= 0).all()


def test_the_runner_measures_checks_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "NETWORKS", {"resnet18": [(4, 6, 6)]})
    rows = kernels.kl_case("resnet18", 2, 1, torch.device("cpu"), compiled=False)
    rows += kernels.edge_case(8, 32, 4, batch=2, threads=1, device=torch.device("cpu"))
    kernels._write(rows, torch.device("cpu"), tmp_path)
    written = (tmp_path / "kernels-cpu.csv").read_text().splitlines()
    assert written[0].split(",") == kernels.COLUMNS and len(written) == 1 + len(rows)
    assert all(row["p20"] <= row["p50"] <= row["p80"] and row["peak"] > 0 for row in rows)
