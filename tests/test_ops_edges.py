import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from minexp import RequestError, edge_threshold, edge_topk, edge_total_topk
from minexp._ops import edge_position_topk

pytest_plugins = ["ops_bodies"]


def draw(batch, targets, width, groups=1, *, seed=0, ties=False, gradient=False, masks=False, **where):
    """Random arguments; with ties, small integers, so that products collide and are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        if ties:
            return torch.randint(-3, 4, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    def mask(*shape):
        return torch.rand(shape, generator=generator) < 0.6

    sources = width * groups
    options = {
        "gradient": numbers(batch, targets).to(**where) if gradient else None,
        "source_mask": mask(batch, sources).to(where.get("device")) if masks else None,
        "target_mask": mask(targets).to(where.get("device")) if masks else None,
        "groups": groups,
    }
    return numbers(targets, width).to(**where), numbers(batch, sources).to(**where), options


def every_edge(strength, energy, gradient, source_mask, target_mask, groups):
    """All edges of each image as (target, source, ranking score, score), entry by entry in Python."""
    strength, energy = strength.cpu(), energy.cpu()
    targets, width = strength.shape
    for b in range(len(energy)):
        edges = []
        for o in range(targets):
            if target_mask is not None and not target_mask.expand(len(energy), targets)[b, o]:
                continue
            for j in range(width):
                i = o // (targets // groups) * width + j
                if source_mask is None or source_mask.expand(len(energy), energy.shape[1])[b, i]:
                    score = strength[o, j] * energy[b, i]
                    full = score if gradient is None else score * gradient.cpu()[b, o]
                    edges.append((o, i, score.item(), full.item()))
        yield edges


def slow_topk(strength, energy, k, options):
    values, indices = [], []
    for edges in every_edge(strength, energy, **options):
        for o in range(len(strength)):
            row = sorted((edge for edge in edges if edge[0] == o), key=lambda e: (-abs(e[2]), e[1]))[:k]
            empty = k - len(row)
            values.append([full for *_, full in row] + [0.0] * empty)
            indices.append([i for _, i, *_ in row] + [-1] * empty)
    shape = len(energy), len(strength), k
    return torch.tensor(values, dtype=strength.dtype).view(shape), torch.tensor(indices).view(shape)


sizes = {
    "batch": st.integers(0, 3),
    "rows": st.integers(1, 5),
    "width": st.integers(1, 80),
    "groups": st.integers(1, 3),
    "ties": st.booleans(),
    "gradient": st.booleans(),
    "masks": st.booleans(),
    "seed": st.integers(0, 2**31),
}
quick = hypothesis.settings(max_examples=40, deadline=None)


@hypothesis.given(**sizes, share=st.floats(0, 1))
@quick
def test_topk_of_any_shape(device, batch, rows, width, groups, share, **kind):
    strength, energy, options = draw(batch, rows * groups, width, groups, device=device, **kind)
    k = max(1, round(share * width))
    values, indices = edge_topk(strength, energy, k, **options)
    expected, places = slow_topk(strength, energy, k, options)
    assert torch.equal(values.cpu(), expected) and torch.equal(indices.cpu(), places)


@hypothesis.given(**sizes, threshold=st.floats(0, 3))
@quick
def test_threshold_of_any_shape(device, batch, rows, width, groups, threshold, **kind):
    strength, energy, options = draw(batch, rows * groups, width, groups, device=device, **kind)
    threshold = torch.tensor(threshold).item()
    crow, source, values = edge_threshold(strength, energy, threshold, **options)
    edges = [
        (b * len(strength) + o, i, full)
        for b, image in enumerate(every_edge(strength, energy, **options))
        for o, i, _, full in image
        if abs(full) > threshold
    ]
    row = torch.repeat_interleave(torch.arange(batch * len(strength)), crow.cpu().diff())
    assert crow[0] == 0 and crow[-1] == len(edges)
    assert list(zip(row.tolist(), source.tolist(), values.tolist(), strict=True)) == edges


@hypothesis.given(**sizes, share=st.floats(0, 1))
@quick
def test_total_topk_of_any_shape(device, batch, rows, width, groups, share, **kind):
    strength, energy, options = draw(batch, rows * groups, width, groups, device=device, **kind)
    n = max(1, round(share * strength.numel()))
    values, target, source = (x.tolist() for x in edge_total_topk(strength, energy, n, **options))
    for b, edges in enumerate(every_edge(strength, energy, **options)):
        best = sorted(edges, key=lambda e: (-abs(e[3]), e[0], e[1]))[:n]
        empty = n - len(best)
        assert values[b] == [full for *_, full in best] + [0.0] * empty
        assert target[b] == [o for o, *_ in best] + [-1] * empty
        assert source[b] == [i for _, i, *_ in best] + [-1] * empty


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("targets", "width", "k"), [(40, 512, 16), (3, 2048, 32), (2, 5000, 700), (9, 31, 31)]
)
def test_layer_sizes_of_real_networks(device, dtype, targets, width, k):
    strength, energy, options = draw(2, targets, width, dtype=dtype, device=device, masks=width == 512)
    values, indices = edge_topk(strength, energy, k, **options)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected, places = slow_topk(strength.to(compute), energy.to(compute), k, options)
    assert values.dtype == compute and torch.equal(indices.cpu(), places)
    assert torch.equal(values.cpu(), expected.to(compute))


def test_ties_go_to_the_lowest_index(device):
    ones = torch.ones(2, 100, device=device)
    values, indices = edge_topk(ones, -ones, 5)
    assert (values == -1).all() and (indices == torch.arange(5, device=device)).all()
    values, target, source = edge_total_topk(ones, ones, 102)
    assert (target[:, :100] == 0).all() and (target[:, 100:] == 1).all() and source[0, -2:].tolist() == [0, 1]
    assert (edge_topk(0 * ones, ones, 3)[1] == torch.arange(3, device=device)).all()


def test_extreme_scores_keep_their_order(device):
    strength = torch.tensor([[1e-45, -3e38, 0.0, 1e-38, math.inf, -3e-45, -0.0, 3e38]], device=device)
    values, indices = edge_topk(strength, torch.ones(1, 8, device=device), 8)
    assert indices.flatten().tolist() == [4, 1, 7, 3, 5, 0, 2, 6]
    assert torch.equal(values.flatten(), strength.flatten()[indices.flatten()])
    strength[0, 3] = math.nan
    values, indices = edge_topk(strength, torch.ones(1, 8, device=device), 2)
    assert values[0, 0, 0].isnan() and indices[0, 0].tolist() == [3, 4]
    assert edge_threshold(strength, torch.ones(1, 8, device=device), 2.0)[1].tolist() == [1, 3, 4, 7]
    assert edge_total_topk(strength, torch.ones(1, 8, device=device), 2)[2].tolist() == [[3, 4]]


def test_a_target_mask_per_image_and_a_source_mask_for_all(device):
    strength, energy, _ = draw(2, 3, 6, device=device)
    options = {
        "gradient": None,
        "source_mask": torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.bool, device=device),
        "target_mask": torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool, device=device),
        "groups": 1,
    }
    values, indices = edge_topk(strength, energy, 3, **options)
    expected, places = slow_topk(strength, energy, 3, options)
    assert torch.equal(values.cpu(), expected) and torch.equal(indices.cpu(), places)
    assert (indices[1] == -1).all() and (indices[0, 0] >= 0).sum() == 2


def slow_positions(weight, activation, groups, stride, padding, dilation):
    """sum over positions |W[o, i] * x[b, i]| through one depthwise convolution for each target, in float64."""
    weight, activation = weight.cpu().double(), activation.cpu().double()
    targets, width = weight.shape[:2]
    scores = torch.zeros(len(activation), targets, width, dtype=torch.float64)
    for o in range(targets):
        first = o // (targets // groups) * width
        sources = activation[:, first : first + width]
        added = torch.nn.functional.conv2d(
            sources, weight[o].unsqueeze(1), None, stride, padding, dilation, width
        )
        scores[:, o] = added.abs().sum((2, 3))
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("targets", "width", "groups", "kernel", "size", "stride", "padding", "dilation"),
    [
        (20, 7, 1, (3, 3), (5, 6), 1, 1, 1),
        (6, 1, 6, (3, 3), (7, 7), 2, 1, 1),
        (34, 5, 2, (1, 1), (4, 4), 1, 0, 1),
        (3, 9, 1, (5, 2), (9, 8), (2, 1), (2, 0), (1, 3)),
        (2, 2, 1, (1, 1), (1, 1), 1, 0, 1),
    ],
)
def test_position_aware_scores(
    device, dtype, targets, width, groups, kernel, size, stride, padding, dilation
):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(targets, width, *kernel, generator=generator).to(device, dtype)
    activation = torch.randn(2, width * groups, *size, generator=generator).to(device, dtype)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    k = (width + 1) // 2
    values, indices = edge_position_topk(weight, activation, k, groups=groups, **geometry)
    scores = slow_positions(weight, activation, groups, **geometry)
    expected, places = scores.sort(dim=2, descending=True, stable=True)
    offset = (torch.arange(targets) // (targets // groups) * width).view(1, -1, 1)
    torch.testing.assert_close(values.cpu().double(), expected[:, :, :k], rtol=1e-5, atol=1e-6)
    assert torch.equal(indices.cpu(), places[:, :, :k] + offset)


def test_position_aware_masks_and_gradient(device):
    weight, activation = torch.ones(2, 3, 1, 1, device=device), torch.ones(1, 3, 2, 2, device=device)
    values, indices = edge_position_topk(
        weight,
        activation * torch.tensor([1.0, -2.0, 3.0], device=device).view(1, 3, 1, 1),
        2,
        gradient=torch.tensor([[-0.5, 1.0]], device=device),
        source_mask=torch.tensor([True, True, False], device=device),
        target_mask=torch.tensor([True, False], device=device),
    )
    assert values.tolist() == [[[-4.0, -2.0], [0.0, 0.0]]] and indices.tolist() == [[[1, 0], [-1, -1]]]


def test_opcheck_and_compile(device):
    strength, energy, options = draw(2, 4, 6, 2, device=device, gradient=True, masks=True)
    options["target_mask"] = options["target_mask"].expand(2, 4).contiguous()
    masks = tuple(options.values())
    for op, count in (("edge_topk", 3), ("edge_select", 5), ("edge_threshold", 0.5)):
        torch.library.opcheck(getattr(torch.ops.minexp, op), (strength, energy, count, *masks))
    pair = torch.randn(4, 6, 3, 3, device=device), torch.randn(2, 12, 5, 5, device=device)
    torch.library.opcheck(torch.ops.minexp.edge_position_topk, (*pair, 2, [1, 1], [1, 1], [1, 1], *masks))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for op, count in ((edge_topk, 3), (edge_total_topk, 5), (edge_threshold, 0.5)):
            compiled = torch.compile(
                lambda s, e, op=op, n=count: op(s * 2, e, n, **options), fullgraph=True, backend="aot_eager"
            )
            for got, want in zip(
                compiled(strength, energy), op(strength * 2, energy, count, **options), strict=True
            ):
                assert torch.equal(got, want)


S, E = torch.ones(4, 3), torch.ones(2, 6)
YES = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: edge_topk(S, E, 2), ["strength", "[4, 3]", "I = 6", "groups = 1"]),
        (lambda: edge_topk(S, E, 2, groups=3), ["strength", "[4, 3]", "groups = 3"]),
        (lambda: edge_topk(S, E, 4, groups=2), ["k is 4", "1 to 3"]),
        (lambda: edge_topk(S, E, 0, groups=2), ["k is 0", "1 to 3"]),
        (lambda: edge_topk(S, E, 1, groups=0), ["groups is 0", ">= 1"]),
        (lambda: edge_topk(S, E.double(), 1, groups=2), ["strength", "float32", "expected torch.float64"]),
        (lambda: edge_topk(S, E.to("meta"), 1, groups=2), ["strength", "cpu", "expected meta"]),
        (lambda: edge_topk(S, E.long(), 1, groups=2), ["energy", "int64", "floating"]),
        (lambda: edge_topk(S[0], E, 1), ["strength", "[3]", "2 dimensions"]),
        (lambda: edge_topk(S, 3, 1), ["energy", "int", "tensor"]),
        (lambda: edge_topk(S, E, 1, groups=2, gradient=E), ["gradient", "[2, 6]", "[2, 4]"]),
        (lambda: edge_topk(S, E, 1, groups=2, source_mask=E), ["source_mask", "float32", "bool"]),
        (lambda: edge_topk(S, E, 1, groups=2, target_mask=YES), ["target_mask", "[6]", "[2, 4] or [4]"]),
        (lambda: edge_threshold(S, E, -1.0, groups=2), ["threshold is -1.0", ">= 0"]),
        (lambda: edge_threshold(S, E, math.nan, groups=2), ["threshold is nan", "finite"]),
        (lambda: edge_total_topk(S, E, 13, groups=2), ["n is 13", "1 to 12"]),
        (lambda: edge_position_topk(S, E, 1), ["weight", "[4, 3]", "4 dimensions"]),
        (
            lambda: edge_position_topk(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), 1),
            ["weight and activation", "kernel [3, 3] on [2, 2]"],
        ),
        (
            lambda: edge_position_topk(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2), 1, stride=0),
            ["stride is 0", ">= 1"],
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(RequestError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
