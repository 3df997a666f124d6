"""What a worker works with: the job's classifier and masker, and images, where it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..classifier import Classifier
from ..data.preprocessing import Preprocessing
from ..data.sources import ImageSource
from ..errors import RequestError
from ..masker import Masker
from ..weights import state_digest
from .unit import Pixels

Subject = tuple[Classifier, Masker | None]
Load = Callable[[str], Subject]  # on a device, in the process that calls it


@dataclass(frozen=True)
class Given:
    """A classifier and a masker as they are, on the device asked for."""

    classifier: Classifier
    masker: Masker | None = None

    def __call__(self, device: str) -> Subject:
        if str(self.classifier.device) != device:
            self.classifier.to(device)
        return self.classifier, None if self.masker is None else self.masker.to(device)


def load_for(load: Load, device: str, number: int, fingerprints: tuple[str, str | None]) -> Subject:
    """A worker's subject. device: as asked for; where it is a GPU without its number, workers take them in turn.

    fingerprints: of the job's classifier and masker. Raises RequestError for others.
    """
    if device in ("cuda", "cuda:0") and (count := torch.cuda.device_count()) > 1:
        device = f"cuda:{number % count}"
    classifier, masker = load(device)
    if (
        classifier.fingerprint,
        None if masker is None else state_digest(masker.state_dict()),
    ) != fingerprints:
        raise RequestError(
            "the model that a worker loads is not the job's: its source makes another one every time (give"
            " --weights FILE), or its files have changed"
        )
    return classifier, masker


def some_of(source: ImageSource, preprocessing: Preprocessing, count: int) -> Pixels | None:
    """Up to so many of a source's images, evenly spaced, as a model takes them: uint8 [M,H,W,C].

    None where fewer than two can be read.
    """
    pixels, count = [], min(count, len(source))
    for number in range(count):
        place = number * len(source) // count
        for item in source.range(place, place + 1, prepare=preprocessing.pixels):
            if item.image is not None:  # unreadable here, an error row later
                pixels.append(item.image)
    return np.stack(pixels) if len(pixels) > 1 else None


def images_on(device: torch.device | str, pixels: Pixels) -> Tensor:
    """uint8 [B,H,W,C] as float [B,C,H,W] in [0, 1]; it is the bytes that cross to a GPU, while it still computes."""
    x, device = torch.from_numpy(pixels), torch.device(device)
    if device.type == "cuda":
        x = x.pin_memory().to(device, non_blocking=True)
    return x.permute(0, 3, 1, 2).float().div_(255)
