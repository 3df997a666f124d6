"""Exported explainers that several tests use, written once."""

import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from trained_tiles import masker, tiles

from minexp.deploy.export import Draft, Exported, export
from minexp.predicate import Predicate

_NETWORKS = Draft.networks


@cache
def folder() -> Path:
    """Where the files of this test session are; removed with its temporary directory."""
    return Path(_holder().name)


@cache
def _holder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="minexp-deployed-")


def images(count: int = 100) -> np.ndarray:
    """Held-out mosaics, uint8 [N,24,24,3]."""
    x = tiles().x[:count]
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@cache
def exported() -> Exported:
    """The tiles' explainer in float32."""
    with patch.object(Draft, "networks", lambda self: networks()):
        return export(tiles().classifier, masker(), folder() / "float32", images=images(16))


@cache
def draft(predicate: Predicate | None = None) -> Draft:
    return Draft.make(tiles().classifier, masker(), predicate or Predicate(), "mean", 0)


@cache
def networks() -> tuple:
    return _NETWORKS(draft())
