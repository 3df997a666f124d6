"""Processes that train together, as torchrun starts them: who takes which images, and what they know together.

The answer is that of one process: batch normalisation takes its statistics over the whole batch, gradients and figures
are sums over all of it. A masker has some hundred thousand weights, whose gradients are exchanged in one message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import RequestError


@dataclass(frozen=True)
class Ranks:
    """This process among ``count`` of them."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Is it the one that writes files and talks?"""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Which images of a batch are this process's; shares differ by one image at most."""
        return slice(self.rank * batch // self.count, (self.rank + 1) * batch // self.count)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; gradients pass."""
        return values if self.count == 1 else _Sum.apply(values)

    def sum_gradients(self, module: nn.Module) -> None:
        """Add up what each process's images say about the weights."""
        if self.count == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(whole)
        for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, number: int) -> bool:
        """Do all processes have the same number?"""
        if self.count == 1:
            return True
        found: list[int | None] = [None] * self.count
        dist.all_gather_object(found, number)
        return len(set(found)) == 1


ALONE = Ranks()


class _Sum(torch.autograd.Function):
    """The derivative of a sum that every process gets is the sum of what every process does with it."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        out = values.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        out = gradients[0].clone()
        dist.all_reduce(out)
        return out


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun has started, or that the caller has joined already; this one alone without either."""
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise RequestError(
                f"the other processes are not reached ({error}); start them with torchrun, or unset WORLD_SIZE"
            ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
    finally:
        if ours:
            dist.destroy_process_group()


@contextmanager
def whole_batches(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Batch normalisation over the images of all processes, which torch's own has for GPUs only."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)] if ranks.count > 1 else []
    for norm in norms:
        norm.forward = partial(_batch_norm, norm, ranks)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _batch_norm(norm: nn.BatchNorm2d, ranks: Ranks, x: Tensor) -> Tensor:
    """Equation of torch.nn.BatchNorm2d, with statistics of every process's x [B,C,H,W]."""
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    sums = ranks.sum(torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    centred = x - mean.view(1, -1, 1, 1)
    variance = ranks.sum((centred * centred).sum((0, 2, 3))) / count
    with torch.no_grad():
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None and norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        norm.num_batches_tracked += 1
    scale = (norm.weight * torch.rsqrt(variance + norm.eps)).view(1, -1, 1, 1)
    return centred * scale + norm.bias.view(1, -1, 1, 1)
