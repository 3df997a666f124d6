"""Masker and classifiers alone, in torch and on each provider of ONNX Runtime: rows of `minexp bench deploy`."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch

from minexp.classifier import Classifier
from minexp.data.subjects import digits
from minexp.deploy import ops
from minexp.deploy.graph import masker_graph
from minexp.deploy.networks import classifier_network, masker_network, quantised_masker
from minexp.deploy.pictures import pixels
from minexp.deploy.quantise import quantised
from minexp.deploy.runtime import open_session
from minexp.masker import Architecture, Masker
from minexp.specs import build

REPEATS, BATCHES = 15, (1, 8, 32)
MASKERS = ((224, 4, (1, 2)), (64, 2, (1,)))  # sides of images, pixels a logit, threads
COMPILED = (
    224,
    1,
    8,
)  # side, threads and batch with which torch.compile is measured: each takes half a minute
Row = dict[str, Any]
Call = Callable[[], Any]


def masker_rows(say: Callable[[str], None]) -> Iterable[Row]:
    """From the bytes of images to logits, and all of masker.onnx: to probabilities, packed masks and kept images."""
    rng = np.random.default_rng(0)
    for side, stride, counts in MASKERS:
        masker = Masker(Architecture(stride=stride)).eval()
        torch.nn.init.normal_(masker.head.weight, std=0.1)
        sample = rng.integers(0, 256, (max(BATCHES), side, side, 3), dtype=np.uint8)
        plain = masker_network(masker, (side, side))
        int8 = quantised_masker(masker, sample[:16])
        networks = {"fp32": _from_bytes(plain), "int8": int8}
        files = {mode: masker_graph(net, 3, 0.5) for mode, net in (("fp32", plain), ("int8", int8))}
        for threads, batch in itertools.product(counts, BATCHES):
            say(f"masker {side}²: {threads} threads, batch {batch}")
            torch.set_num_threads(threads)
            some, shape = sample[:batch], f"{batch}x{side}x{side}x3"
            eager, x = _FromBytes(masker), torch.from_numpy(some)
            calls: dict[tuple[str, str], Call] = {("torch-cpu", "eager"): partial(_forward, eager, x)}
            if (side, threads, batch) == COMPILED and (compiled := _compiled(eager, x, say)) is not None:
                calls["torch-cpu", "compile"] = partial(_forward, compiled, x)
            calls |= _runs(networks, threads, {"x": some})
            yield from timed(f"masker {side}²", calls, shape, threads)
            calls = {("torch-cpu", "eager"): partial(_answers, eager, x)}
            yield from timed(
                f"masker.onnx {side}²", calls | _runs(files, threads, {"image": some}), shape, threads
            )
    torch.set_num_threads(1)


class _FromBytes(torch.nn.Module):
    """A masker of uint8 images [B,H,W,C], as the files take them."""

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self.masker = masker

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.masker(image.permute(0, 3, 1, 2).float() / 255)
        return logits


def _from_bytes(network: onnx.ModelProto) -> onnx.ModelProto:
    """The same as a graph."""
    image = ops.argument(np.uint8, "batch", "height", "width", 3)
    logits = ops.call(network, pixels(image))
    return ops.build({"x": image}, {"logits": logits}, {"logits": (1, "height", "width")})


def _answers(masker: _FromBytes, image: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """What masker.onnx gives."""
    p = _forward(masker, image).sigmoid()[:, 0]
    kept = p > 0.5
    return p, np.packbits(kept.flatten(1).numpy(), axis=1), image * kept[..., None]


def _runs(networks: dict[str, onnx.ModelProto], threads: int, feeds: Row) -> dict[tuple[str, str], Call]:
    """A run of each network on each provider that is installed."""
    return {
        (provider, mode): partial(session.run, None, feeds)
        for mode, network in networks.items()
        for provider, session in _sessions(network, threads)
    }


def classifier_rows(say: Callable[[str], None]) -> Iterable[Row]:
    """The classifiers alone, which bound what 8 bits can gain: the scenes' and, with torchvision, ResNet-18."""
    torch.set_num_threads(1)
    subjects = [("scenes", digits(), 32)]
    if importlib.util.find_spec("torchvision") is not None:
        built = build("torchvision:resnet18", num_classes=None, pretrained=False, trust_model=False)
        subjects.append(("resnet18", Classifier(built.model, preprocessing=built.preprocessing), 8))
    for name, classifier, batch in subjects:
        say(f"classifier: {name}")
        shape = classifier.input_shape
        sample = np.random.default_rng(0).random((8, *shape), dtype=np.float32)
        plain, x = classifier_network(classifier), torch.rand(batch, *shape)
        calls: dict[tuple[str, str], Call] = {("torch-cpu", "eager"): partial(_forward, classifier.logits, x)}
        calls |= _runs({"fp32": plain, "int8": quantised(plain, sample)}, 1, {"x": x.numpy()})
        yield from timed(f"classifier {name}", calls, "x".join(map(str, (batch, *shape))), 1)


def _forward(model: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def _compiled(masker: torch.nn.Module, x: torch.Tensor, say: Callable[[str], None]) -> Any:
    """torch.compile for such an input, where this machine has a compiler for it."""
    torch.compiler.reset()
    model = torch.compile(masker, dynamic=False)
    started = time.perf_counter()
    try:
        _forward(model, x)
    except Exception as error:  # no C++ compiler, or one it does not like
        say(f"torch.compile is left out: {type(error).__name__}")
        return None
    say(f"torch.compile took {time.perf_counter() - started:.0f} s")
    return model


def _sessions(network: onnx.ModelProto, threads: int) -> Iterable[tuple[str, Any]]:
    """Sessions of the network on each provider that is installed."""
    import onnxruntime

    content = network.SerializeToString()
    names = {
        "CUDAExecutionProvider": "cuda",
        "TensorrtExecutionProvider": "tensorrt",
        "OpenVINOExecutionProvider": "openvino",
    }
    wanted = ["cpu", *(names[n] for n in onnxruntime.get_available_providers() if n in names)]
    for provider in wanted:
        yield f"onnxruntime-{provider}", open_session(content, provider, threads, "masker")
    if importlib.util.find_spec("openvino") is not None:
        yield "openvino", _OpenVino(content, threads)


class _OpenVino:
    """OpenVINO behind ONNX Runtime's call."""

    def __init__(self, content: bytes, threads: int) -> None:
        import openvino

        core = openvino.Core()
        self._model = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_NUM_THREADS": threads})

    def run(self, _names: None, feeds: dict[str, Any]) -> Any:
        return self._model(feeds)


def timed(
    op: str,
    calls: dict[tuple[str, str], Call],
    shape: str,
    threads: int,
    *,
    repeats: int = REPEATS,
    images: int = 1,
) -> list[Row]:
    """One row a call: ms (an image, where a call takes ``images``), and how many times as fast as the first."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                times[key].append((time.perf_counter() - started) * 1000 / images)
    eager = statistics.median(times["torch-cpu", "eager"])
    rows = []
    for (provider, mode), measured in times.items():
        low, middle, high = (float(np.percentile(measured, share)) for share in (20, 50, 80))
        row: Row = {"op": op, "provider": provider, "mode": mode, "shape": shape, "threads": threads}
        rows.append(row | {"p20": low, "p50": middle, "p80": high, "speedup": eager / middle})
    return rows
