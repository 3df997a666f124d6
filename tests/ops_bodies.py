"""Every operator test runs on each body of the operators that this machine has."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minexp import _edges, _kl
from minexp._ops import kernel_status

_REFERENCES = {
    "activation_kl": _kl.activation_kl_reference,
    "activation_kl_gradients": _kl.activation_kl_gradients_reference,
    "activation_kl_backward": _kl.activation_kl_backward_reference,
    "edge_topk": _edges.edge_topk_reference,
    "edge_threshold": _edges.edge_threshold_reference,
    "edge_select": _edges.edge_select_reference,
    "edge_position_topk": _edges.edge_position_topk_reference,
}


@pytest.fixture(scope="module", params=["reference", "cpu", "cuda"])
def device(request: Any) -> Iterator[torch.device]:
    """Where to put the tensors; under "reference" the CPU's kernels, if built, give way to the reference."""
    status = kernel_status()
    if request.param == "reference":
        with torch.library._scoped_library("minexp", "IMPL") as library:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, body in _REFERENCES.items():
                    library.impl(name, body, "CPU", allow_override=True)
            yield torch.device("cpu")
        return
    if not status[request.param]:
        pytest.skip(f"no {request.param} kernels: {status['why'][request.param]}")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    yield torch.device(request.param)
