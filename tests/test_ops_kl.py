import itertools
import math
from contextlib import nullcontext
from unittest.mock import patch

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from minexp import KLTarget, RequestError, _kl, activation_kl

pytest_plugins = ["ops_bodies"]
AXES = ["all", "spatial", "channel"]
SHAPES = [(3, 5, 6, 7), (3, 4), (3, 8, 1, 1), (3, 1, 9), (3, 70, 5)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def slow(targets, inputs, *, weights=None, temperature=1.0, axis="all"):
    """The definition, row by row in float64, with its gradient: ([L, B], one gradient a layer)."""
    weights = weights or [1.0] * len(inputs)
    losses = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.float64)
    grads = []
    for layer, (target, x) in enumerate(zip(targets, inputs, strict=True)):
        grad = torch.zeros(x.shape, dtype=torch.float64)
        for image in range(len(x)):
            t, i = (y[image].detach().cpu().double().reshape(y.shape[1], -1) for y in (target, x))
            g = torch.zeros_like(i)
            channels, positions = i.shape
            rows = {
                "all": [(slice(None), slice(None))],
                "spatial": [(c, slice(None)) for c in range(channels)],
                "channel": [(slice(None), p) for p in range(positions)],
            }[axis]
            for row in rows:
                p = torch.log_softmax(t[row].flatten() / temperature, 0)
                q = torch.log_softmax(i[row].flatten() / temperature, 0)
                losses[layer, image] += (p.exp() * (p - q)).sum() / len(rows)
                g[row] = ((q.exp() - p.exp()) / temperature / len(rows)).view(g[row].shape)
            grad[image] = weights[layer] * g.view(grad[image].shape)
        grads.append(grad)
    return losses, grads


def draw(shapes, *, dtype=torch.float32, device="cpu", seed=0, spread=3.0, noise=None):
    generator = torch.Generator().manual_seed(seed)
    targets = [spread * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if noise is None:
        inputs = [spread * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    else:
        inputs = [t + noise * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in targets]
    return tuple(
        [x.to(dtype).to(device).requires_grad_(grad) for x in layers]
        for layers, grad in ((targets, False), (inputs, True))
    )


def check(targets, inputs, *, cached=False, weights=None, **options):
    dtype = inputs[0].dtype
    expected, gradients = slow(targets, inputs, weights=weights, **options)
    total_expected = (
        torch.tensor(weights or [1.0] * len(inputs), dtype=torch.float64)[:, None] * expected
    ).sum(0)
    first = KLTarget(targets, **options) if cached else targets
    options = {} if cached else options
    for fused in (True, False):
        with nullcontext() if fused else patch.object(_kl, "_fuses", return_value=False):
            total, layers = activation_kl(first, inputs, weights=weights, per_layer=True, **options)
            grads = torch.autograd.grad(total.sum(), inputs)
        assert total.dtype == layers.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(layers.cpu().double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            total.cpu().double(), total_expected, rtol=tolerance, atol=len(inputs) * tolerance
        )
        for x, got, want in zip(inputs, grads, gradients, strict=True):
            assert got.dtype == dtype and got.shape == x.shape
            scale = want.abs().max().item() if want.numel() else 0.0
            coarse = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
            temperature = first.temperature if cached else options.get("temperature", 1.0)
            rounding = (1e-14 if dtype == torch.float64 else 4e-6) / min(
                1.0, temperature
            )  # of two softmax values
            torch.testing.assert_close(
                got.cpu().double(),
                want,
                rtol=coarse + tolerance,
                atol=tolerance * scale + max(weights or [1]) * rounding,
            )


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_the_definition(device, dtype, axis, cached):
    targets, inputs = draw(SHAPES, dtype=dtype, device=device)
    check(targets, inputs, axis=axis, temperature=1.7, weights=[1.0, 0.5, 2.0, 3.0, 0.25], cached=cached)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_long_rows_cross_every_tile_border(device, axis, cached):
    targets, inputs = draw([(2, 33, 19, 29), (2, 5, 1), (2, 1100, 3)], device=device, spread=1.0)
    check(targets, inputs, axis=axis, cached=cached)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "layout", ["channels_last", "tokens", "target_differs", "sliced", "expanded", "transposed"]
)
def test_any_memory_format(device, axis, layout):
    targets, inputs = draw([(3, 6, 4, 5)], device=device)
    (target,), (x,) = targets, [x.detach() for x in inputs]
    if layout == "channels_last":
        target, x = (y.to(memory_format=torch.channels_last) for y in (target, x))
    elif layout == "tokens":
        target, x = (y.flatten(2).transpose(1, 2).contiguous().transpose(1, 2) for y in (target, x))
    elif layout == "target_differs":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        target, x = (torch.cat([y, y], 3)[:, 1:5, :, 2:7] for y in (target, x))
    elif layout == "expanded":
        x = x[:1, :, :, :1].expand(3, 6, 4, 5)
    elif layout == "transposed":
        target, x = (y.transpose(0, 3).transpose(1, 2) for y in (target, x))
    for cached in (False, True):
        check(
            [target],
            [x.clone(memory_format=torch.preserve_format).requires_grad_()],
            axis=axis,
            cached=cached,
        )
        check([target], [x.requires_grad_()], axis=axis, cached=cached)


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    batch=st.integers(0, 3),
    axis=st.sampled_from(AXES),
    dtype=st.sampled_from(list(TOLERANCE)),
    temperature=st.floats(0.3, 4.0),
    cached=st.booleans(),
    inner=st.booleans(),
    seed=st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_shape(device, shapes, batch, axis, dtype, temperature, cached, inner, seed):
    targets, inputs = draw([(batch, *shape) for shape in shapes], dtype=dtype, device=device, seed=seed)
    if inner:
        inputs = [x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_() for x in inputs]
    check(targets, inputs, axis=axis, temperature=temperature, cached=cached)


def test_a_hundred_layers(device):
    targets, inputs = draw([(2, 1 + layer % 7, 1 + layer % 3) for layer in range(100)], device=device)
    check(targets, inputs, weights=[1 / (1 + layer) for layer in range(100)])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_gradcheck(device, axis, cached):
    targets, inputs = draw([(2, 3, 2, 2), (2, 4)], dtype=torch.float64, device=device, spread=1.0)
    first = KLTarget(targets, temperature=1.3, axis=axis) if cached else targets
    options = {} if cached else {"temperature": 1.3, "axis": axis}

    def both(*layers: Tensor) -> tuple[Tensor, Tensor]:
        return activation_kl(first, layers, weights=[0.7, 2.0], per_layer=True, **options)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("cached", [False, True])
def test_opcheck(device, cached):
    targets, inputs = draw([(2, 3, 4), (2, 5)], device=device)
    target = KLTarget(targets)
    first, entropy = (target.probabilities, target.entropy) if cached else (targets, None)
    options = [1.0, 0.5], 1.0, "all"
    torch.library.opcheck(torch.ops.minexp.activation_kl, (first, inputs, entropy, *options))
    plain = [x.detach() for x in inputs]
    total, layers, state = torch.ops.minexp.activation_kl(first, plain, entropy, *options)
    arguments = first, plain, cached, state, torch.ones_like(total), torch.ones_like(layers), *options
    torch.library.opcheck(torch.ops.minexp.activation_kl_backward, arguments)
    torch.library.opcheck(torch.ops.minexp.activation_kl_gradients, (first, plain, entropy, *options))


@pytest.mark.parametrize("cached", [False, True])
def test_compiles_without_graph_breaks(device, cached):
    targets, inputs = draw([(2, 3, 4, 4), (2, 5)], device=device)
    target = KLTarget(targets) if cached else None

    def loss(targets: list[Tensor], inputs: list[Tensor]) -> Tensor:
        scaled = [2 * x for x in inputs]
        return activation_kl(target or targets, scaled, weights=[1.0, 3.0]).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(targets, inputs), loss(targets, inputs))
    expected = torch.autograd.grad(loss(targets, inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(targets, inputs), inputs), expected)


@pytest.mark.parametrize("axis", AXES)
def test_equal_features_lose_nothing(device, axis):
    targets, _ = draw([(2, 30, 17), (2, 5000)], device=device, spread=10.0)
    inputs = [t.clone().requires_grad_() for t in targets]
    loss = activation_kl(targets, inputs, axis=axis)
    assert (loss == 0).all()
    for t, grad in zip(targets, torch.autograd.grad(loss.sum(), inputs), strict=True):
        softmax = (
            t.flatten(1).softmax(1).view(t.shape) if axis == "all" else 1
        )  # the gradient is a rounding of it
        assert (grad.abs() <= 2**-22 * softmax).all()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_one_hot_and_huge_logits(device, scale, cached):
    target, x = torch.zeros(2, 3000), torch.zeros(2, 3000)
    target[:, 7], x[:, 2500] = scale, scale
    x[1] = target[1]
    layers = [target.to(device)], [x.to(device).requires_grad_()]
    check(*layers, cached=cached)


def test_maxima_far_apart_in_different_tiles(device):
    target, x = torch.zeros(1, 40_000), torch.zeros(1, 40_000)
    target[0, :20_000] += 300.0
    x[0, 20_000:] += 150.0
    check([target.to(device)], [x.to(device).requires_grad_()])
    check([x.to(device)], [target.to(device).requires_grad_()])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan_for_its_image(device, value, axis, cached):
    for poisoned in (0, 1):
        targets, inputs = draw([(3, 5, 40)], device=device)
        pair = [targets[0], inputs[0].detach().clone()]
        pair[poisoned][1, 2, 3] = value
        x = pair[1].requires_grad_()
        loss = (
            activation_kl(KLTarget(pair[:1], axis=axis), [x])
            if cached
            else activation_kl(pair[:1], [x], axis=axis)
        )
        assert loss.isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad[1].isnan().any() and grad[0].isfinite().all() and grad[2].isfinite().all()


@pytest.mark.parametrize("cached", [False, True])
def test_near_a_match_it_is_closer_to_float64_than_the_usual_form(device, cached):
    targets, inputs = draw([(8, 64, 28, 28)], device=device, spread=1.0, noise=0.01)
    exact, _ = slow(targets, inputs)
    assert 2e-5 < exact.mean() < 1e-4
    log_q, log_p = (torch.log_softmax(x[0].flatten(1), 1) for x in (inputs, targets))
    usual = functional.kl_div(log_q, log_p.exp(), reduction="none").sum(1)
    ours = activation_kl(KLTarget(targets) if cached else targets, inputs)
    error, usual_error = (((y.cpu().double() - exact[0]) / exact[0]).abs().median() for y in (ours, usual))
    assert error < usual_error / (3 if cached else 100)


def test_a_layer_of_weight_zero_is_not_read(device):
    targets, inputs = draw([(2, 6), (2, 7)], device=device)
    broken = torch.full_like(inputs[1], math.nan).requires_grad_()
    total, layers = activation_kl(targets, [inputs[0], broken], weights=[2.0, 0.0], per_layer=True)
    torch.testing.assert_close(total, 2 * activation_kl(targets[:1], inputs[:1]))
    assert (layers[1] == 0).all()
    first, second = torch.autograd.grad(total.sum() + layers.sum(), [inputs[0], broken])
    assert first.abs().max() > 0 and (second == 0).all()


def test_per_layer_losses_carry_gradient(device):
    targets, inputs = draw([(2, 3, 3), (2, 7)], device=device)
    _, expected = slow(targets, inputs)
    total, layers = activation_kl(targets, inputs, weights=[5.0, 7.0], per_layer=True)
    coefficient = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    for loss, factor in (
        ((layers * coefficient).sum(), 0.0),
        ((layers * coefficient).sum() + total.sum(), 1.0),
    ):
        grads = torch.autograd.grad(loss, inputs, retain_graph=True)
        for layer, (grad, weight) in enumerate(zip(grads, (5.0, 7.0), strict=True)):
            c = (coefficient[layer].cpu() + factor * weight).double().view(-1, *[1] * (grad.dim() - 1))
            torch.testing.assert_close(grad.cpu().double(), c * expected[layer], rtol=1e-4, atol=1e-6)


def test_neither_batch_nor_threads_change_a_bit(device, request):
    targets, inputs = draw([(4, 64, 33, 33), (4, 100)], device=device)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            loss = activation_kl(targets, inputs)
            answers.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    alone = activation_kl([t[2:3] for t in targets], [x[2:3] for x in inputs])
    if request.node.callspec.params["device"] != "reference":  # torch's own sums depend on the split
        for first, second in itertools.pairwise(answers):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert alone.item() == answers[0][0][2].item()
    torch.testing.assert_close(alone[0], answers[0][0][2])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_one_pass_finds_what_two_find(device, axis, cached):
    """Gradients larger than the caches, whole rows to a thread and rows cut between two."""
    targets, inputs = draw([(3, 1700, 1031), (3, 40)], device=device, spread=1.0)
    target = KLTarget(targets, axis=axis)
    first, entropy = (target.probabilities, target.entropy) if cached else (targets, None)
    inputs = [x.detach() for x in inputs]
    options = [1.0, 3.0], 1.0, axis
    ops, threads, answers = torch.ops.minexp, torch.get_num_threads(), []
    total, layers, state = ops.activation_kl(first, inputs, entropy, *options)
    ones = torch.ones_like(total)
    grads = ops.activation_kl_backward(first, inputs, cached, state, ones, None, *options)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            answers.append(ops.activation_kl_gradients(first, inputs, entropy, *options))
    finally:
        torch.set_num_threads(threads)
    for answer in answers:
        torch.testing.assert_close(answer, (total, layers, grads), rtol=2e-5, atol=1e-7)


def test_one_pass_is_scaled_by_what_comes_down(device):
    targets, inputs = draw([(2, 3, 3), (2, 7)], device=device)
    with patch.object(_kl, "_fuses", return_value=False):
        expected = torch.autograd.grad((activation_kl(targets, inputs, weights=[2.0, 0.0]) * 3).sum(), inputs)
    loss = (activation_kl(targets, inputs, weights=[2.0, 0.0]) * 3).sum()
    for _ in range(2):  # the gradients that were kept stay as they are
        torch.testing.assert_close(torch.autograd.grad(loss, inputs, retain_graph=True), expected)


def test_cached_target_selects_images(device):
    targets, inputs = draw([(4, 6, 5, 5), (4, 9)], device=device)
    targets[0] = targets[0].to(memory_format=torch.channels_last)
    for axis in AXES:
        target, full = KLTarget(targets, axis=axis), activation_kl(targets, inputs, axis=axis)
        keep = torch.tensor([True, False, False, True], device=device)
        for index in (slice(1, 3), torch.tensor([2, 0], device=device), keep):
            part = target.select(index)
            assert part.probabilities[0].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(
                activation_kl(part, [x[index] for x in inputs]), full[index], rtol=1e-5, atol=1e-5
            )


def test_no_second_derivative(device):
    targets, inputs = draw([(2, 3)], device=device)
    (grad,) = torch.autograd.grad(activation_kl(targets, inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


A, B = torch.zeros(2, 3, 4), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([A, B], [A]), {}, ["inputs", "1 layers", "expected 2"]),
        (([A], [B]), {}, ["inputs[0]", "shape [2, 5]", "expected [2, 3, 4]"]),
        (([A], [A.double()]), {}, ["inputs[0]", "float64", "expected torch.float32"]),
        (([A, B.double()], [A, B]), {}, ["targets[1]", "float64", "expected torch.float32"]),
        (([A], [A.to("meta")]), {}, ["inputs[0]", "meta", "expected cpu"]),
        (([A.long()], [A.long()]), {}, ["targets[0]", "int64", "floating"]),
        (([A, torch.zeros(3, 5)], [A, B]), {}, ["targets[1]", "3 images", "expected 2"]),
        (([torch.zeros(2)], [torch.zeros(2)]), {}, ["targets[0]", "[2]", "[B, C, ...]"]),
        (([torch.zeros(2, 0)], [torch.zeros(2, 0)]), {}, ["targets[0]", "[2, 0]", "at least one feature"]),
        (([], []), {}, ["targets", "list of 0", "1 to 512"]),
        ((A, A), {}, ["targets", "one tensor", "list"]),
        (([A], [1]), {}, ["inputs[0]", "int", "tensor"]),
        (([A], [A]), {"temperature": -1.0}, ["temperature", "-1.0", "positive"]),
        (([A], [A]), {"temperature": math.nan}, ["temperature", "nan", "positive"]),
        (([A], [A]), {"axis": "rows"}, ["axis", "'rows'", "'spatial'"]),
        (([A], [A]), {"weights": [1.0, 2.0]}, ["weights", "2 entries", "expected 1"]),
        (([A], [A]), {"weights": [math.inf]}, ["weights", "inf", "finite"]),
        ((KLTarget([A]), [B]), {}, ["inputs[0]", "[2, 5]", "expected [2, 3, 4]"]),
        ((KLTarget([A]), [A]), {"temperature": 2.0}, ["temperature", "2.0", "expected 1.0"]),
        ((KLTarget([A]), [A.half()]), {}, ["inputs[0]", "float16", "expected torch.float32"]),
    ],
)
def test_bad_input_is_named(arguments, options, words):
    with pytest.raises(RequestError) as caught:
        activation_kl(*arguments, **options)
    message = str(caught.value)
    assert message.startswith("activation_kl: ") and "\n" not in message
    assert all(word in message for word in words), message
