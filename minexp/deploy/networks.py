"""From torch modules to ONNX networks of one input x, float [B,C,H,W] in [0,1], and one output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..classifier import Classifier
from ..errors import RequestError, one_line
from ..masker import Masker
from .onnx_classifier import OnnxModule
from .ops import OPSET


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
        return _export(_Scores(classifier), classifier.input_shape, dynamic=("batch",), output="scores")


def masker_network(masker: Masker, size: tuple[int, int]) -> onnx.ModelProto:
    """x [batch,C,height,width] → logits [batch,1,height,width] for any size; ``size`` is traced."""
    training = masker.training
    masker.eval()
    try:
        shape = (masker.architecture.channels, *size)
        return _export(masker, shape, dynamic=("batch", "height", "width"), output="logits")
    finally:
        masker.train(training)


def _export(
    module: nn.Module, shape: tuple[int, int, int], *, dynamic: tuple[str, ...], output: str
) -> onnx.ModelProto:
    device = next(module.parameters(), torch.zeros(0)).device
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    axes = dict(zip((0, 2, 3), dynamic, strict=False))
    dims = {axis: torch.export.Dim(name, min=1 if axis == 0 else 16) for axis, name in axes.items()}
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
    model = _one_scaling(_stripped(program.model_proto))
    batch = model.graph.output[0].type.tensor_type.shape.dim[0]
    if batch.dim_param != "batch":
        raise RequestError(
            f"the model's forward pass fixes the batch size ({batch.dim_value}); write it for any number of images"
        )
    return model


def _one_scaling(model: onnx.ModelProto) -> onnx.ModelProto:
    """The normalisation x ↦ (x - mean) / std in one pass over the image: ONNX Runtime fuses no two of its operators."""
    graph, x = model.graph, model.graph.input[0]
    channels = x.type.tensor_type.shape.dim[1].dim_value
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    subtract = next((n for n in graph.node if n.op_type == "Sub" and n.input[0] == x.name), None)
    users = [] if subtract is None else [n for n in graph.node if subtract.output[0] in n.input]
    if subtract is None or len(users) != 1 or users[0].op_type != "Div":
        return model
    divide = users[0]
    names = (subtract.input[1], divide.input[1])
    if divide.input[0] != subtract.output[0] or any(
        name not in weights or weights[name].size not in (1, channels) for name in names
    ):
        return model
    mean, std = (np.broadcast_to(weights[name].reshape(-1), channels) for name in names)
    tensors = {"scale": 1 / std, "bias": np.zeros(channels), "mean": mean, "var": np.ones(channels)}
    inputs = [x.name]
    for name, values in tensors.items():
        inputs.append(f"normalise_{name}")
        graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), inputs[-1]))
    scaled = onnx.helper.make_node("BatchNormalization", inputs, [divide.output[0]], "normalise", epsilon=0.0)
    graph.node.insert(list(graph.node).index(subtract), scaled)
    graph.node.remove(subtract)
    graph.node.remove(divide)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
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
