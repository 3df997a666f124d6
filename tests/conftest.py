"""What every test shares."""

import torch

# torchvision's compiled operators do not load beside a torch of another build; its classifiers need none of them,
# but importing it fails unless these two schemas exist.
if not hasattr(torch.ops.torchvision, "nms"):
    _SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    _SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
