"""Ablation against plain loops: gates, baselines, prefixes, controls, curves, and a model left as it was."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import one_thread as one_thread
from tiny_models import state
from torch import Tensor, nn

import minexp
from minexp.circuit.ablation import Ablation, Pool, measure
from minexp.circuit.baseline import make_baseline
from minexp.circuit.circuit import Interval, area
from minexp.circuit.examine import Effort, examine, interval, members, random_like, smallest_enough
from minexp.circuit.network import TappedNetwork, network
from minexp.circuit.ranking import Ranking, rank
from minexp.classifier import Classifier
from minexp.data.subjects import SceneNet
from minexp.errors import RequestError

SIZES = (0.05, 0.2, 0.5, 1.0)


def small(seed: int = 0, size: int = 16) -> Classifier:
    torch.manual_seed(seed)
    model = SceneNet(5, (4, 6, 6, 8)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.05, 0.15)  # type: ignore[union-attr, operator]
    return Classifier(model, size=size, mean=(0.5,) * 3, std=(0.25,) * 3)


def images(count: int, seed: int = 1, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return small()


def plain(model: SceneNet, x: Tensor, keep: Tensor, base: dict[str, Tensor]) -> Tensor:
    """The scores of one image [1,3,H,W], layer by layer, with units outside `keep` at their baseline."""
    place = 0

    def gate(name: str, value: Tensor) -> Tensor:
        nonlocal place
        kept = keep[place : place + value.shape[1]].view(1, -1, 1, 1)
        place += value.shape[1]
        return torch.where(kept, value, base[name] if name in base else torch.zeros_like(value))

    x = gate("stem", model.stem((x - 0.5) / 0.25))
    for number in range(1, 5):
        block = getattr(model, f"layer{number}")
        y = gate(f"layer{number}.conv1", F.relu(block.bn1(block.conv1(x))))
        x = gate(f"layer{number}", F.relu(block.bn2(block.conv2(y)) + block.shortcut(x)))
    return model.fc(x.mean((2, 3)))


def activations(model: SceneNet, x: Tensor) -> dict[str, Tensor]:
    """Every layer's values, by the same plain code."""
    found = {}
    x = found["stem"] = model.stem((x - 0.5) / 0.25)
    for number in range(1, 5):
        block = getattr(model, f"layer{number}")
        y = found[f"layer{number}.conv1"] = F.relu(block.bn1(block.conv1(x)))
        x = found[f"layer{number}"] = F.relu(block.bn2(block.conv2(y)) + block.shortcut(x))
    return found


@pytest.mark.parametrize("kind", ["mean", "zero", "blank"])
@torch.no_grad()
def test_scores_agree_with_the_network_written_out(classifier: Classifier, kind: str) -> None:
    net, x, reference = network(classifier), images(3), images(6, 2)
    model = classifier.model
    blank = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    base: dict[str, Tensor] = {}
    if kind == "mean":
        base = {name: value.mean(0, keepdim=True) for name, value in activations(model, reference).items()}
    elif kind == "blank":
        base = activations(model, blank.expand(1, 3, 16, 16))
    label = torch.tensor([1, 0, 4])
    ablation = Ablation(net, x, label, make_baseline(net, kind, reference=reference, blank=blank))
    keep = torch.rand(7, net.nodes, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[3] = True
    keep[4] = False
    keep[5, : net.nodes - 3] = True  # a prefix that nothing touches
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    expected = [
        plain(model, x[r : r + 1], k, base)[0, label[r]] for r, k in zip(rows.tolist(), keep, strict=True)
    ]
    assert ablation.scores(keep, rows).tolist() == pytest.approx([float(v) for v in expected], abs=1e-4)
    everything = torch.ones(net.nodes, dtype=torch.bool)
    full, empty = (
        torch.tensor([float(plain(model, x[b : b + 1], kept, base)[0, label[b]]) for b in range(3)])
        for kept in (everything, ~everything)
    )
    assert torch.allclose(ablation.full, full, atol=1e-4) and torch.allclose(ablation.empty, empty, atol=1e-4)
    f = ablation.faithfulness(keep, rows)
    assert f[3] == pytest.approx(1, abs=1e-5) and f[4] == pytest.approx(0, abs=1e-5)
    assert float(f[0]) == pytest.approx(float((expected[0] - empty[0]) / (full[0] - empty[0])), abs=1e-3)


@torch.no_grad()
def test_resampling_takes_whole_activations_of_single_images(classifier: Classifier) -> None:
    net, x, reference = network(classifier), images(2), images(3, 2)
    baseline = make_baseline(net, "resample", reference=reference, blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(net, x, torch.tensor([0, 1]), baseline)
    keep = torch.rand(1, net.nodes, generator=torch.Generator().manual_seed(3)) < 0.5
    by_donor = []
    for donor in range(3):
        base = {
            name: value[donor : donor + 1] for name, value in activations(classifier.model, reference).items()
        }
        by_donor.append(float(plain(classifier.model, x[1:], keep[0], base)[0, 1]))
    # three donors, fewer than the draws: each of them once
    assert float(ablation.scores(keep, torch.tensor([1]))) == pytest.approx(sum(by_donor) / 3, abs=1e-4)


def test_the_gradient_is_that_of_the_scores_between_ablated_and_kept(classifier: Classifier) -> None:
    net, x = network(classifier), images(2)
    baseline = make_baseline(net, "mean", reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(net, x, torch.tensor([2, 3]), baseline)
    factors = torch.rand(2, net.nodes, generator=torch.Generator().manual_seed(5)) * 0.9 + 0.1
    m, slope = ablation.gradient(factors)
    step = 1e-2
    for node in (0, 5, 20, net.nodes - 1):
        moved = factors.clone()
        moved[:, node] += step
        back = factors.clone()
        back[:, node] -= step
        change = (ablation.gradient(moved)[0] - ablation.gradient(back)[0]) / (2 * step)
        assert torch.allclose(change, slope[:, node], atol=2e-3)
    assert torch.allclose(m, ablation.gradient(factors)[0])


def test_the_integrated_scores_sum_to_what_there_is_to_explain(classifier: Classifier) -> None:
    net = network(classifier)
    baseline = make_baseline(net, "mean", reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(net, images(2), torch.tensor([2, 3]), baseline)
    found = rank(ablation, "integrated", steps=200)
    assert torch.allclose(found.scores.sum(1), ablation.full - ablation.empty, atol=2e-2)


def test_the_three_metrics() -> None:
    scores, label = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])
    assert float(measure(scores, label, "logit")) == 3
    assert float(measure(scores, label, "margin")) == 1.5
    expected = 3 - math.log(math.e + math.e**3 + math.e**2)
    assert float(measure(scores, label, "log_prob")) == pytest.approx(expected)
    with pytest.raises(RequestError, match="unknown metric 'loss'; choose logit"):
        measure(scores, label, "loss")  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["pruned", "integrated", "gradient", "energy"])
@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_no_image_changes_another_ones_answer(classifier: Classifier, by: str, kind: str) -> None:
    net, x, label = network(classifier), images(5), torch.tensor([0, 1, 2, 3, 4])
    baseline = make_baseline(net, kind, reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))  # type: ignore[arg-type]

    def answer(size: int) -> tuple[Tensor, list[list[float]]]:
        keys, tests = [], []
        for part, labels in zip(x.split(size), label.split(size), strict=True):
            ablation = Ablation(net, part, labels, baseline, micro_batch=4)
            ranking = rank(ablation, by, sizes=SIZES, rounds=5, steps=4)  # type: ignore[arg-type]
            keys.append(ranking.key)
            found = examine(ablation, ranking, [9] * len(part), sizes=SIZES, effort=Effort(controls=3))
            tests += [[t.faithfulness, t.inside_drop, t.random_drop.mean, *t.curve] for t in found]  # type: ignore[union-attr]
        return torch.cat(keys), tests

    keys, tests = answer(5)
    for size in (1, 2):
        again, others = answer(size)
        assert torch.equal(again, keys)
        for one, other in zip(tests, others, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_contrast_is_with_the_same_circuit_on_other_classes(classifier: Classifier) -> None:
    net, x, label = network(classifier), images(2), torch.tensor([1, 0])
    baseline = make_baseline(net, "mean", reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))
    pool = Pool(images(3, 9), torch.tensor([1, 0, 2]))
    ablation = Ablation(net, x, label, baseline, "contrast", pool=pool)
    plain = Ablation(net, x, label, baseline)
    keep = torch.rand(2, net.nodes, generator=torch.Generator().manual_seed(3)) < 0.6
    for b, rivals in enumerate(([1, 2, 1, 2], [0, 2, 0, 2])):  # four of each, of other classes, in turn
        there = Ablation(net, pool.x[rivals], label[b].expand(4), baseline)
        expected = (
            plain.scores(keep[b : b + 1], torch.tensor([b])) - there.scores(keep[b].expand(4, -1)).mean()
        )
        assert float(ablation.scores(keep)[b]) == pytest.approx(float(expected), abs=1e-4)
        assert float(ablation.full[b]) == pytest.approx(float(plain.full[b] - there.full.mean()), abs=1e-4)
    assert torch.allclose(ablation.empty, torch.zeros(2), atol=1e-5)  # nothing tells the images apart
    assert torch.allclose(ablation.gradient(keep.float())[0], ablation.scores(keep), atol=1e-4)
    factors = torch.rand(2, net.nodes, generator=torch.Generator().manual_seed(5)) * 0.9 + 0.1
    slope, step = ablation.gradient(factors)[1], 2e-3
    for node in (3, 17):
        ends = []
        for sign in (1, -1):
            moved = factors.clone()
            moved[:, node] += sign * step
            ends.append(ablation.gradient(moved)[0])
        assert torch.allclose((ends[0] - ends[1]) / (2 * step), slope[:, node], atol=2e-2)
    with pytest.raises(RequestError, match="metric contrast needs reference images of other classes"):
        Ablation(net, x, label, baseline, "contrast", pool=Pool(images(2, 9), torch.tensor([1, 1])))


def test_random_circuits_have_the_layers_of_the_circuit(classifier: Classifier) -> None:
    net = network(classifier)
    keep = torch.rand(net.nodes, generator=torch.Generator().manual_seed(3)) < 0.3
    draws = random_like(net, keep, 20, seed=7)
    for site, kept in net.by_site(keep[None]).items():
        counts = net.by_site(draws)[site].sum(1)
        assert counts.tolist() == [int(kept.sum())] * 20
    assert len({tuple(row.tolist()) for row in draws}) == 20
    assert torch.equal(draws, random_like(net, keep, 20, seed=7))
    assert not torch.equal(draws, random_like(net, keep, 20, seed=8))


def test_the_test_of_a_circuit_by_hand(classifier: Classifier) -> None:
    net, x = network(classifier), images(2)
    baseline = make_baseline(net, "mean", reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))
    label = torch.tensor([1, 2])
    ablation = Ablation(net, x, label, baseline)
    ranking = rank(ablation, "gradient")
    elsewhere = images(4, 9)
    classes = torch.tensor([1, 0, 2, 2])
    others = Ablation(net, elsewhere, classes, baseline, lean=True)
    test = examine(ablation, ranking, [12, 20], sizes=SIZES, others=others)[0]
    keep = ranking.keep(12)[:1]
    row = torch.tensor([0])
    inside, outside = ablation.scores(keep, row), ablation.scores(~keep, row)
    assert test.inside_drop == pytest.approx(float(ablation.full[0] - outside))
    assert test.outside_drop == pytest.approx(float(ablation.full[0] - inside))
    assert test.faithfulness == pytest.approx(float(ablation.relative(inside, row)))
    assert test.completeness == pytest.approx(float(ablation.relative(outside, row)))
    counts = [max(1, round(size * net.nodes)) for size in SIZES]
    curve = [float(ablation.faithfulness(ranking.keep(count)[:1], row)) for count in counts]
    assert test.sizes == SIZES and test.curve == pytest.approx(curve)
    assert test.cpr == pytest.approx(area(SIZES, curve))
    assert test.cmd == pytest.approx(area(SIZES, [abs(1 - f) for f in curve]))
    draws = random_like(net, keep[0], 20, ablation.seeds[0])
    rows = torch.zeros(20, dtype=torch.long)
    assert test.random_faithfulness == interval(ablation.faithfulness(draws, rows).tolist())
    assert test.random_drop == interval((ablation.full[0] - ablation.scores(~draws, rows)).tolist())
    # the three images of other classes, asked for class 1
    there = Ablation(net, elsewhere[1:], torch.ones(3, dtype=torch.long), baseline)
    m = there.scores(keep.expand(3, -1))
    expected = ((m - ablation.empty[0]) / (ablation.full[0] - ablation.empty[0])).mean()
    assert test.elsewhere == pytest.approx(float(expected), abs=1e-4)


def test_single_nodes_alone_and_in_their_circuit(classifier: Classifier) -> None:
    net, x = network(classifier), images(2)
    baseline = make_baseline(net, "zero", reference=None, blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(net, x, torch.tensor([1, 2]), baseline)
    keep = rank(ablation, "gradient").keep(9)[1]
    nodes = keep.nonzero()[:, 0].tolist()
    alone, lost = members(ablation, 1, keep, nodes)
    for node, effect, needed in zip(nodes, alone, lost, strict=True):
        rest, less = torch.ones(1, net.nodes, dtype=torch.bool), keep[None].clone()
        rest[0, node] = less[0, node] = False
        row = torch.tensor([1])
        assert effect == pytest.approx(float(ablation.full[1] - ablation.scores(rest, row)), abs=1e-5)
        expected = ablation.faithfulness(keep[None], row) - ablation.faithfulness(less, row)
        assert needed == pytest.approx(float(expected), abs=1e-5)


def test_the_smallest_faithful_circuit_is_chosen() -> None:
    class Fixed:
        """Faithfulness by the number of nodes alone."""

        class net:
            nodes = 100

        def __init__(self, values: dict[int, list[float]]) -> None:
            self.values = values

        def __len__(self) -> int:
            return 2

        def faithfulness(self, keep: Tensor) -> Tensor:
            return torch.tensor(self.values[int(keep[0].sum())])

    fixed = Fixed({10: [0.3, 0.9], 20: [0.85, 0.7], 50: [0.6, math.nan], 100: [1.0, 1.0]})
    ranking = Ranking("gradient", torch.zeros(2, 100), torch.arange(200.0).view(2, 100))
    sizes = [0.1, 0.2, 0.5, 1.0]
    assert smallest_enough(fixed, ranking, sizes, limit=2000) == [20, 10]  # type: ignore[arg-type]
    fixed.values[20] = [0.7, 0.7]
    assert smallest_enough(fixed, ranking, sizes, limit=60) == [20, 10]  # type: ignore[arg-type]


def test_an_area_and_an_interval_by_hand() -> None:
    assert area([0.0, 0.5, 1.0], [0.0, 1.0, 1.0]) == 0.75
    assert area([0.2, 0.4], [1.0, 3.0]) == 2 and math.isnan(area([0.5], [1.0]))
    found = interval([1.0, 2.0, 3.0, 6.0, math.nan])
    half = 1.959964 * (14 / 3 / 4) ** 0.5
    assert (found.mean, found.n) == (3, 4) and (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert math.isnan(interval([]).mean)
    assert isinstance(found, Interval)


def test_hooks_on_stages_do_what_the_trace_does(classifier: Classifier) -> None:
    x, label = images(2), torch.tensor([0, 1])
    stages = TappedNetwork(classifier)
    baseline = make_baseline(stages, "mean", reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))
    ablation = Ablation(stages, x, label, baseline)
    traced = network(classifier)
    whole = make_baseline(traced, "mean", reference=images(6, 2), blank=torch.zeros(1, 3, 1, 1))
    other = Ablation(traced, x, label, whole)
    keep = torch.rand(2, stages.nodes, generator=torch.Generator().manual_seed(5)) < 0.5
    cut = stages.by_site(keep)
    wide = torch.ones(2, traced.nodes, dtype=torch.bool)
    names = {"stem": "stem.0"}
    for site, kept in cut.items():
        for mine, part in traced.by_site(wide).items():
            if mine.name == names.get(site.name, site.name):
                part.copy_(kept)  # a view of `wide`
    assert torch.allclose(ablation.scores(keep), other.scores(wide), atol=1e-5)
    assert torch.allclose(ablation.full, other.full, atol=1e-5)


@pytest.mark.parametrize("level", ["layer", "stage"])
def test_the_model_is_left_as_it_was(level: str) -> None:
    classifier = small(3)
    model = classifier.model.train()
    before = state(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    minexp.read_circuit(classifier, images(1)[0], level=level, controls=2, members=2)
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_throws_is_left_as_it_was() -> None:
    classifier = small(4)
    network(classifier, "stage")
    model = classifier.model.train()
    before = state(model)
    fc, model.fc = model.fc, nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        minexp.read_circuit(classifier, images(1)[0], level="stage", target=0)
    model.fc = fc
    assert state(model) == before


def test_a_trace_follows_weights_that_change() -> None:
    classifier = small(5)
    net, x = network(classifier), images(2)
    before = net.run({net.image: x}, [net.scores])[net.scores]
    with torch.no_grad():
        classifier.model.fc.bias += 1
    after = net.run({net.image: x}, [net.scores])[net.scores]
    assert torch.allclose(after, before + 1) and torch.allclose(after, classifier.logits(x), atol=1e-5)
    assert network(classifier) is net


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("mean", "mean ablation needs at least 2 reference images"),
        ("median", "unknown ablation 'median'; choose mean"),
    ],
)
def test_requests_that_cannot_be_met(classifier: Classifier, kind: str, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        make_baseline(network(classifier), kind, reference=None, blank=torch.zeros(1, 3, 1, 1))  # type: ignore[arg-type]
