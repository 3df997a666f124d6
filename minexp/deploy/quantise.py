"""8-bit networks: static quantisation with scales from calibration images, and what it costs in answers."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..errors import RequestError
from .parity import Parity
from .rewrites import sizes_of_bytes
from .runtime import Explained

CALIBRATION = 64  # images are enough for the ranges of activations
WORTHWHILE = 64  # products an output from which on a first layer is faster in 8 bits: 7×7 of colours, not 3×3
# shares of images of another class, and of mask pixels, that are accepted
MOST_LABELS, MOST_FLIPS = 0.02, 0.02


@dataclass(frozen=True)
class Cost:
    """What 8 bits change, on the images of the check, against the float32 explainer.

    flips: share of mask pixels that differ; labels: of images with another class; certified, kept, area: of float32 and
    of int8; speedup: time an image of float32 over int8, one thread.
    """

    parity: Parity
    certified: tuple[float, float]
    kept: tuple[float, float]
    area: tuple[float, float]
    speedup: float

    @classmethod
    def of(cls, before: Explained, after: Explained, parity: Parity, speedup: float) -> Cost:
        pairs = {name: (share(before, name), share(after, name)) for name in ("certified", "kept", "area")}
        return cls(parity, **pairs, speedup=speedup)

    @property
    def acceptable(self) -> bool:
        """Few other answers, and no explanation that fails to keep its class."""
        return (
            self.parity.labels <= MOST_LABELS * self.parity.images
            and self.parity.mask_flip_share <= MOST_FLIPS
            and self.kept[1] >= self.kept[0]
        )

    def summary(self) -> dict[str, Any]:
        return {**asdict(self), "acceptable": self.acceptable}

    def __str__(self) -> str:
        changes = (
            f"{name} {before:.1%} → {after:.1%}"
            for name, (before, after) in (
                ("certified", self.certified),
                ("kept", self.kept),
                ("area", self.area),
            )
        )
        parity = self.parity
        return (
            f"int8 against float32 on {parity.images} images: {parity.mask_flip_share:.2%} of the mask pixels and "
            f"{parity.labels} labels differ, {', '.join(changes)}, {self.speedup:.2f} times as fast"
        )


def share(explained: Explained, name: str) -> float:
    """Mean of a field of the certificates."""
    return float(np.mean([getattr(certificate, name) for certificate in explained.certificates]))


def quantised(
    network: onnx.ModelProto, calibration: npt.NDArray[np.float32], *, origin: int | None = None
) -> onnx.ModelProto:
    """The network with 8-bit weights (a scale a channel) and activations, its ranges seen on inputs [N,…].

    origin: where given, the inputs are (byte - origin) / 255, and the quantised network takes the bytes, uint8.
    Raises RequestError when ONNX Runtime's quantiser is not there or fails.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise RequestError(
            f"quantisation needs onnx and onnxruntime ({error}); pip install 'minexp[onnx]'"
        ) from error

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts = iter(np.array_split(calibration, -(-len(calibration) // 8)))

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            part = next(self.parts, None)
            return None if part is None else {"x": np.ascontiguousarray(part)}

    with tempfile.TemporaryDirectory() as folder, _quietly():
        plain, ready, done = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "ready", "int8"))
        onnx.save(network, plain)
        try:
            quant_pre_process(plain, ready, skip_symbolic_shape=True)
            network = onnx.load(ready)
            source = _first(network).input[0]
            scales = {} if origin is None else {source: _grid(origin)}
            quantize_static(
                ready,
                done,
                Images(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(_QUANTISED),
                nodes_to_exclude=_exact_layers(network, first=origin is None),
                extra_options={"TensorQuantOverrides": scales},
            )
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise RequestError(
                f"ONNX Runtime cannot quantise this network ({text}); export it in float32"
            ) from error
        model = onnx.load(done)
    standard = [opset for opset in model.opset_import if not opset.domain]
    del model.opset_import[:]  # the quantiser names domains that it does not use
    model.opset_import.extend(standard)
    model = sizes_of_bytes(model)
    return model if origin is None else _taking_bytes(model, source, origin)


# the rest is faster in float than its way to 8 bits and back
_QUANTISED = ("Conv", "Gemm", "MatMul", "Add", "Relu")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _first(model: onnx.ModelProto) -> onnx.NodeProto:
    """The first layer with weights."""
    return next(node for node in model.graph.node if node.op_type in _WEIGHTED)


def _grid(origin: int) -> list[dict[str, Any]]:
    """Scale and zero point of (byte - origin) / 255."""
    return [{"scale": np.array(1 / 255, np.float32), "zero_point": np.array(origin, np.uint8)}]


def _taking_bytes(model: onnx.ModelProto, source: str, origin: int) -> onnx.ModelProto:
    """The model without the quantisation of ``source``: what moves values before it moves bytes as well."""
    graph = model.graph
    (quantise,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == source)
    for node in graph.node:
        node.input[:] = [source if name == quantise.output[0] else name for name in node.input]
        if node.op_type == "Pad":
            node.input[2:3] = ["origin"]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(origin, np.uint8), "origin"))
    graph.node.remove(quantise)
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    del graph.value_info[:]
    return model


def _exact_layers(model: onnx.ModelProto, *, first: bool) -> list[str]:
    """Names of the layers that stay in float.

    With ``first`` the first with weights, where it has so few that it gains nothing from 8 bits; and the last with all
    behind it, whose outputs are compared and ranked.
    """
    nodes = list(model.graph.node)
    sides = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    weighted = [place for place, node in enumerate(nodes) if node.op_type in _WEIGHTED]
    start = nodes[weighted[0]]
    few = first and math.prod(sides.get(start.input[1], ())[1:]) < WORTHWHILE
    return [node.name for node in [*([start] if few else []), *nodes[weighted[-1] :]]]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The quantiser logs a warning for every model."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
