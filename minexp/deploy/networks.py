"""From torch modules to ONNX networks of one input x, float [B,C,H,W] in [0,1], and one output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from ..classifier import Classifier
from ..errors import RequestError, one_line
from ..masker import Masker
from .byte_masker import ORIGIN, ByteMasker, byte_values
from .onnx_classifier import OnnxModule
from .ops import OPSET, argument, build, call
from .quantise import quantised
from .rewrites import one_scaling, scattered_head, sizes_of_summands


class _Scores(nn.Module):
    """A classifier with its normalisation: x → scores [B,K]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.classifier = classifier.model, classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.logits(x)


def classifier_network(classifier: Classifier) -> onnx.ModelProto:
    """x [batch,C,H,W] → scores [batch,K], normalisation inside; the size is the classifier's."""
    if isinstance(classifier.model, OnnxModule):
        return classifier.model.network(classifier.preprocessing)
    with classifier.frozen():
        return _export(_Scores(classifier), classifier.input_shape, dynamic={0: "batch"}, output="scores")


class _Grid(nn.Module):
    """A masker up to the logits of its grid."""

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self.masker = masker

    def forward(self, x: Tensor) -> Tensor:
        return self.masker.grid(x)


def masker_network(masker: Masker, size: tuple[int, int]) -> onnx.ModelProto:
    """x [batch,C,height,width] → logits [batch,1,height,width] for any size; ``size`` is traced."""
    dynamic = {0: "batch", 2: "height", 3: "width"}
    with _evaluating(masker):
        grid = _export(_Grid(masker), (masker.architecture.channels, *size), dynamic=dynamic, output="grid")
    return _enlarging(_faster(grid), dynamic)


def quantised_masker(masker: Masker, pixels: npt.NDArray[np.uint8]) -> onnx.ModelProto:
    """The masker in 8 bits: x, uint8 [batch,height,width,C] → logits. Its ranges are seen on pixels [N,H,W,C]."""
    dynamic = {0: "batch", 1: "height", 2: "width"}
    with _evaluating(masker):
        grid = _export(ByteMasker(masker), pixels.shape[1:], dynamic=dynamic, output="grid")
    return _enlarging(quantised(_faster(grid), byte_values(pixels), origin=ORIGIN), dynamic)


def _faster(grid: onnx.ModelProto) -> onnx.ModelProto:
    return scattered_head(sizes_of_summands(grid))


def _enlarging(grid: onnx.ModelProto, dynamic: dict[int, str]) -> onnx.ModelProto:
    """The network with its grid [batch,1,h,w] enlarged to the size of x, bilinear.

    A side at a time, and the second with rows as channels: ONNX Runtime computes those together, in half the time.
    """
    kind, shape = grid.graph.input[0].type.tensor_type.elem_type, grid.graph.input[0].type.tensor_type.shape
    sides = [dynamic.get(axis, side.dim_value) for axis, side in enumerate(shape.dim)]
    x = argument(onnx.helper.tensor_dtype_to_np_dtype(kind), *sides)
    (batch, height, width), logits = (x.side(axis) for axis in dynamic), call(grid, x)
    rows = logits.resize(batch, 1, logits.side(2), width).squeeze(1).unsqueeze(2)
    enlarged = rows.resize(batch, height, 1, width).squeeze(2).unsqueeze(1)
    return build({"x": x}, {"logits": enlarged}, {"logits": (1, "height", "width")})


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _export(
    module: nn.Module, shape: tuple[int, ...], *, dynamic: dict[int, str], output: str
) -> onnx.ModelProto:
    device = next(module.parameters(), torch.zeros(0)).device
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    dims = {axis: torch.export.Dim(name, min=1 if axis == 0 else 16) for axis, name in dynamic.items()}
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=["x"],
                output_names=[output],
                dynamic_shapes=(dims,),
                verbose=False,
            )
    except Exception as error:
        raise RequestError(
            f"{type(module).__name__.strip('_').lower()}: torch cannot export this model to ONNX "
            f"({_cause(error)}); export it to .onnx in its own way and give that file as --model"
        ) from error
    assert program is not None
    model = one_scaling(_stripped(program.model_proto))
    batch = model.graph.output[0].type.tensor_type.shape.dim[0]
    if batch.dim_param != "batch":
        raise RequestError(
            f"the model's forward pass fixes the batch size ({batch.dim_value}); write it for any number of images"
        )
    return model


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the traces of where each node came from: they are large, and name the exporter's paths."""
    holders: list[Any] = [model, model.graph, *model.graph.node, *model.graph.initializer]
    holders += [*model.graph.input, *model.graph.output, *model.graph.value_info]
    for holder in holders:
        holder.doc_string = ""
        del holder.metadata_props[:]
    del model.graph.value_info[:]
    return model


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter reports its progress and every decomposition; none of that is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
