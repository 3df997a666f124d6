"""What circuits are measured on: the scenes' ResNet, or any model with images of yours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minexp.circuit.readout import Reader
from minexp.circuit.settings import Settings
from minexp.classifier import Classifier, load_classifier
from minexp.data import scenes, subjects
from minexp.data.files import replacing
from minexp.data.sources import open_source
from minexp.jobs.circuits import sample

REFERENCES = 128
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Subject:
    """A classifier, images [B,C,H,W] to read circuits of, and others that baselines rest on."""

    name: str
    classifier: Classifier
    x: Tensor
    reference: Tensor

    def reader(self, **settings: Any) -> Reader:
        """A reader with mean ablation over the reference images, whose mean colour removed pixels take."""
        blank = self.reference.mean((0, 2, 3)).view(1, -1, 1, 1)
        return Reader(self.classifier, Settings(**settings), reference=self.reference, blank=blank)


def scenes_subject(images: int, folder: Path | None, say: Say) -> Subject:
    model = subjects.SceneNet(10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train() -> torch.nn.Module:
        say("training the classifier")
        return subjects.train_subject("plain", progress=True)

    classifier = subjects.classifier(
        lent(model, folder and folder / "plain" / "classifier.safetensors", train)
    )
    x = tensor(scenes.make("plain", images, split="test").images)
    reference = tensor(scenes.make("plain", REFERENCES, seed=5, split="train").images)
    return Subject("scenes", classifier, x, reference)


def lent(model: Any, path: Path | None, train: Callable[[], Any]) -> Any:
    """The model with the weights in ``path``, or trained, and then kept there."""
    from safetensors.torch import load_file, save_file

    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    model = train().eval()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
    return model


def given_subject(model: str, data: str | None, weights: str | None, images: int) -> Subject:
    if data is None:
        sys.exit("--model needs --data, images of yours")
    classifier = load_classifier(model, weights=weights)
    source = open_source(data)
    x, reference = sample(source, classifier, images), sample(source, classifier, REFERENCES)
    if x is None or reference is None:
        sys.exit(f"{data} has fewer than two images that can be read")
    return Subject(type(classifier.model).__name__, classifier, x, reference)


def tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
