"""The operators against PyTorch: eager, compiled, the best formulation of it, and the bound of the same run.

    minexp bench kernels                        the main shapes on this machine (CPU, or CUDA where torch sees one)
    python bench/kernels.py --full --out DIR    the whole grid: networks, batches, one and two threads

Writes kernels-DEVICE.csv and .png to bench/results. Providers take turns within a round, so that what else the
machine does meets all alike; one-thread times are the thread's own. On a GPU, "fwd+bwd" is a captured graph replayed,
the device's time alone, and "launched" is the same call from Python. Freed memory is kept by the process, for all
providers: otherwise the system's page faults are most of what is measured. `bound` of activation_kl is a triad over
the same tensors (PyTorch's add with alpha, 12 bytes an element, into memory that is there already), of the edge
operators nothing; `ratio` is p50 / bound, `speedup` that over the eager form, `bandwidth` the 20 bytes an element
that a forward and a backward move, per second and as a share of a copy's, `peak` the bytes that one call holds at
most. Every result is compared with the eager one before it is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, is quiet

import torch
from rows import COLUMNS as ROWS
from rows import table, write_csv
from torch import Tensor
from torch.nn import functional

from minexp import _edges, _kl
from minexp._ops import KLTarget, activation_kl, edge_position_topk, edge_topk, kernel_status

RESULTS = Path(__file__).parent / "results"
NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "resnet18": [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)],
    "resnet50": [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)],
    "vit_b": [(768, 197)] * 4,
}
EDGES = [(512, 512, 16), (1024, 256, 16), (2048, 512, 16), (2048, 512, 32)]
COLUMNS = (*ROWS, "peak", "device", "versions")
Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


def measure(quiet: bool, *, full: bool = False, out: Path = RESULTS) -> list[Row]:
    """Rows for `minexp bench kernels`; the CSV and the plot are written on the way."""
    rows: list[Row] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _keep_freed_memory()
    threads = torch.get_num_threads()
    try:
        for case in cases(full, device):
            started = time.perf_counter()
            with _stream(device):
                rows += case()
            if not quiet and sys.stderr.isatty():
                print(
                    f"{rows[-1]['op']} {rows[-1]['shape']}: {time.perf_counter() - started:.0f} s",
                    file=sys.stderr,
                )
    finally:
        torch.set_num_threads(threads)
    _write(rows, device, out)
    return rows


def _stream(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU a stream of its own: what runs on the default one cannot be captured."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def cases(full: bool, device: torch.device) -> Iterator[Callable[[], list[Row]]]:
    """The grid, one case after another."""
    networks, batches = (list(NETWORKS), [1, 8, 32, 64]) if full else (["resnet18"], [8, 32])
    if device.type == "cuda":
        batches = [8, 64]
    for threads in (1, 2) if device.type == "cpu" else (1,):
        for network in networks:
            for batch in batches:
                compiled = network == "resnet18" and batch >= 32 and threads == 1
                yield partial(kl_case, network, batch, threads, device, compiled=compiled)
        for shape in EDGES if threads == 1 or full else EDGES[:1]:
            yield partial(edge_case, *shape, batch=64, threads=threads, device=device)
    yield partial(position_case, 512, 512, 7, batch=64, device=device)
    yield partial(fit_case, device)


# ---- activation_kl -----------------------------------------------------------------------------------------------


def eager(targets: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The usual way: kl_div of log_softmax against softmax."""
    losses = [
        functional.kl_div(
            torch.log_softmax(x.flatten(1), 1), torch.softmax(t.flatten(1), 1), reduction="none"
        ).sum(1)
        for t, x in zip(targets, inputs, strict=True)
    ]
    return torch.stack(losses).sum(0)


def cached_form(p: Sequence[Tensor], entropy: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The best PyTorch formulation: KL = H - sum p b + lse(b), p and H computed once."""
    losses = [
        torch.logsumexp(x.flatten(1), 1) - (q.flatten(1) * x.flatten(1)).sum(1)
        for q, x in zip(p, inputs, strict=True)
    ]
    return entropy + torch.stack(losses).sum(0)


def kl_case(network: str, batch: int, threads: int, device: torch.device, *, compiled: bool) -> list[Row]:
    """Forward and backward of all stages of a network, beside the triad."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(batch, *shape, generator=generator).to(device) for shape in NETWORKS[network]]
    inputs = [
        (t + 0.1 * torch.randn(t.shape, generator=generator).to(device)).requires_grad_() for t in targets
    ]
    target = KLTarget(targets)
    p, entropy = target.probabilities, target.entropy[..., 0].sum(1).float()

    def both(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            value = loss()
            return value, *torch.autograd.grad(value.sum(), inputs)

        return run

    calls: Calls = {
        "eager": both(lambda: eager(targets, inputs)),
        "eager cached": both(lambda: cached_form(p, entropy, inputs)),
        "minexp": both(lambda: activation_kl(targets, inputs)),
        "minexp cached": both(lambda: activation_kl(target, inputs)),
    }
    if compiled:
        fast, fast_cached = torch.compile(eager, dynamic=False), torch.compile(cached_form, dynamic=False)
        calls["compile"] = both(lambda: fast(targets, inputs))
        calls["compile cached"] = both(lambda: fast_cached(p, entropy, inputs))
    expected = calls["eager"]()
    for name, call in calls.items():
        for got, want in zip(call(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-5, msg=f"{name} differs from eager")
    out = [torch.empty_like(t) for t in targets]

    def triad() -> None:
        for t, x, o in zip(targets, inputs, out, strict=True):
            torch.add(t, x.detach(), alpha=2.0, out=o)

    def copy() -> None:
        for t, o in zip(targets, out, strict=True):
            o.copy_(t)

    shape = f"{network} B={batch}"
    bytes_moved = 4 * sum(t.numel() for t in targets)
    rows = []
    for mode in ("fwd+bwd", "launched") if device.type == "cuda" else ("fwd+bwd",):
        timed: Calls = calls | {"triad": triad, "copy": copy}
        times = _interleaved(timed, device, threads, captured=mode == "fwd+bwd")
        bound, copied = (statistics.median(times.pop(name)) for name in ("triad", "copy"))
        for name in calls:
            peak = _peak(calls[name], device)
            row = _row("activation_kl", name, mode, shape, threads, times, bound=bound, peak=peak)
            row["bandwidth"] = 5 * bytes_moved / row["p50"] / (2 * bytes_moved / copied)
            rows.append(row)
    return rows


# ---- edges -------------------------------------------------------------------------------------------------------


def edge_case(
    targets: int, sources: int, k: int, *, batch: int, threads: int, device: torch.device
) -> list[Row]:
    """The k strongest sources of each target, against topk of the dense product."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(targets, sources, generator=generator).to(device)
    energy = torch.rand(batch, sources, generator=generator).to(device)
    calls: Calls = {
        "eager": lambda: torch.topk(strength * energy.unsqueeze(1), k, dim=2),
        "minexp": lambda: edge_topk(strength, energy, k),
    }
    assert torch.equal(calls["minexp"]()[0], calls["eager"]().values)
    times = _interleaved(calls, device, threads)
    shape = f"{targets}x{sources} k={k} B={batch}"
    return [
        _row("edge_topk", name, "fwd", shape, threads, times, peak=_peak(calls[name], device))
        for name in calls
    ]


def naive_positions(weight: Tensor, x: Tensor, k: int) -> Tensor:
    """The grouped convolution that holds [B, I, O, H, W], and topk of its sums: values [B, O, k]; 3×3, padded by 1."""
    targets, sources = weight.shape[:2]
    kernels = weight.transpose(0, 1).reshape(-1, 1, *weight.shape[2:])
    added = functional.conv2d(x, kernels, padding=1, groups=sources)
    return torch.topk(added.view(len(x), sources, targets, -1).abs().sum(-1).transpose(1, 2), k, dim=2).values


def position_case(targets: int, sources: int, size: int, *, batch: int, device: torch.device) -> list[Row]:
    """Sums over positions of |W x|, against the form that holds them all."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(targets, sources, 3, 3, generator=generator).to(device)
    x = torch.rand(batch, sources, size, size, generator=generator).to(device)
    calls: Calls = {
        "eager": lambda: naive_positions(weight, x, 16),
        "minexp": lambda: edge_position_topk(weight, x, 16, padding=1)[0],
    }
    torch.testing.assert_close(calls["minexp"](), calls["eager"](), rtol=1e-4, atol=1e-4)
    times = _interleaved(calls, device, 1, rounds=3)
    shape = f"{targets}x{sources} {size}x{size} k=16 B={batch}"
    return [
        _row("edge_position_topk", name, "fwd", shape, 1, times, peak=_peak(calls[name], device))
        for name in calls
    ]


# ---- the training step -------------------------------------------------------------------------------------------


@contextmanager
def reference_bodies(device: torch.device) -> Iterator[None]:
    """The operators without their kernels."""
    bodies = {
        "activation_kl": _kl.activation_kl_reference,
        "activation_kl_gradients": _kl.activation_kl_gradients_reference,
        "activation_kl_backward": _kl.activation_kl_backward_reference,
        "edge_topk": _edges.edge_topk_reference,
    }
    with torch.library._scoped_library("minexp", "IMPL") as library:
        for name, body in bodies.items():
            library.impl(name, body, device.type.upper(), allow_override=True)
        yield


def fit_case(device: torch.device) -> list[Row]:
    """A step of `fit` on the built-in scenes' classifier, and the share of it that activation matching takes."""
    from minexp.classifier import Classifier
    from minexp.data.subjects import SceneNet
    from minexp.training import fit

    torch.set_num_threads(2)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8)
    classifier = Classifier(SceneNet(10).to(device), size=64)
    steps, batch = 6, 64
    features = [f.detach() for f in classifier.features(images[:batch].to(device).float() / 255)[1]]
    inputs = [(f + 0.1 * torch.randn_like(f)).requires_grad_() for f in features]

    def step() -> None:
        fit(classifier, images, steps=steps, batch=batch, progress=False)

    def loss() -> None:
        for _ in range(steps):
            torch.autograd.grad(activation_kl(features, inputs).sum(), inputs)

    def plainly(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with reference_bodies(device):
                call()

        return run

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps leave the masks as they began
        calls: Calls = {"step reference": plainly(step), "step minexp": step}
        calls |= {"loss reference": plainly(loss), "loss minexp": loss}
        times = _interleaved(calls, device, 2, rounds=7, captured=False)
    times = {name: [t / steps for t in measured] for name, measured in times.items()}
    rows = []
    for mode in ("step", "loss"):
        part = {"eager": times[f"{mode} reference"], "minexp": times[f"{mode} minexp"]}
        rows += [_row(f"fit {mode}", name, "fwd+bwd", f"scenes 64x64 B={batch}", 2, part) for name in part]
        for row in rows[-2:]:
            row["provider"] = "reference" if row["provider"] == "eager" else "minexp"
    return rows


# ---- measuring ---------------------------------------------------------------------------------------------------


def _interleaved(
    calls: Calls, device: torch.device, threads: int, rounds: int = 15, *, captured: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after two to warm up; on a GPU, `captured` ones are graphs."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    if device.type == "cuda":
        runs = {name: _captured(call) if captured else call for name, call in calls.items()}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clock = time.thread_time if threads == 1 else time.perf_counter
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                start.record()
                runs[name]()
                end.record()
                end.synchronize()
                spent = start.elapsed_time(end)
            else:
                started = clock()
                call()
                spent = (clock() - started) * 1000
            if round_ >= 2:
                times[name].append(spent)
    return times


def _captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def _row(
    op: str,
    name: str,
    mode: str,
    shape: str,
    threads: int,
    times: dict[str, list[float]],
    *,
    bound: float | None = None,
    peak: int | None = None,
) -> Row:
    low, *_, high = statistics.quantiles(times[name], n=5)
    middle = statistics.median(times[name])
    row = {"op": op, "provider": name, "mode": mode, "shape": shape, "threads": threads}
    row |= {"p20": low, "p50": middle, "p80": high, "bound": bound, "ratio": bound and middle / bound}
    return row | {"speedup": statistics.median(times["eager"]) / middle, "peak": peak}


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors that exist at once during a call, results included, arguments not."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = call()
    del kept
    now = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _keep_freed_memory() -> None:
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most it takes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{len(names)}{' AVX-512' if 'avx512f' in info else ''}"


def _write(rows: list[Row], device: torch.device, out: Path) -> None:
    name = _device_name(device)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    kernels = kernel_status()
    if not kernels[device.type]:
        versions += f", no kernels: {kernels['why'][device.type]}"
    stem = out / f"kernels-{device.type}"
    for row in rows:
        row |= {"device": name, "versions": versions}
    write_csv(rows, stem, COLUMNS)
    _plot(rows, device.type, stem.with_suffix(".png"))


def _plot(rows: list[Row], device: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = [r for r in rows if r["threads"] == 1 and r["provider"] != "eager" and r["mode"] != "launched"]
    figure = Figure(figsize=(9, 1 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['op']} {row['shape']}: {row['provider']}" for row in shown]
    colours = ["tab:blue" if "minexp" in row["provider"] else "tab:gray" for row in shown]
    axes.barh(labels, [row["speedup"] for row in shown], color=colours)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    where = "one thread" if device == "cpu" else "captured graphs"
    axes.set_xlabel(f"times as fast as eager PyTorch ({where})\n{rows[0]['device']}; {rows[0]['versions']}")
    figure.savefig(path, dpi=120)


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the whole grid")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV and the plot go")
    options = parser.parse_args()
    print(table(measure(False, full=options.full, out=options.out)))


if __name__ == "__main__":
    _main()
