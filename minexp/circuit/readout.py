"""From images and a classifier to circuits: rank the nodes, choose how many, find the edges among them, test."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backgrounds import GREY
from ..classifier import Classifier
from ..errors import MinexpError, RequestError
from ..explanation import Explanation
from ..targets import Binary, Target
from .ablation import Ablation, Metric, Pool
from .baseline import Kind, make_baseline
from .circuit import Circuit, Layer, Test
from .draft import draft, first_numbers, measured
from .examine import Effort, examine, mean_test, smallest_enough
from .network import Level, network
from .published import CAVEATS
from .ranking import Ranking, count_of, rank
from .settings import Settings
from .stability import stability

LIMIT = 2000  # nodes of a circuit whose size is not given
POOL = 16  # reference images among which those of other classes are found
OWN_REFERENCE = 8  # images of a set, to serve as its own reference


def read_circuit(
    classifier: Classifier,
    x: Tensor,
    explanation: Explanation | None = None,
    *,
    target: int | None = None,
    reference: Tensor | None = None,
    settings: Settings | None = None,
    **changes: Any,
) -> Circuit:
    """The circuit of one image, or the one that several images share.

    x [C,H,W] or [B,C,H,W] in [0,1]. With its explanation the circuit is that of the kept pixels, for the class of
    the whole image. target: the class, in place of the predicted one. reference [M,C,H,W]: images for mean and
    resample ablation, and to see what the circuit does elsewhere; without it, x itself where it has at least 8.
    ``changes`` are fields of `Settings`. Raises RequestError for input or settings that do not fit.
    """
    if reference is None and x.ndim == 4 and len(x) >= OWN_REFERENCE:
        reference = x
    chosen = replace(settings or Settings(), **changes)
    blank = None if explanation is None else explanation.background
    reader = Reader(classifier, chosen, reference=reference, blank=blank)
    images, label = reader.prepare(x, explanation, target)
    return reader.shared(images, label) if len(images) > 1 else reader.single(images, label)[0]


def ablate_circuit(
    circuit: Circuit,
    classifier: Classifier,
    x: Tensor,
    explanation: Explanation | None = None,
    *,
    reference: Tensor | None = None,
    settings: Settings | None = None,
    **changes: Any,
) -> Test:
    """Test a circuit, a loaded one say, on any images; arguments as for `read_circuit`, the mean over several images.

    The curve ends at the circuit's own size. Raises RequestError where the circuit is of another classifier.
    """
    if circuit.fingerprint != classifier.fingerprint:
        raise RequestError("the circuit was read from another classifier; give the one it is of")
    own: dict[str, Any] = {"mode": circuit.mode, "level": circuit.level}
    if settings is None and circuit.test is not None:
        own["metric"] = circuit.test.metric  # what it was chosen to keep
    chosen = replace(settings or Settings(), **own | changes)
    blank = None if explanation is None else explanation.background
    reader = Reader(classifier, chosen, reference=reference, blank=blank)
    images, label = reader.prepare(x, explanation, None if circuit.label < 0 else circuit.label)
    return reader.test(circuit, images, label)


class Reader:
    """A network with a baseline and settings, which circuits of any images are read with."""

    def __init__(
        self,
        classifier: Classifier,
        settings: Settings,
        *,
        reference: Tensor | None = None,
        blank: Tensor | None = None,
    ) -> None:
        self.classifier, self.settings = classifier, settings
        level: Level = "stage" if settings.mode == "paper" else settings.level
        self.net = network(classifier, level)
        self.level: Level = "stage" if self.net.note else level
        self.micro_batch = classifier.micro_batch.size
        self.reference = None if reference is None else reference.to(classifier.device)
        if blank is None:
            blank = (
                _grey(classifier)
                if self.reference is None
                else self.reference.mean((0, 2, 3)).view(1, -1, 1, 1)
            )
        self.blank = blank.to(classifier.device)
        self.kind: Kind = settings.ablation or ("blank" if reference is None else "mean")
        self.baseline = make_baseline(
            self.net,
            self.kind,
            reference=self.reference,
            blank=self.blank,
            micro_batch=self.micro_batch,
        )
        self.notes = (
            *(CAVEATS if settings.mode == "paper" else ()),
            *((self.net.note,) if self.net.note else ()),
        )

    def prepare(
        self, x: Tensor, explanation: Explanation | None = None, target: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images [B,C,H,W] to read circuits of, and the class [B] of each; arguments as for `read_circuit`."""
        x = x.unsqueeze(0) if x.ndim == 3 else x
        shape = self.classifier.input_shape
        if x.ndim != 4 or tuple(x.shape[1:]) != shape or not x.is_floating_point() or len(x) == 0:
            kind = str(x.dtype).removeprefix("torch.")
            raise RequestError(
                f"images of {kind} {list(x.shape)}; give float {list(shape)} in [0,1], one or several"
            )
        if explanation is not None and explanation.x.shape != x.shape:
            raise RequestError(
                f"an explanation of images {list(explanation.x.shape)} for images {list(x.shape)}"
            )
        x = x.to(self.classifier.device)
        with torch.no_grad():
            scores = torch.cat([self.classifier.logits(part) for part in x.split(self.micro_batch)])
        if not scores.isfinite().all():
            raise MinexpError("the classifier gives NaN or infinite scores; check its weights, mean and std")
        label = self.classifier.target.label(scores)
        if target is not None:
            if not 0 <= target < self.classifier.num_classes:
                raise RequestError(
                    f"class {target}: the model has the classes 0 to {self.classifier.num_classes - 1}"
                )
            label = torch.full_like(label, target)
        return (x if explanation is None else explanation.kept_images().to(x)), label

    def ablation(self, x: Tensor, label: Tensor) -> Ablation:
        """Images under this reader's ablation."""
        pool = self.pool if self.metric == "contrast" else None
        micro_batch, seed = self.micro_batch, self.settings.seed
        return Ablation(
            self.net, x, label, self.baseline, self.metric, micro_batch=micro_batch, seed=seed, pool=pool
        )

    def single(self, x: Tensor, label: Tensor) -> list[Circuit]:
        """The circuit of each image; which images are read together changes nothing."""
        parts = zip(x.split(self.micro_batch), label.split(self.micro_batch), strict=True)
        return [circuit for part in parts for circuit in self._read(*part, together=False)]

    def shared(self, x: Tensor, label: Tensor) -> Circuit:
        """The circuit that images share: mean ranking, mean edges, and its stability under their choice."""
        return self._read(x, label, together=True)[0]

    @cached_property
    def metric(self) -> Metric:
        """The figure that circuits have to keep."""
        if self.settings.metric is not None:
            if self.settings.metric == "contrast" and self.pool is None:
                raise RequestError("metric contrast needs reference images of other classes; give some")
            return self.settings.metric
        rivals = isinstance(self.classifier.target, Binary) or type(self.classifier.target) is Target
        return "log_prob" if rivals and self.classifier.num_classes > 1 else "logit"

    @cached_property
    def pool(self) -> Pool | None:
        """Some of the reference images with their classes."""
        if self.reference is None:
            return None
        x = self.reference[:: max(1, len(self.reference) // POOL)][:POOL]
        with torch.no_grad():
            return Pool(x, self.classifier.target.label(self.classifier.logits(x)))

    @cached_property
    def others(self) -> Ablation | None:
        """The pool under this reader's ablation, to see what a circuit does on images of other classes."""
        if self.pool is None or self.metric == "contrast":  # which has it in itself
            return None
        micro_batch, metric = self.micro_batch, self.metric
        x, label = self.pool.x, self.pool.label
        return Ablation(self.net, x, label, self.baseline, metric, micro_batch=micro_batch, lean=True)

    def test(self, circuit: Circuit, x: Tensor, label: Tensor) -> Test:
        """Test a circuit of this network on images."""
        key = torch.full((1, self.net.nodes), -torch.inf, device=x.device)
        starts = first_numbers(self.net)
        for node in circuit.members:
            key[0, starts[node.layer] + node.unit] = -node.rank
        ranking, count = Ranking(self.settings.by, torch.zeros_like(key), key), len(circuit.members)
        sizes = [size for size in self.settings.sizes if count_of(size, self.net.nodes) <= count]
        effort = Effort(self.settings.controls, self.settings.curve_controls)
        tests = examine(
            self.ablation(x, label), ranking, [count], sizes=sizes, effort=effort, others=self.others
        )
        return mean_test(tests)

    def _read(self, x: Tensor, label: Tensor, together: bool) -> list[Circuit]:
        settings, others = self.settings, self.others
        clock = _Clock(self)
        ablation = self.ablation(x, label)
        own = rank(ablation, settings.by, sizes=settings.sizes, necessity=settings.necessity)
        ranking = own.together() if together else own
        clock.pause()
        counts = self._counts(ablation, ranking)
        effort = Effort(settings.controls, settings.curve_controls)
        tests = examine(ablation, ranking, counts, sizes=settings.sizes, effort=effort, others=others)
        clock.go_on()
        groups = [list(range(len(x)))] if together else [[b] for b in range(len(x))]
        drafts = [
            draft(self.classifier, ablation, settings, ranking, place, counts[place], group)
            for place, group in enumerate(groups)
        ]
        clock.pause()
        return [
            Circuit(
                mode=settings.mode,
                level=self.level,
                label=int(label[group[0]]) if len(label[group].unique()) == 1 else -1,
                label_name=self._label_name(label[group]),
                model=type(self.classifier.model).__name__,
                fingerprint=self.classifier.fingerprint,
                layers=tuple(Layer(site.name, site.kind, site.units) for site in self.net.sites),
                nodes=measured(
                    ablation, ranking.keep(counts[place])[place], drafts[place].nodes, group, settings.members
                ),
                edges=drafts[place].edges,
                universe=self.net.nodes,
                size=counts[place] / self.net.nodes,
                images=len(group),
                test=mean_test([tests[b] for b in group]),
                stability=stability(own, counts[place], settings.seed) if together else None,
                passes=round(clock.passes / len(x), 2),
                seconds=round(clock.seconds / len(groups), 3),
                notes=(*self.notes, *drafts[place].notes),
                subject=_Subject(self, x[group], label[group]),
            )
            for place, group in enumerate(groups)
        ]

    def _counts(self, ablation: Ablation, ranking: Ranking) -> list[int]:
        if self.settings.size is not None:
            return [count_of(self.settings.size, self.net.nodes)] * len(ranking.key)
        return smallest_enough(ablation, ranking, self.settings.sizes, LIMIT)

    def _label_name(self, label: Tensor) -> str:
        classes = label.unique().tolist()
        return self.classifier.class_names[classes[0]] if len(classes) == 1 else f"{len(classes)} classes"


@dataclass(frozen=True, eq=False)
class _Subject:
    reader: Reader
    x: Tensor
    label: Tensor

    def ablate(self, circuit: Circuit, kind: str | None, controls: int) -> Test:
        reader = self.reader
        settings = replace(reader.settings, ablation=kind or reader.kind, controls=controls)  # type: ignore[arg-type]
        other = Reader(reader.classifier, settings, reference=reader.reference, blank=reader.blank)
        return other.test(circuit, self.x, self.label)


class _Clock:
    """What the readout alone takes, without its test: seconds, and forward and backward passes of single images."""

    def __init__(self, reader: Reader) -> None:
        self._net = reader.net
        self.seconds = self.passes = 0.0
        self.go_on()

    def go_on(self) -> None:
        self._started, self._before = time.perf_counter(), self._net.passes

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self._started
        self.passes += (
            self._net.passes - self._before
        ) / 3  # forward and backward are worth three forward passes


def _grey(classifier: Classifier) -> Tensor:
    channels = classifier.input_shape[0]
    return torch.tensor(GREY if channels == 3 else (sum(GREY) / 3,) * channels).view(1, -1, 1, 1)
