"""Other explainers' maps: each an optional import, called on the same classifier with the same fill.

An adaptor maps images x [B,C,H,W] in [0,1] and classes [B] to heat maps [B,H,W], high where the class's evidence is.
What it costs is counted at the model: a forward pass of an image is an evaluation, a gradient counts as one more.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minexp.classifier import Classifier

Adaptor = Callable[["Subject", Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """The classifier, what removed pixels become [1,C,1,1], and a budget of evaluations an image, or None."""

    classifier: Classifier
    fill: Tensor
    budget: int | None = None

    def scores(self, x: Tensor) -> Tensor:
        """[B,K] of pixels [B,C,H,W]."""
        return self.classifier.logits(x)

    def shifted(self) -> nn.Module:
        """The classifier of x − fill: tools that remove pixels by zeroing them then use the fill."""
        return _Shifted(self)

    def samples(self, default: int) -> int:
        return default if self.budget is None else self.budget


class _Shifted(nn.Module):
    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, x: Tensor) -> Tensor:
        return self.subject.scores((x + self.subject.fill).clamp(0, 1))


@contextmanager
def counting(classifier: Classifier) -> Iterator[list[int]]:
    """Evaluations so far, in a list of one: images forward, and once more for those whose gradient may be asked."""
    count = [0]

    def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        count[0] += len(x) * (2 if torch.is_grad_enabled() and x.requires_grad else 1)

    handle = classifier.model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def grad_cam(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """captum LayerGradCam at the last tap."""
    from captum.attr import LayerAttribution, LayerGradCam

    layer = subject.classifier.model.get_submodule(subject.classifier.taps[-1])
    heat = LayerGradCam(subject.scores, layer).attribute(x.clone().requires_grad_(True), target=label)
    return LayerAttribution.interpolate(heat, x.shape[2:], "bilinear")[:, 0].detach()


def integrated_gradients(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """captum IntegratedGradients, 50 steps by default; magnitudes summed over channels and smoothed a little."""
    from captum.attr import IntegratedGradients

    steps = max(2, subject.samples(100) // 2)
    heat = IntegratedGradients(subject.scores).attribute(
        x, baselines=subject.fill.expand_as(x), target=label, n_steps=steps, internal_batch_size=128
    )
    return heat.abs().sum(1).detach()


def feature_ablation(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """captum FeatureAblation on a grid of 8×8 cells, or as many as the budget pays for."""
    from captum.attr import FeatureAblation

    h, w = x.shape[2:]
    side = max(2, int((subject.samples(65) - 1) ** 0.5))
    rows, columns = (torch.arange(n) * side // n for n in (h, w))
    cells = (rows[:, None] * side + columns[None, :])[None, None]
    with torch.no_grad():
        return _each(
            x,
            label,
            lambda one, y: (
                FeatureAblation(subject.scores)
                .attribute(
                    one,
                    baselines=subject.fill.expand_as(one),
                    target=y,
                    feature_mask=cells,
                    perturbations_per_eval=64,
                )
                .sum(1)
            ),
        )


def occlusion(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """captum Occlusion: a window of an eighth of the image, by halves of it."""
    from captum.attr import Occlusion

    c, h, w = x.shape[1:]
    window = (c, h // 8, w // 8)
    places = subject.samples(226) - 1
    step = max(1, round(h * 7 / 8 / max(1.0, places**0.5 - 1)))
    with torch.no_grad():
        return _each(
            x,
            label,
            lambda one, y: (
                Occlusion(subject.scores)
                .attribute(
                    one,
                    window,
                    strides=(c, step, step),
                    baselines=subject.fill.expand_as(one),
                    target=y,
                    perturbations_per_eval=64,
                )
                .sum(1)
            ),
        )


def lime(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """lime on its default segments (quickshift), 1,000 samples by default."""
    from lime.lime_image import LimeImageExplainer

    def probabilities(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            z = torch.from_numpy(np.asarray(images, np.float32)).permute(0, 3, 1, 2)
            return subject.scores(z).softmax(1).numpy()

    heat = []
    for one, y in zip(x, label.tolist(), strict=True):
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            found = LimeImageExplainer(random_state=0).explain_instance(
                one.permute(1, 2, 0).numpy().astype(np.float64),
                probabilities,
                labels=(y,),
                top_labels=None,
                hide_color=subject.fill.flatten().numpy(),
                num_samples=subject.samples(1000),
                batch_size=64,
                random_seed=0,
            )
        weights = dict(found.local_exp[y])
        heat.append(torch.from_numpy(np.vectorize(weights.get)(found.segments).astype(np.float32)))
    return torch.stack(heat)


def shap(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """shap's partition explainer, 500 evaluations by default."""
    import shap as package

    shape = (*x.shape[2:], x.shape[1])
    fill = subject.fill[0].expand_as(x[0]).permute(1, 2, 0).numpy()

    def probabilities(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            z = torch.from_numpy(np.asarray(images, np.float32)).permute(0, 3, 1, 2)
            return subject.scores(z).softmax(1).numpy()

    explainer = package.PartitionExplainer(probabilities, package.maskers.Image(fill.copy(), shape))
    heat = []
    for one, y in zip(x, label.tolist(), strict=True):
        found = explainer(
            one.permute(1, 2, 0).numpy()[None],
            max_evals=subject.samples(500),
            batch_size=64,
            outputs=[y],
            silent=True,
        )
        heat.append(torch.from_numpy(np.asarray(found.values)[0, ..., 0].sum(-1).astype(np.float32)))
    return torch.stack(heat)


def rise(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """TorchRay's RISE, 8,000 masks by default."""
    from torchray.attribution.rise import rise as attribute

    model = subject.shifted()
    return _each(
        x - subject.fill,
        label,
        lambda one, y: attribute(model, one, target=y, num_masks=subject.samples(8000), batch_size=128)[:, y],
    )


def extremal_perturbation(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """TorchRay's extremal perturbation: masks of 2.5, 5, 10 and 20 % of the area, 800 steps, summed.

    Its blur is scaled from 224 pixels to the image's size. A budget pays for fewer steps.
    """
    from torchray.attribution.extremal_perturbation import extremal_perturbation as optimise

    areas = [0.025, 0.05, 0.1, 0.2]
    steps = max(2, subject.samples(800 * 2 * len(areas)) // (2 * len(areas)))
    scale = min(x.shape[2:]) / 224
    model = subject.shifted()
    return _each(
        x - subject.fill,
        label,
        lambda one, y: optimise(
            model,
            one,
            y,
            areas=areas,
            perturbation="fade",
            max_iter=steps,
            num_levels=8,
            step=max(2, round(7 * scale)),
            sigma=max(2.0, 21 * scale),
            smooth=0.09,
        )[0].sum(0),
    )


def rex(subject: Subject, x: Tensor, label: Tensor) -> Tensor:
    """ReX's responsibility map with its defaults (20 iterations); a budget pays for fewer."""
    from rex_xai.explanation.rex import calculate_responsibility
    from rex_xai.input.config import CausalArgs
    from rex_xai.input.input_data import Data
    from rex_xai.responsibility.prediction import from_pytorch_tensor

    def predict(z: Tensor, target: Any = None) -> Any:
        with torch.no_grad():
            return from_pytorch_tensor(subject.shifted()(z if z.ndim == 4 else z[None]), target)

    heat = []
    for one, y in zip(x - subject.fill, label.tolist(), strict=True):
        settings = CausalArgs()
        settings.batch_size, settings.seed, settings.progress_bar, settings.gpu = 64, 0, False, False
        settings.min_box_size = max(1, round(10 * min(x.shape[2:]) / 224))
        if subject.budget is not None:
            settings.iters = max(1, subject.budget // 60)
        data = Data(None, [1, *one.shape], "cpu", mode="RGB")
        data.data, data.mask_value = one[None], 0
        data.target = predict(one[None])[0]
        maps, _ = calculate_responsibility(data, settings, predict)
        found = maps.get(y)
        heat.append(
            torch.zeros(one.shape[1:]) if found is None else torch.as_tensor(np.asarray(found)).float()
        )
    return torch.stack(heat)


def _each(x: Tensor, label: Tensor, attribute: Callable[[Tensor, int], Tensor]) -> Tensor:
    maps = [attribute(one, int(y)) for one, y in zip(x.split(1), label, strict=True)]
    return torch.cat([m.detach().float().reshape(1, *x.shape[2:]) for m in maps])


@dataclass(frozen=True)
class Peer:
    """One explainer: the module it needs, its adaptor, its budgets of evaluations (None: its own default).

    costly: takes seconds an image at its default, and is run on fewer of them.
    """

    name: str
    module: str
    attribute: Adaptor
    budgets: tuple[int | None, ...] = (None, 64, 256)
    costly: bool = False


PEERS = (
    Peer("gradcam", "captum", grad_cam, (None,)),
    Peer("integrated gradients", "captum", integrated_gradients),
    Peer("feature ablation", "captum", feature_ablation),
    Peer("occlusion", "captum", occlusion),
    Peer("lime", "lime", lime),
    Peer("shap", "shap", shap),
    Peer("rise", "torchray", rise, costly=True),
    Peer("rex", "rex_xai", rex, costly=True),
    Peer("extremal perturbation", "torchray", extremal_perturbation, costly=True),
)


def missing(peer: Peer) -> str | None:
    """Why a peer cannot run here, or None."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(peer.module)
    except Exception as error:  # an old package may fail in any way
        return f"{peer.name} left out: {peer.module} cannot be imported ({type(error).__name__}: {error})"
    logging.getLogger(peer.module).setLevel(logging.ERROR)
    return None
