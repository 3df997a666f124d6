"""A classifier that is itself an ONNX file: forward only, and merged into an explainer as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..classifier import Classifier
from ..data.preprocessing import Preprocessing
from ..errors import RequestError
from ..masker import Masker
from .ops import argument, build, call, constant
from .runtime import open_session
from .untrusted import read_model


class _Pass(nn.Module):
    """What it is given: a layer to tap where a file shows none of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Session(torch.autograd.Function):
    """A session's run, which nothing can be traced back through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: OnnxModule) -> Tensor:
        ctx.path = module.path
        return module.run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RequestError(
            f"{ctx.path}: an ONNX file gives no gradients, which fitting and refining need; give the model as "
            "torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory or file.py:factory"
        )


class OnnxModule(nn.Module):
    """An ONNX classifier as a module, run by ONNX Runtime: x float [B,C,H,W], normalised → scores [B,K].

    Raises RequestError for a file that does not take one batch of images of any number.
    """

    content_digest: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._content, _ = read_model(self.path)
        self._session = open_session(self._content, "cpu", torch.get_num_threads(), self.path)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            raise RequestError(f"{path}: a classifier takes one float input [B,C,H,W]; export it so")
        if isinstance(inputs[0].shape[0], int):
            raise RequestError(
                f"{path}: takes {inputs[0].shape[0]} images at once; export it with a dynamic batch"
            )
        self._input = inputs[0].name
        self.logits, self.scores = _Pass(), _Pass()
        digest = np.frombuffer(hashlib.sha256(self._content).digest(), np.uint8)
        self.register_buffer("content_digest", torch.from_numpy(digest.copy()))

    @property
    def channels(self) -> int | None:
        """Of the input, where the file says so."""
        side = self._session.get_inputs()[0].shape[1]
        return side if isinstance(side, int) else None

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the input, where the file says so."""
        height, width = self._session.get_inputs()[0].shape[2:]
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.logits(_Session.apply(x, self)))

    def run(self, x: Tensor) -> Tensor:
        """The file's first output for x, without gradient."""
        out = self._session.run(None, {self._input: x.detach().cpu().contiguous().numpy()})[0]
        return torch.from_numpy(out)

    def network(self, preprocessing: Preprocessing) -> onnx.ModelProto:
        """The file behind its normalisation: x [batch,C,H,W] in [0,1] → scores."""
        model = onnx.load_from_string(self._content)
        mean, std = (
            constant(np.array(values, np.float32).reshape(1, -1, 1, 1))
            for values in (preprocessing.mean, preprocessing.std)
        )
        x = argument(np.float32, "batch", preprocessing.channels, *preprocessing.size)
        classes = self._session.get_outputs()[0].shape[1]
        return build({"x": x}, {"scores": call(model, (x - mean) / std)}, {"scores": (classes,)})


def preprocessing_of(module: OnnxModule) -> Preprocessing | None:
    """Size and channels as the file gives them, without normalisation; None where it leaves them open."""
    if module.size is None or module.channels is None:
        return None
    plain = (0.0,) * module.channels, (1.0,) * module.channels
    return Preprocessing(size=module.size, mean=plain[0], std=plain[1], channels=module.channels)


def adopt_masker(path: str | Path, classifier: Classifier) -> Masker:
    """A masker for an ONNX classifier, which cannot be fitted to one: whatever it was fitted to.

    Its masks are proposals, and the certificate is measured on this classifier.
    """
    masker = Masker.load(path)
    masker.metadata |= {
        "classifier": classifier.fingerprint,
        "fitted_to": masker.metadata.get("classifier"),
    }
    return masker
