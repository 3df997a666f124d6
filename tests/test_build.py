"""The knobs of setup.py: what is absent gives a notice or, where it was asked for, an error; what fails, fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )


def test_no_compiler_is_a_notice_and_on_request_an_error():
    absent = setup("--name", CXX="/nowhere/c++", MINEXP_BUILD="auto")
    assert absent.returncode == 0 and absent.stdout.splitlines()[-1] == "minexp"
    assert "no C++ compiler (/nowhere/c++)" in absent.stderr and "plain PyTorch" in absent.stderr
    asked = setup("--name", CXX="/nowhere/c++", MINEXP_BUILD="1")
    assert asked.returncode != 0 and "MINEXP_BUILD=1, but there is no C++ compiler" in asked.stderr


def test_a_pure_package_asks_for_no_compiler():
    pure = setup("--name", CXX="/nowhere/c++", MINEXP_BUILD="0")
    assert pure.returncode == 0 and "compiler" not in pure.stderr


def test_an_unknown_value_is_named():
    wrong = setup("--name", MINEXP_BUILD="yes")
    assert wrong.returncode != 0 and "MINEXP_BUILD is 'yes', expected auto, 0 or 1" in wrong.stderr


def test_cuda_on_request_without_a_toolkit_is_an_error():
    import torch

    if torch.version.cuda:
        pytest.skip("torch here is a CUDA build")
    asked = setup("--name", MINEXP_CUDA="1")
    assert (
        asked.returncode != 0 and "MINEXP_CUDA=1, but no CUDA_HOME, or torch is a CPU build" in asked.stderr
    )


def test_a_compiler_that_fails_fails_the_build(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n")
    broken.chmod(0o755)
    folders = f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"
    failed = setup("build_ext", *folders, CXX=str(broken), MINEXP_BUILD="auto")
    assert failed.returncode != 0 and not list(tmp_path.rglob("*.so"))
