"""The objective's terms against slow float64 loops, the gradient of robustness, the dual variable."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import filters, noise_images, random_masks
from tiny_models import one_thread as one_thread
from torch import Tensor

from minexp.errors import RequestError
from minexp.masker import Masker, straight_through
from minexp.objective import (
    PRESETS,
    AreaDual,
    Objective,
    activation_match,
    evaluate_on,
    evaluate_terms,
    layer_weights,
    make_target,
    preset,
    total_variation,
)

PLAIN = Objective(
    act=1.5, ce=0.7, kl=0.4, area=3.0, crisp=0.3, tv=1.1, rob=0.9, layer_weights=(0.25, 2.0), dual=False
)


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    top = max(values)
    powers = [math.exp((v - top) / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow_variation(mask: Tensor) -> float:
    grid = mask[0].double().tolist()
    down = [abs(grid[i + 1][j] - grid[i][j]) for i in range(len(grid) - 1) for j in range(len(grid[0]))]
    right = [abs(grid[i][j + 1] - grid[i][j]) for i in range(len(grid)) for j in range(len(grid[0]) - 1)]
    return sum(down) / max(1, len(down)) + sum(right) / max(1, len(right))


@pytest.mark.parametrize("size", [(16, 16), (7, 11), (1, 9), (9, 1), (1, 1)])
def test_total_variation(size: tuple[int, int]) -> None:
    mask = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([slow_variation(m) for m in mask])
    torch.testing.assert_close(total_variation(mask), expected)


def test_total_variation_of_known_masks() -> None:
    half = torch.zeros(1, 1, 8, 8)
    half[..., 4:] = 1  # one of seven vertical seams differs in every row
    assert total_variation(half).item() == pytest.approx(1 / 7)
    board = (torch.arange(8)[:, None] + torch.arange(8)[None, :]).remainder(2).float().view(1, 1, 8, 8)
    assert total_variation(board).item() == 2.0
    assert total_variation(torch.ones(1, 1, 8, 8)).item() == 0.0


def slow_match(kind: str, a: Tensor, b: Tensor) -> float:
    """One layer of one image, in float64."""
    x, y = a.flatten().double().tolist(), b.flatten().double().tolist()
    if kind == "kl":
        return divergence(softmax(x), softmax(y))
    if kind == "mse":
        return sum((u - v) ** 2 for u, v in zip(x, y, strict=True)) / len(x)
    dot = sum(u * v for u, v in zip(x, y, strict=True))
    return 1 - dot / math.sqrt(sum(u * u for u in x) * sum(v * v for v in y))


@pytest.mark.parametrize("kind", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("reused", [False, True])
def test_activation_match(kind: str, reused: bool) -> None:
    classifier, x, other = filters(), noise_images(3), noise_images(3, seed=5)
    objective = replace(PLAIN, match=kind)
    target = make_target(classifier, x, objective, reused=reused)
    features = classifier.features(other)[1]
    expected = [
        sum(
            w * slow_match(kind, a[b], f[b])
            for w, a, f in zip((0.25, 2.0), classifier.features(x)[1], features, strict=True)
        )
        for b in range(3)
    ]
    got = activation_match(objective, target, features)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_the_terms_about_one_background_are_those_of_the_whole() -> None:
    classifier, n = filters(), 4
    x, r = noise_images(n), noise_images(n, seed=9)
    p = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    mask, background = (p > 0.5).float(), torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    target = make_target(classifier, x, PLAIN, reused=True)
    both = evaluate_terms(PLAIN, classifier, x, p, mask, target, background, r)
    default, random = (
        evaluate_on(PLAIN, classifier, x, p, mask, target, behind, random=behind is r)
        for behind in (background, r)
    )
    shape = {"area", "crisp", "tv"}
    assert set(default.values) == {"ce", "kl", "act"} | shape and set(random.values) == {"rob"} | shape
    for terms in (default, random):
        for name, value in terms.values.items():
            torch.testing.assert_close(value, both.values[name])
    assert torch.equal(default.kept, both.kept) and torch.equal(random.kept, both.robust)


def test_the_whole_objective_against_loops_over_images() -> None:
    classifier, n = filters(), 4
    x, r = noise_images(n), noise_images(n, seed=9)
    p = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    mask, background = (p > 0.5).float(), torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    target = make_target(classifier, x, PLAIN, reused=True)
    terms = evaluate_terms(PLAIN, classifier, x, p, mask, target, background, r)
    area_weight = torch.tensor([3.0, 1.0, 0.0, 7.0])
    totals = []
    for b in range(n):
        whole, layers = classifier.features(x[b : b + 1])
        label = int(whole.argmax())
        e = torch.where(mask[b] > 0, x[b], background[0])[None]
        shifted = torch.where(mask[b] > 0, x[b], r[b])[None]
        scores, matched = classifier.features(e)
        random_scores = classifier.logits(shifted)[0].tolist()
        slow = {
            "act": sum(
                w * slow_match("kl", a, f) for w, a, f in zip((0.25, 2.0), layers, matched, strict=True)
            ),
            "ce": -math.log(softmax(scores[0].tolist())[label]),
            "kl": 4 * divergence(softmax(whole[0].tolist(), 2), softmax(scores[0].tolist(), 2)),
            "rob": -math.log(softmax(random_scores)[label]),
            "area": sum(mask[b].flatten().tolist()) / 256,
            "crisp": sum(v - v * v for v in p[b].flatten().tolist()) / 256,
            "tv": slow_variation(mask[b]),
        }
        for name, value in slow.items():
            assert terms.values[name][b].item() == pytest.approx(value, rel=2e-4, abs=1e-5), name
        assert terms.kept[b].item() == (int(scores.argmax()) == label)
        assert terms.robust[b].item() == (random_scores.index(max(random_scores)) == label)
        weights = {n: getattr(PLAIN, n) for n in slow} | {"area": area_weight[b].item()}
        totals.append(sum(weights[name] * value for name, value in slow.items()))
    assert set(terms.values) == set(slow)
    assert terms.total(PLAIN, area_weight).item() == pytest.approx(sum(totals) / n, rel=2e-4)


def masker_gradient(binarise: Callable[[Tensor], Tensor], objective: Objective) -> float:
    """Largest gradient that the objective gives the masker's logits through hard masks."""
    classifier, x = filters(), noise_images(4)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 1, 16, 16, generator=rng).requires_grad_(True)
    p = torch.sigmoid(logits)
    target = make_target(classifier, x, objective, reused=False)
    terms = evaluate_terms(
        objective, classifier, x, p, binarise(p), target, torch.full((1, 3, 1, 1), 0.5), torch.rand(x.shape)
    )
    loss = terms.total(objective, 0.0)
    if not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient.abs().max().item()


def test_robustness_reaches_the_masker_through_hard_masks() -> None:
    robustness = Objective(act=0, ce=0, kl=0, area=0, crisp=0, tv=0, rob=1, match="off", dual=False)
    assert masker_gradient(straight_through, robustness) > 1e-4
    # the mistake that this guards against: a plain comparison passes nothing back
    assert masker_gradient(lambda p: (p > 0.5).float(), robustness) == 0.0


def test_robustness_reaches_every_weight_of_the_masker_that_is_live() -> None:
    classifier, x, masker = filters(), noise_images(4), Masker()
    torch.nn.init.normal_(masker.head.weight, std=0.1)
    robustness = Objective(act=0, ce=0, kl=0, area=0, crisp=0, tv=0, rob=1, match="off", dual=False)
    p = torch.sigmoid(masker(x))
    target = make_target(classifier, x, robustness, reused=False)
    random = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    terms = evaluate_terms(
        robustness, classifier, x, p, straight_through(p), target, torch.full((1, 3, 1, 1), 0.5), random
    )
    terms.total(robustness, 0.0).backward()
    for name, parameter in masker.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in classifier.model.parameters())


def test_target_is_of_the_whole_image_and_carries_no_gradient() -> None:
    classifier, x = filters(), noise_images(3).requires_grad_(True)
    target = make_target(classifier, x, PLAIN, reused=False)
    assert torch.equal(target.decision, classifier.logits(x).argmax(1))
    assert not target.logits.requires_grad
    off = make_target(classifier, x, replace(PLAIN, match="off"), reused=True)
    assert off.features == []


def test_layer_weights() -> None:
    assert layer_weights(Objective(), 3) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert layer_weights(PLAIN, 2) == [0.25, 2.0]
    with pytest.raises(RequestError, match="2 layer weights for 5 taps"):
        layer_weights(PLAIN, 5)


def test_presets() -> None:
    for name in PRESETS:
        assert preset(name) == PRESETS[name]
    with pytest.raises(RequestError, match=r"'fast'.*default"):
        preset("fast")


def test_area_weight_rises_while_the_decision_holds_and_falls_while_it_fails() -> None:
    objective = Objective(dual=True, area=1.0, target=0.9, dual_rate=0.1, dual_range=(0.5, 2.0))
    dual = AreaDual(objective)
    assert dual.value == 1.0
    dual.update(1.0)
    risen = dual.value
    assert risen > 1.0
    dual.update(0.9)  # exactly on target: stays
    assert dual.value == risen
    dual.update(0.2)
    assert dual.value < risen
    for _ in range(200):
        dual.update(0.0)
    assert dual.value == 0.5
    for _ in range(200):
        dual.update(1.0)
    assert dual.value == 2.0


def test_a_fixed_area_weight_stays() -> None:
    dual = AreaDual(Objective(dual=False, area=4.0))
    dual.update(1.0), dual.update(0.0)
    assert dual.value == 4.0


def test_masks_of_the_right_size_pay_their_area() -> None:
    """A term per pixel would let resolution decide how much the area weighs."""
    classifier = filters()
    x, mask = noise_images(2), random_masks(2, 0.3).float()
    target = make_target(classifier, x, PLAIN, reused=False)
    terms = evaluate_terms(PLAIN, classifier, x, mask, mask, target, torch.zeros(1, 3, 1, 1), x)
    torch.testing.assert_close(terms.values["area"], mask.mean((1, 2, 3)))
    assert torch.equal(terms.values["crisp"], torch.zeros(2))
    assert terms.robust.all()  # the random background was the image itself
