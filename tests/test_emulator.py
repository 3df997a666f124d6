"""The CUDA kernels, unmodified, on a host emulator: see tests/cpp/emulator.h for what it finds and what it cannot."""

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minexp import _edges, _kl

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(240)


def _build(*targets: str) -> Path:
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # where pip puts cmake and ninja
    for program in ("cmake", "ninja", "c++"):
        if shutil.which(program, path=path) is None:
            pytest.skip(f"{program} is not installed")
    build = ROOT / "build" / "cmake"
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["cmake", "--build", str(build), "--target", *targets]):
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return build


@pytest.fixture(scope="module")
def emulated() -> Any:
    pytest.importorskip("pybind11")
    library = next(_build("minexp_emulated").glob("minexp_emulated*.so"))
    spec = importlib.util.spec_from_file_location("minexp_emulated", library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cores_under_sanitizers() -> None:
    result = subprocess.run([str(_build("cores") / "cores")], capture_output=True, text=True)
    assert result.returncode == 0 and "cores: ok" in result.stdout, result.stderr


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def layer_spec(target, x, grad, axis, weight):
    channels, positions = x.shape[1], x[0, 0].numel()
    rows = {"all": 1, "spatial": channels, "channel": positions}[axis]
    strided = rows > 1 and x.is_contiguous() == (axis == "channel")
    return pointer(target), pointer(x), pointer(grad), rows, channels * positions // rows, strided, weight


def kl(
    emulated,
    targets,
    inputs,
    *,
    axis="all",
    weights=None,
    cached=False,
    piece=None,
    backwards=False,
    aligned=False,
):
    """What the operator gives, through the emulated forward and backward kernels: (total, layers, gradients)."""
    piece = piece or emulated.piece
    temperature = 1.3
    weights = weights or [1.0] * len(inputs)
    images, dtype = len(inputs[0]), inputs[0].dtype
    entropy = None
    if cached:
        target = _kl.KLTarget(targets, temperature=temperature, axis=axis)
        targets, entropy = target.probabilities, target.entropy
    state = torch.full((images, _kl._bounds(inputs, axis)[-1], 4), math.nan, dtype=dtype)
    total, losses = (
        torch.full((images,), math.nan, dtype=dtype),
        torch.full((len(inputs), images), math.nan, dtype=dtype),
    )
    grads = [
        torch.full_like(x, math.nan) if weight else torch.zeros_like(x)
        for x, weight in zip(inputs, weights, strict=True)
    ]
    specs = [
        layer_spec(*layer, axis, weight)
        for *layer, weight in zip(targets, inputs, grads, weights, strict=True)
    ]
    kind = ("cached" if cached else "pair") + ("_double" if dtype == torch.float64 else "")
    shape = specs, images, piece, temperature, aligned
    pointers = pointer(entropy), pointer(state), pointer(total), pointer(losses)
    getattr(emulated, f"forward_{kind}")(*shape, *pointers, backwards)
    outer, inner = (
        torch.linspace(0.5, 2, images, dtype=dtype),
        torch.linspace(-1, 1, len(inputs) * images, dtype=dtype).view(-1, images),
    )
    getattr(emulated, f"backward_{kind}")(*shape, pointer(state), pointer(outer), pointer(inner), backwards)

    arguments = targets, inputs, entropy, weights, temperature, axis
    expected = _kl.activation_kl_reference(*arguments)
    wanted = _kl.activation_kl_backward_reference(
        targets, inputs, cached, expected[2], outer, inner, weights, temperature, axis
    )
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(losses, expected[1], **tolerance, equal_nan=True)
    torch.testing.assert_close(total, expected[0], **tolerance, equal_nan=True)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, **tolerance, equal_nan=True)
    return total, losses, *grads


def features(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("axis", ["all", "spatial", "channel"])
def test_kl_kernels(emulated, axis, cached):
    shapes = [(2, 5, 7, 9), (2, 3), (2, 70, 2), (2, 9, 300), (2, 1, 1)]
    targets, inputs = features(*shapes), features(*shapes, seed=1)
    weights = [1.0, 0.5, 2.0, 0.0, 1.0]
    for aligned in (False, True):
        first, second = (
            kl(
                emulated,
                targets,
                inputs,
                axis=axis,
                weights=weights,
                cached=cached,
                piece=500,
                backwards=order,
                aligned=aligned,
            )
            for order in (False, True)
        )
        assert all(
            torch.equal(a, b) for a, b in zip(first, second, strict=True)
        )  # whatever order threads run in


@pytest.mark.parametrize("cached", [False, True])
def test_many_pieces_of_one_row(emulated, cached):
    shapes = [(1, 40, 33, 31), (1, 16384)]
    targets, inputs = features(*shapes), features(*shapes, seed=1)
    inputs[0][0, 39] += 90.0  # far above the references that the first elements gave
    for aligned in (False, True):
        kl(emulated, targets, inputs, cached=cached, piece=1024, aligned=aligned)


def test_channels_last_and_float64(emulated):
    targets, inputs = (
        features((2, 6, 5, 4), dtype=torch.float64),
        features((2, 6, 5, 4), seed=1, dtype=torch.float64),
    )
    for axis in ("all", "spatial", "channel"):
        kl(emulated, targets, inputs, axis=axis)
        last = [[x.to(memory_format=torch.channels_last) for x in layers] for layers in (targets, inputs)]
        kl(emulated, *last, axis=axis)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("axis", ["all", "spatial", "channel"])
def test_extreme_values(emulated, axis, value):
    targets, inputs = features((2, 4, 50)), features((2, 4, 50), seed=1)
    inputs[0][1, 2, 3] = value
    total, *_ = kl(emulated, targets, inputs, axis=axis, piece=100)
    assert total.isnan().tolist() == [False, abs(value) != 1e4]


def edge_arguments(batch, targets, width, groups, *, ties=False, masks=True, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(targets, width, generator=generator)
    energy = torch.randn(batch, width * groups, generator=generator)
    if ties:
        strength, energy = strength.round(), energy.round()
    gradient = torch.randn(batch, targets, generator=generator).to(dtype)
    source = torch.rand(batch, width * groups, generator=generator) < 0.7
    target = torch.rand(batch, targets, generator=generator) < 0.8
    extra = (gradient, source, target) if masks else (None, None, None)
    return strength.to(dtype), energy.to(dtype), *extra, groups


def rows_spec(strength, energy, gradient, source, target, groups):
    pointers = tuple(map(pointer, (strength, energy, gradient, source, target)))
    return *pointers, len(energy), len(strength), strength.shape[1], energy.shape[1], groups


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 40, 2), (1, 3, 1, 1), (2, 5, 300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_kernel(emulated, shape, ties, dtype):
    arguments = edge_arguments(*shape, ties=ties, dtype=dtype)
    for k, backwards in itertools.product({1, (shape[2] + 2) // 3, shape[2]}, (False, True)):
        values, indices = (torch.full((shape[0], shape[1], k), 99).to(kind) for kind in (dtype, torch.int64))
        op = emulated.topk_double if dtype == torch.float64 else emulated.topk
        op(rows_spec(*arguments), k, pointer(values), pointer(indices), backwards)
        expected = _edges.edge_topk_reference(*arguments[:2], k, *arguments[2:])
        assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize("ties", [False, True])
def test_threshold_and_select_kernels(emulated, ties):
    arguments = edge_arguments(2, 6, 45, 2, ties=ties)
    count = 2 * 6 * 45
    for bound, backwards in itertools.product((0.0, 0.5, 2.0), (False, True)):
        source, values = torch.zeros(count, dtype=torch.int64), torch.zeros(count)
        crow = emulated.threshold(rows_spec(*arguments), bound, pointer(source), pointer(values), backwards)
        expected = _edges.edge_threshold_reference(*arguments[:2], bound, *arguments[2:])
        assert crow == expected[0].tolist()
        assert torch.equal(source[: crow[-1]], expected[1]) and torch.equal(values[: crow[-1]], expected[2])
    for n, backwards in itertools.product((1, 17, 270), (False, True)):
        values, flat = torch.full((2, n), 99.0), torch.full((2, n), 99)
        emulated.select(rows_spec(*arguments), n, pointer(values), pointer(flat), backwards)
        expected = _edges.edge_select_reference(*arguments[:2], n, *arguments[2:])
        assert torch.equal(values, expected[0]) and torch.equal(flat, expected[1])


@pytest.mark.parametrize(
    ("targets", "width", "groups", "kernel", "size", "stride", "padding", "dilation"),
    [
        (6, 5, 1, (3, 3), (7, 6), (1, 1), (1, 1), (1, 1)),
        (10, 3, 2, (1, 2), (4, 9), (2, 1), (0, 2), (1, 3)),
        (
            18,
            9,
            1,
            (5, 5),
            (9, 11),
            (1, 1),
            (2, 2),
            (1, 1),
        ),  # more targets, taps and positions than one turn takes
    ],
)
def test_position_kernel(emulated, targets, width, groups, kernel, size, stride, padding, dilation):
    weight, activation = features((targets, width, *kernel), (2, width * groups, *size))
    masks = edge_arguments(2, targets, width, groups)[2:]
    k = 2
    values, indices = torch.full((2, targets, k), 99.0), torch.full((2, targets, k), 99)
    spec = rows_spec(weight.flatten(1), activation.flatten(2)[:, :, 0].contiguous(), *masks)
    spec = (pointer(weight), pointer(activation), *spec[2:7], width, *spec[8:])
    numbers = [*kernel, *size, *stride, *padding, *dilation]
    expected = _edges.edge_position_topk_reference(weight, activation, k, stride, padding, dilation, *masks)
    for op, backwards in itertools.product((emulated.position, emulated.position_few), (False, True)):
        op(spec, numbers, k, pointer(values), pointer(indices), backwards)
        torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(indices, expected[1])


def test_the_emulator_catches_what_it_should(emulated):
    with pytest.raises(RuntimeError, match="past its shared memory"):
        emulated.overflow()
    with pytest.raises(RuntimeError, match="not every thread reaches"):
        emulated.deadlock()
    out = torch.zeros(64, dtype=torch.float64)
    emulated.race(pointer(out))
    assert out.isnan().any()  # read before it was written: the poison


def test_cuda_sources_compile_without_spills():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    ninja = (build := _build("minexp_emulated")) / "build.ninja"
    if "build ptx:" not in ninja.read_text():
        pytest.skip("this build of the project has no nvcc")
    assert _build("ptx") == build
