"""Compiles the operators where torch and a C++ compiler are at hand; all other settings are in pyproject.toml.

MINEXP_BUILD=auto|0|1   0: pure Python, the operators run on plain PyTorch; 1: no compiler or no torch is an error
MINEXP_CUDA=auto|0|1    CUDA kernels; 1: no CUDA toolkit or no CUDA build of torch is an error
TORCH_CUDA_ARCH_LIST    architectures, by default 8.0, 9.0 and PTX for what comes later; no device is asked
A build inside pip's isolation sees no torch: use `pip install --no-build-isolation`.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = ["csrc/module.cpp", "csrc/kl.cpp", "csrc/edges.cpp"]
CUDA_SOURCES = [
    "csrc/kl_launch.cu",
    "csrc/edges_launch.cu",
]  # objects are named after the stem: not kl, not edges


def knob(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"minexp: {name} is {value!r}, expected auto, 0 or 1")
    return value


def without(reason: str, name: str) -> None:
    if knob(name) == "1":
        raise SystemExit(f"minexp: {name}=1, but {reason}")
    print(f"minexp: {reason}", file=sys.stderr)


def extension() -> dict:
    if knob("MINEXP_BUILD") == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        without("torch cannot be imported here: the operators will run on plain PyTorch", "MINEXP_BUILD")
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        without(
            f"there is no C++ compiler ({compiler}): the operators will run on plain PyTorch", "MINEXP_BUILD"
        )
        return {}

    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    if platform.machine() in ("x86_64", "AMD64"):
        cxx.append("-mprefer-vector-width=512")
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
    sources, links, includes, libraries = list(SOURCES), [], [], []
    home = cpp_extension.CUDA_HOME
    if knob("MINEXP_CUDA") != "0":
        if home and torch.version.cuda:
            architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
            sources += CUDA_SOURCES
            macros += [("MINEXP_CUDA", None), ("USE_CUDA", None)]
            macros.append(("MINEXP_CUDA_ARCHITECTURES", f'"{architectures}"'))
            includes.append(str(Path(home, "include")))
            libraries += [str(path) for path in (Path(home, "lib64"), Path(home, "lib")) if path.is_dir()]
            links = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        else:
            without("no CUDA_HOME, or torch is a CPU build: no CUDA kernels", "MINEXP_CUDA")
    kernels = cpp_extension.CppExtension(
        "minexp._kernels",
        sources,
        py_limited_api=True,
        define_macros=macros,
        include_dirs=includes,
        library_dirs=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "--expt-relaxed-constexpr"]},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", *links] if sys.platform == "linux" else links,
        depends=[str(path) for path in Path("csrc").glob("*")],
    )
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
