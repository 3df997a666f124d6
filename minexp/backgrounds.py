"""What removed pixels become: families of random backgrounds for training and held out from it.

Kept under one background says little, so masks are trained and judged on a mixture of families that
includes the data's own statistics without its objects, and judged again on families never trained on.
Every draw is a function of a seed, never of the batch it is used in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .families import DEFAULT, FROM_IMAGE, FROM_REFERENCE, HELD_OUT, OTHER, POOL, RANDOM, TRAINING

__all__ = [
    "DEFAULT",
    "FAMILIES",
    "FROM_IMAGE",
    "FROM_REFERENCE",
    "GREY",
    "HELD_OUT",
    "OTHER",
    "POOL",
    "RANDOM",
    "TRAINING",
    "Backgrounds",
    "draw_numbers",
    "random_mixture",
]
GREY = (0.485, 0.456, 0.406)  # ImageNet's mean colour, the field's usual grey

Family = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _rand(like: Tensor, rng: torch.Generator, *shape: int) -> Tensor:
    # drawn on the CPU so that a seed means the same on every device
    return torch.rand(shape, generator=rng).to(like.device, like.dtype)


def _randn(like: Tensor, rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng).to(like.device, like.dtype)


def mean_colour(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """The mean colour everywhere."""
    return mean.view(1, -1, 1, 1).expand_as(source)


def uniform_noise(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """Independent uniform noise in every value."""
    return _rand(source, rng, *source.shape)


def gaussian_noise(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 1/4 about the mean colour."""
    return (mean.view(1, -1, 1, 1) + 0.25 * _randn(source, rng, *source.shape)).clamp(0, 1)


def flat_colour(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """One random colour an image."""
    return _rand(source, rng, *source.shape[:2], 1, 1).expand_as(source)


def phase_scrambled(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """The source's amplitude spectrum with random phases, the same shift in every channel."""
    spectrum = torch.fft.rfft2(source)
    noise = torch.fft.rfft2(_randn(source, rng, source.shape[0], 1, *source.shape[2:]))
    shift = noise / noise.abs().clamp_min(1e-12)
    shift[..., 0, 0] = 1  # the mean stays
    return torch.fft.irfft2(spectrum * shift, s=source.shape[2:]).clamp(0, 1)


def blurred(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """The source under a Gaussian blur of 8–16 % of its shorter side."""
    rows, columns = (m.to(source.device, source.dtype) for m in blur_matrices(source.shape[2:], rng))
    return rows @ source @ columns.T


def blur_matrices(size: Sequence[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """[H,H] and [W,W]: what `blurred` multiplies rows and columns by; a product is faster than a wide convolution."""
    sigma = min(size) * (0.08 + 0.08 * torch.rand((), generator=rng).item())
    return _blur_matrix(size[0], sigma), _blur_matrix(size[1], sigma)


@lru_cache(maxsize=64)  # a job draws few widths, each for every image
def _blur_matrix(n: int, sigma: float) -> Tensor:
    """[n,n]: Gaussian blur of n values, reflected at both ends."""
    radius = min(math.ceil(3 * sigma), n - 1)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = (torch.arange(n)[:, None] + offsets).abs()
    taps = torch.where(taps > n - 1, 2 * (n - 1) - taps, taps)
    return torch.zeros(n, n).scatter_add_(1, taps, (kernel / kernel.sum()).expand(n, -1).contiguous())


def shuffled_patches(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """The source cut into patches of 1/8 of its side, in random order."""
    b, c, h, w = source.shape
    rows, cols = min(8, h), min(8, w)
    ph, pw = h // rows, w // cols
    inner = source[:, :, : ph * rows, : pw * cols].reshape(b, c, rows, ph, cols, pw)
    patches = inner.permute(0, 2, 4, 1, 3, 5).reshape(b, rows * cols, c, ph, pw)
    order = torch.rand(b, rows * cols, generator=rng).argsort(1).to(source.device)
    mixed = patches[torch.arange(b, device=source.device)[:, None], order]
    out = mixed.view(b, rows, cols, c, ph, pw).permute(0, 3, 1, 4, 2, 5).reshape(b, c, ph * rows, pw * cols)
    return F.interpolate(out, size=(h, w), mode="nearest") if out.shape != source.shape else out


def texture(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """Two coloured gratings over a smooth colour cloud."""
    b, c, h, w = source.shape
    cloud = F.interpolate(_rand(source, rng, b, c, 4, 4), size=(h, w), mode="bilinear", align_corners=False)
    y = torch.arange(h, device=source.device, dtype=source.dtype).view(1, 1, h, 1) / h
    x = torch.arange(w, device=source.device, dtype=source.dtype).view(1, 1, 1, w) / w
    for _ in range(2):
        angle, phase, cycles = (_rand(source, rng, b, 1, 1, 1) for _ in range(3))
        wave = torch.cos(math.pi * angle) * x + torch.sin(math.pi * angle) * y
        tint = 0.5 * (_rand(source, rng, b, c, 1, 1) - 0.5)
        cloud = cloud + tint * torch.sin(2 * math.pi * (wave * (3 + 17 * cycles) + phase))
    return cloud.clamp(0, 1)


def other_image(source: Tensor, mean: Tensor, rng: torch.Generator) -> Tensor:
    """Another image of the data as it is."""
    return source


FAMILIES: dict[str, Family] = {
    "mean": mean_colour,
    "uniform": uniform_noise,
    "gaussian": gaussian_noise,
    "flat": flat_colour,
    "phase": phase_scrambled,
    "blur": blurred,
    "shuffled": shuffled_patches,
    "texture": texture,
    OTHER: other_image,
}


def random_mixture(
    x: Tensor, mean: Tensor, rng: torch.Generator, families: Sequence[str] = TRAINING
) -> Tensor:
    """One background [B,C,H,W] an image, its family drawn at random; other images come from the same batch."""
    choice = torch.randint(len(families), (len(x),), generator=rng)
    others = x.roll(1, 0)
    out = torch.empty_like(x)
    for index, family in enumerate(families):
        slots = (choice == index).nonzero().flatten().to(x.device)
        if len(slots):
            source = x if family in FROM_IMAGE else others
            out[slots] = FAMILIES[family](source[slots], mean, rng)
    return out


def draw_numbers(x: Tensor) -> Tensor:
    """An image's own first draw, [B] in [0, 2^31): a weighted sum of its 8-bit values, which any runtime can repeat."""
    values = (x * 255).round().long().flatten(1)
    weights = torch.arange(values.shape[1], device=x.device) * 40503 % 65521
    return ((values * weights).sum(1) % 2**31).cpu()


class Backgrounds:
    """Draws of a job's backgrounds for inputs of one shape.

    mean: colour [C] that removed pixels take by default. reference: other images [M,C,H,W] of the data
    (M ≥ 2), or None: then families that need other images use the explained image itself, and "whole
    other images" is not measured.
    """

    def __init__(self, mean: Tensor, reference: Tensor | None = None, seed: int = 0) -> None:
        self.mean = mean
        self.reference = reference
        self.seed = seed
        self._pools: dict[tuple[str, str, torch.Size], Tensor] = {}

    def default(self, x: Tensor) -> Tensor:
        """The default background of x: its mean colour, [1,C,1,1]."""
        return self.mean.to(x.device, x.dtype).view(1, -1, 1, 1)

    def shared(self, family: str) -> bool:
        """True when a draw does not depend on the explained image."""
        return family not in FROM_IMAGE and (self.reference is not None or family not in FROM_REFERENCE)

    def draw(self, family: str, x: Tensor, picks: Tensor, *, purpose: str, pool: int = POOL) -> Tensor:
        """Backgrounds [B,k,C,H,W]: for image b of x [B,C,H,W] the draws numbered picks [B,k] (taken mod ``pool``).

        ``purpose`` names an independent stream: the predicate's draws are never the certificate's.
        """
        picks = picks % pool
        if self.shared(family):
            return self._pool(family, x, purpose, pool)[picks.to(x.device)]
        out = torch.empty(*picks.shape, *x.shape[1:], device=x.device, dtype=x.dtype)
        mean = self.mean.to(x.device, x.dtype)
        for number in picks.unique().tolist():
            image, slot = (picks == number).nonzero(as_tuple=True)
            if family in FROM_IMAGE:  # nothing but the number's own blur is random: the same for every image
                rng = self._generator(family, purpose, int(number))
                out[image, slot] = FAMILIES[family](x[image], mean, rng)
                continue
            # a generator an image and number: the same draw whatever else is in the batch
            for b, k in zip(image.tolist(), slot.tolist(), strict=True):
                rng = self._generator(family, purpose, int(number))
                out[b, k] = FAMILIES[family](x[b : b + 1], mean, rng)[0]
        return out

    def pool(self, family: str, x: Tensor, *, purpose: str, count: int) -> Tensor:
        """The first ``count`` draws [count,C,H,W] of a shared family, for images like x [B,C,H,W]."""
        return self._pool(family, x, purpose, count)

    def blurs(self, size: Sequence[int], *, purpose: str, count: int) -> tuple[Tensor, Tensor]:
        """Matrices [count,H,H] and [count,W,W] of the first draws of the family "blur" (`blur_matrices`)."""
        pairs = [blur_matrices(size, self._generator("blur", purpose, n)) for n in range(count)]
        rows, columns = zip(*pairs, strict=True)
        return torch.stack(rows), torch.stack(columns)

    def _generator(self, family: str, purpose: str, number: int) -> torch.Generator:
        text = f"{self.seed}/{purpose}/{family}/{number}".encode()
        value = 2166136261
        for byte in text:  # FNV-1a: stable over processes, which hash() is not
            value = (value ^ byte) * 16777619 % 2**32
        return torch.Generator().manual_seed(value)

    def _pool(self, family: str, x: Tensor, purpose: str, count: int) -> Tensor:
        key = (family, purpose, torch.Size((count, *x.shape[1:])))
        if key not in self._pools:
            mean = self.mean.to(x.device, x.dtype)
            draws = []
            for number in range(count):
                rng = self._generator(family, purpose, number)
                source = x.new_zeros(1, *x.shape[1:])
                if family in FROM_REFERENCE and self.reference is not None:
                    chosen = int(torch.randint(len(self.reference), (1,), generator=rng))
                    source = self.reference[chosen : chosen + 1].to(x.device, x.dtype)
                    if source.shape[2:] != x.shape[2:]:
                        source = F.interpolate(source, size=x.shape[2:], mode="bilinear", align_corners=False)
                draws.append(FAMILIES[family](source, mean, rng))
            # pictures, as images are: 8 bits, which an exported explainer carries exactly
            self._pools[key] = torch.cat(draws).mul(255).round().div(255)
        return self._pools[key]
