"""The operators with compiled bodies: their Python definitions, and the kernels where they were built."""

from ._edges import edge_position_topk, edge_threshold, edge_topk, edge_total_topk
from ._extension import kernel_status, load
from ._kl import KLTarget, activation_kl

load()

__all__ = [
    "KLTarget",
    "activation_kl",
    "edge_position_topk",
    "edge_threshold",
    "edge_topk",
    "edge_total_topk",
    "kernel_status",
]
