"""Finds the compiled kernels, if they were built, and says why any are missing."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

# Names of the operators with compiled bodies; registering one is what "loaded" means.
_PROBE = "minexp::activation_kl"
_loaded_from: str | None = None
_why_not: str | None = None


def load() -> None:
    """Load `_kernels.abi3.so` beside this file; without it the PyTorch reference serves."""
    global _loaded_from, _why_not
    if os.environ.get("MINEXP_KERNELS", "1") == "0":
        _why_not = "switched off by MINEXP_KERNELS=0"
        return
    library = next(Path(__file__).parent.glob("_kernels*.so"), None)
    if library is None:
        _why_not = "not built (no C++ compiler or no torch at build time); PyTorch reference in use"
        return
    try:
        torch.ops.load_library(str(library))
        _loaded_from = library.name
    except OSError as error:  # an incompatible torch: the reference still gives the same answers
        _why_not = (
            f"{library.name} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
        )


def kernel_status() -> dict[str, Any]:
    """What is loaded: `cpu`, `cuda` (bool), `library` (file name or None), `architectures`, `why` (of each False)."""
    status: dict[str, Any] = {"library": _loaded_from, "architectures": "", "why": {}}
    for name, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        status[name] = torch._C._dispatch_has_kernel_for_dispatch_key(_PROBE, key)
        if not status[name]:
            status["why"][name] = _why_not or "built without CUDA (needs CUDA_HOME and a CUDA build of torch)"
    if status["cuda"]:
        library = ctypes.CDLL(str(Path(__file__).parent / str(_loaded_from)))
        library.minexp_cuda_architectures.restype = ctypes.c_char_p
        status["architectures"] = library.minexp_cuda_architectures().decode()
        if not torch.cuda.is_available():
            status["why"]["device"] = "CUDA kernels are loaded, but torch sees no CUDA device"
    return status
