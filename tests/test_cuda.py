"""The whole job on a GPU, against the same on the CPU: needs a CUDA device; `bench/gpu.sh` runs it."""

import json

import numpy as np
import pytest
import small_net
import torch
import trained_tiles
from PIL import Image

import minexp
from minexp import cli

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture
def on_gpu():
    """The trained tiles' classifier and masker on the GPU; back on the CPU afterwards, where other tests use them."""
    subject, masker = trained_tiles.tiles(), trained_tiles.masker()
    yield subject.classifier.to("cuda"), masker.to("cuda"), subject.x
    subject.classifier.to("cpu")
    masker.to("cpu")


def test_a_fast_explanation_is_the_cpus(on_gpu):
    classifier, masker, x = on_gpu
    there = minexp.explain(classifier, x.cuda(), masker)
    here = minexp.explain(classifier.to("cpu"), x, masker.to("cpu"))
    flipped = (there.masks.cpu() != here.masks).float().mean().item()
    assert flipped < 0.02  # rounding moves a few masks whose draws stand on the edge
    same = [a.certified == b.certified for a, b in zip(there.certificates, here.certificates, strict=True)]
    assert np.mean(same) > 0.95
    close = np.abs([a.conf - b.conf for a, b in zip(there.certificates, here.certificates, strict=True)])
    assert close.max() < 1e-3


def test_no_answer_depends_on_its_batch(on_gpu):
    classifier, masker, x = on_gpu
    x = x[:24].cuda()
    whole = minexp.explain(classifier, x, masker).masks
    parts = torch.cat([minexp.explain(classifier, part, masker).masks for part in x.split(7)])
    assert (whole != parts).float().mean().item() < 0.01


def test_refinement_finds_what_it_finds_on_the_cpu(on_gpu):
    classifier, masker, x = on_gpu
    there = minexp.explain(classifier, x[:32].cuda(), masker, effort="refined")
    here = minexp.explain(classifier.to("cpu"), x[:32], masker.to("cpu"), effort="refined")
    assert all(c.certified for c in there.certificates) == all(c.certified for c in here.certificates)
    areas = [np.mean([c.area for c in e.certificates]) for e in (there, here)]
    assert abs(areas[0] - areas[1]) < 0.03  # rounding sends single images to other minima


def test_fit_on_the_gpu():
    classifier = small_net.classifier().to("cuda")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    masker = minexp.fit(classifier, images, steps=30, batch=16, progress=False)
    assert masker.mean.device.type == "cuda"
    here = minexp.fit(classifier.to("cpu"), images, steps=30, batch=16, progress=False)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        there, here = masker.probabilities(x.cuda()).cpu(), here.probabilities(x)
    # the optimiser makes a step of every sign, so rounding shows in the weights long before it does in the masks
    assert (there - here).abs().mean() < 0.05
    assert there.std() > 0


def test_the_command_line(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(images / f"{index}.png")
    model = tmp_path / "model.py"
    model.write_text(
        "import sys\nsys.path.insert(0, 'tests')\nimport small_net\nmake = small_net.classifier\n"
    )
    shared = ["--model", f"{model}:make", "--data", str(images), "--device", "cuda", "--json"]
    masker = str(tmp_path / "masker.safetensors")
    assert cli.main(["fit", *shared, "--steps", "5", "--batch", "4", "--out", masker]) == 0
    capsys.readouterr()
    code = cli.main(["explain", *shared, "--masker", masker, "--out", str(tmp_path / "out")])
    summary = json.loads(capsys.readouterr().out)
    assert code in (0, 3) and summary["rows"] == 6 and summary["provider"].startswith("torch-cuda")
