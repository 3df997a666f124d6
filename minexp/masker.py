"""The masker: a lightweight autoencoder from an image to a keep-probability per pixel."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .classifier import Classifier
from .data.files import replacing, write_text
from .errors import RequestError

FORMAT = "minexp.masker/1"
KEEP_ALL = 2.0  # bias of the output: p = .88 everywhere at the start, so that training shrinks from keep-all


@dataclass(frozen=True)
class Architecture:
    """channels: input channels; widths: one a resolution; stride: pixels a logit covers (2 or 4)."""

    channels: int = 3
    widths: tuple[int, ...] = (12, 24, 40, 72)
    stride: int = 2


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Masker(nn.Module):
    """Autoencoder with skips: logits on a grid of one cell per ``stride`` pixels, smoothly upsampled.

    forward: [B,C,H,W] in [0,1] → logits [B,1,H,W]; p = sigmoid(logits) is the probability of keeping a pixel.
    ``reference`` holds a few images of the data it was fitted to, from which explanations draw their backgrounds.
    """

    mean: Tensor
    reference: Tensor

    def __init__(self, architecture: Architecture = Architecture()) -> None:
        super().__init__()
        self.architecture = architecture
        self.metadata: dict[str, Any] = {}
        widths, first = architecture.widths, architecture.stride // 2
        if architecture.stride not in (2, 4) or len(widths) < 3:
            raise RequestError(
                f"masker: stride {architecture.stride}, widths {widths}; give stride 2 or 4, ≥ 3 widths"
            )
        stem = [_conv(architecture.channels, widths[0], 2)]
        if first == 2:
            stem.append(_conv(widths[0], widths[0], 2))
        self.stem = nn.Sequential(*stem)
        self.down = nn.ModuleList(_conv(i, o, 2) for i, o in pairwise(widths))
        # context: dilated convolutions at the coarsest grid see the whole scene
        self.context = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[-1], widths[-1], 3, padding=d, dilation=d, bias=False),
                    nn.BatchNorm2d(widths[-1]),
                    nn.ReLU(inplace=True),
                )
                for d in (1, 2)
            )
        )
        self.narrow = nn.ModuleList(nn.Conv2d(i, o, 1, bias=False) for o, i in pairwise(widths))
        self.up = nn.ModuleList(_conv(o, o) for o in widths[:-1])
        self.head = nn.Conv2d(widths[0], 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, KEEP_ALL)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.full((architecture.channels,), 0.5))
        self.register_buffer("reference", torch.zeros(0, architecture.channels, 1, 1, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,1,H,W] of images x [B,C,H,W] in [0,1]."""
        return F.interpolate(self.grid(x), size=x.shape[2:], mode="bilinear", align_corners=False)

    def grid(self, x: Tensor) -> Tensor:
        """Logits [B,1,h,w], one a cell of ``stride`` pixels."""
        return self.from_stem(self.stem((x - 0.5) / 0.25))

    def from_stem(self, h: Tensor) -> Tensor:
        """The grid's logits, of what the stem gives."""
        skips = []
        for stage in self.down:
            skips.append(h)
            h = stage(h)
        h = self.context(h)
        for narrow, up in zip(reversed(self.narrow), reversed(self.up), strict=True):
            skip = skips.pop()
            h = F.interpolate(narrow(h), size=skip.shape[2:], mode="bilinear", align_corners=False)
            h = up(h + skip)
        logits: Tensor = self.head(h)
        return logits

    def probabilities(self, x: Tensor) -> Tensor:
        """Keep-probabilities [B,1,H,W] of x [B,C,H,W], in eval mode and without gradient."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                # kernels for one image round differently: it goes beside a copy, so that no mask depends on its batch
                together = x if len(x) > 1 else x.repeat(2, 1, 1, 1)
                return torch.sigmoid(self(together)[: len(x)])
        finally:
            self.train(training)

    def reference_images(self) -> Tensor | None:
        """The stored images as float [M,C,H,W] in [0,1], or None when there are fewer than two."""
        return self.reference.float() / 255 if len(self.reference) >= 2 else None

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds of one forward pass on one image of size (H, W)."""
        from torch.utils.flop_counter import FlopCounterMode

        x = torch.full((2, self.architecture.channels, *size), 0.5, device=self.mean.device)
        with FlopCounterMode(display=False) as counter:
            self.probabilities(x)
        return counter.get_total_flops() // 2 // len(x)

    def save(self, path: str | Path) -> None:
        """Write weights to ``path`` (.safetensors) and what they are to the .json beside it, both atomically."""
        path = Path(path)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        about = {"format": FORMAT, "architecture": asdict(self.architecture), **self.metadata}
        with replacing(path) as temporary:
            save_file(state, temporary, metadata={"minexp": json.dumps(about)})
        write_text(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Masker:
        """Read a masker that ``save`` wrote. Raises RequestError for anything else."""
        path = Path(path)
        if not path.is_file():
            raise RequestError(f"{path}: no such masker; make one with `minexp fit --out {path}`")
        try:
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("minexp", "{}"))
            state = load_file(path)
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise RequestError(f"{path}: not a readable masker ({error}); fit it again") from error
        if about.get("format") != FORMAT:
            raise RequestError(
                f"{path}: a safetensors file, but not a masker ({FORMAT}); make one with `minexp fit`"
            )
        if not {"architecture"} <= about.keys() or not {"reference", "mean"} <= state.keys():
            raise RequestError(f"{path}: a masker without its architecture or its images; fit it again")
        kind = about.pop("architecture")
        masker = Masker(Architecture(kind["channels"], tuple(kind["widths"]), kind["stride"]))
        masker.reference = torch.zeros_like(state["reference"])
        try:
            masker.load_state_dict(state)
        except RuntimeError as error:
            raise RequestError(
                f"{path}: weights do not fit the architecture it names; fit it again"
            ) from error
        if not all(v.isfinite().all() for v in state.values() if v.is_floating_point()):
            raise RequestError(
                f"{path}: holds NaN or infinite weights; fit it again with a lower learning rate"
            )
        masker.metadata = {k: v for k, v in about.items() if k != "format"}
        return masker.eval()


def load_masker(path: str | Path, classifier: Classifier) -> Masker:
    """The masker at ``path``, refused when it was fitted to another classifier."""
    masker = Masker.load(path)
    fitted = masker.metadata.get("classifier")
    if fitted != classifier.fingerprint:
        raise RequestError(
            f"{path}: fitted to another classifier (fingerprint {str(fitted)[:12]}, this one "
            f"{classifier.fingerprint[:12]}); fit one for this model with `minexp fit`"
        )
    return masker.to(classifier.device)


def straight_through(p: Tensor, threshold: float = 0.5) -> Tensor:
    """1[p > threshold] forward, gradient of p backward (Bengio et al., arXiv 1308.3432)."""
    return p + ((p > threshold).to(p.dtype) - p).detach()
