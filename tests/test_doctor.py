"""The doctor says what is there, and why what is not there is not."""

from minexp import doctor


def test_missing_libraries_and_kernels_are_named_with_the_reason() -> None:
    facts = doctor.examine()
    facts["libraries"]["timm"] = None
    facts["kernels"] = {"cpu": True, "cuda": False, "why": {"cuda": "no CUDA here"}}
    lines = dict(line.split("  ", 1) for line in doctor.describe(facts).splitlines())
    assert lines["timm"].strip() == "not installed"
    assert lines["cpu kernels"].strip() == "compiled"
    assert lines["cuda kernels"].strip() == "no: no CUDA here"
    assert lines["minexp"].strip() == facts["version"]


def test_versions_are_the_installed_ones() -> None:
    import numpy as np
    import torch

    facts = doctor.examine()
    assert facts["libraries"]["numpy"] == np.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"].startswith("cuda") == torch.cuda.is_available()
