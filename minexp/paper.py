"""The published recipe, as a baseline: a U-Net trained anew for every image, thresholded from the first step on.

Suhail, Anand and Sethi (arXiv 2509.23051, 2509.25686): Adam at 5e-5, 880 steps, fixed weights, the last
step's mask.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backgrounds import random_mixture
from .judge import Judge
from .masker import straight_through
from .objective import PRESETS, Objective, evaluate_terms, make_target
from .repair import Masks

STEPS, RATE = 880, 5e-5
WIDTHS = (32, 64, 128, 256, 512)
LAYER_WEIGHTS = (1.0, 2.0, 2.0, 4.0, 8.0)  # stem and the four stages of a ResNet-18


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., arXiv 1505.04597) of five widths, 7.8 M parameters: [B,C,H,W] → logits [B,1,H,W]."""

    def __init__(self, channels: int = 3, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.down = nn.ModuleList(_double(i, o) for i, o in pairwise((channels, *widths)))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in pairwise(widths))
        self.up = nn.ModuleList(_double(2 * i, i) for i in widths[:-1])
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for place, stage in enumerate(self.down):
            x = stage(x if place == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for grow, up in zip(reversed(self.grow), reversed(self.up), strict=True):
            skip = skips.pop()
            x = grow(x)
            if x.shape[2:] != skip.shape[2:]:  # a side that 16 does not divide
                x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = up(torch.cat([x, skip], 1))
        return self.head(x)


def objective_for(taps: int, objective: Objective | None = None) -> Objective:
    """The published weights for a model of that many taps; the deepest taps take the published layer weights."""
    objective = PRESETS["paper"] if objective is None else objective
    padded = (1.0,) * (taps - len(LAYER_WEIGHTS)) + LAYER_WEIGHTS
    return replace(objective, layer_weights=padded[-taps:])


def optimise(
    judge: Judge,
    x: Tensor,
    *,
    steps: int = STEPS,
    lr: float = RATE,
    seed: int = 0,
    objective: Objective | None = None,
) -> Masks:
    """The last step's mask of each image of x [B,C,H,W], one after another; it holds or it does not.

    A gradient step counts as two evaluations of each of its two images.
    """
    classifier, found = judge.classifier, []
    objective = objective_for(len(classifier.taps), objective)
    with classifier.frozen():
        for image in x.split(1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = UNet(x.shape[1]).to(x.device)
            rng = torch.Generator().manual_seed(seed)
            optimiser = torch.optim.Adam(model.parameters(), lr=lr)
            target = make_target(classifier, image, objective, reused=True)
            background = judge.backgrounds.default(image)
            reference = judge.backgrounds.reference
            for _ in range(steps):
                p = torch.sigmoid(model(image))
                # other images lend their statistics where there are any
                if reference is None:
                    source = image
                else:
                    place = int(torch.randint(len(reference), (1,), generator=rng))
                    source = reference[place : place + 1].to(image)
                random = random_mixture(source, judge.backgrounds.mean.to(image), rng)
                terms = evaluate_terms(
                    objective, classifier, image, p, straight_through(p), target, background, random
                )
                optimiser.zero_grad(set_to_none=True)
                terms.total(objective, objective.area).backward()
                optimiser.step()
            with torch.no_grad():
                mask = torch.sigmoid(model(image)) > 0.5
            verdict = judge.holds(image, target.decision, mask)
            spent = verdict.spent + 2 * 2 * steps + 1
            level = torch.full((1,), 0.5, device=x.device)
            found.append(Masks(mask, verdict.ok, level, spent, verdict.scores, torch.zeros_like(spent)))
    return Masks.cat(found)
