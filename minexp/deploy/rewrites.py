"""Networks that compute the same with fewer operators, or with faster ones; all in place."""

from __future__ import annotations

import numpy as np
import onnx


def one_scaling(model: onnx.ModelProto) -> onnx.ModelProto:
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
    _drop_unused(graph)
    return model


def scattered_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """The last convolution, of one output, as the transposed one of the same sums.

    A convolution computes 16 outputs at once, of which it would throw 15 away; the transposed one multiplies each
    pixel by all its weights and adds up.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    head = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    tensor = weights[head.input[1]]
    kernel = onnx.numpy_helper.to_array(tensor)[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    tensor.CopyFrom(onnx.numpy_helper.from_array(kernel.copy(), tensor.name))
    head.op_type = "ConvTranspose"
    for attribute in [a for a in head.attribute if a.name == "auto_pad"]:
        head.attribute.remove(attribute)
    return model


def sizes_of_summands(model: onnx.ModelProto) -> onnx.ModelProto:
    """A tensor that is resized to be added to another takes its size, which the exporter derives from the input's."""
    graph = model.graph
    for resize in [node for node in graph.node if node.op_type == "Resize"]:
        sums = [node for node in graph.node if node.op_type == "Add" and resize.output[0] in node.input]
        if len(sums) == 1:
            (other,) = (name for name in sums[0].input if name != resize.output[0])
            size = f"{other}_size"
            graph.node.insert(list(graph.node).index(resize), onnx.helper.make_node("Shape", [other], [size]))
            resize.input[3] = size
    _drop_unused(graph)
    return model


def sizes_of_bytes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shapes are taken of tensors in 8 bits, which are not converted for that."""
    inside = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Shape":
            node.input[0] = inside.get(node.input[0], node.input[0])
    return model


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
