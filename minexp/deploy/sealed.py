"""Finished files: a graph with its metadata and seal, opened, and with pictures of what it answers."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import onnx
from PIL import Image

from .. import __version__
from .metadata import About, sealed
from .runtime import Explained, Explainer

SELFTEST = 4  # pictures that travel with the model, to be explained again where it runs


def finished(graph: onnx.ModelProto, about: About) -> bytes:
    """The file of a graph."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    model.producer_name, model.producer_version = "minexp", __version__
    onnx.helper.set_model_props(model, about.to_metadata())
    onnx.checker.check_model(model)
    return sealed(model.SerializeToString(deterministic=True))


def opened(content: bytes) -> Explainer:
    """The explainer of a file that was just made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explainer.onnx"
        path.write_bytes(content)
        return Explainer(path, trusted=True)


def selftest_rows(found: Explained) -> list[dict[str, Any]]:
    """A few pictures with what was found of them, so that a runtime elsewhere can be held to it."""
    rows = []
    for image, row in list(zip(found.images, found.rows(), strict=True))[:SELFTEST]:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG", optimize=True)
        picture = {"png": base64.b64encode(file.getvalue()).decode()}
        rows.append(picture | {name: row[name] for name in _COLUMNS})
    return rows


_COLUMNS = ("label", "conf", "conf_masked", "area", "robust_train", "evaluations", "mask_crc32", "status")
