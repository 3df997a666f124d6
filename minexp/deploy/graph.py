"""The graphs of deployed files, written over networks that are ONNX already; no torch."""

from __future__ import annotations

import numpy as np
import onnx

from .ops import argument, build, setting
from .pictures import Pictures, masked, packed, pixels, probabilities
from .plan import Plan
from .stages import Stages


def masker_graph(masker: onnx.ModelProto, channels: int, threshold: float) -> onnx.ModelProto:
    """image uint8 [batch,height,width,C] → prob [batch,height,width], mask_bits, explanation (removed pixels black)."""
    image = argument(np.uint8, "batch", "height", "width", channels)
    prob = probabilities(masker, image, pixels(image)).squeeze(1)
    kept = prob > setting("minexp.threshold", np.float32(threshold))
    outputs = {"prob": prob, "mask_bits": packed(kept.reshape(0, -1))}
    outputs["explanation"] = masked(kept, image, np.zeros(channels, np.uint8))
    shapes = {"prob": ("height", "width"), "mask_bits": ("bytes",)}
    return build({"image": image}, outputs, shapes | {"explanation": ("height", "width", channels)})


def explainer_graph(
    masker: onnx.ModelProto,
    classifier: onnx.ModelProto,
    plan: Plan,
    pictures: Pictures,
    size: tuple[int, int],
) -> onnx.ModelProto:
    """image uint8 [batch,H,W,C] → mask and certificate; the outputs are listed in docs/deploy.md."""
    channels = len(pictures.colour)
    image = argument(np.uint8, "batch", *size, channels)
    outputs = Stages(masker, classifier, plan, pictures, size, image).outputs()
    shapes = {"kept_on": (len(plan.families) * plan.fresh,), "mask_bits": (-(-size[0] * size[1] // 8),)}
    return build({"image": image}, outputs, shapes | {"prob": size, "explanation": (*size, channels)})
