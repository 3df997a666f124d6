"""A model repository as Triton Inference Server, OpenVINO Model Server and KServe read it."""

from __future__ import annotations

from pathlib import Path

import onnx

from ..data.files import replacing, write_text
from .metadata import About

MAX_BATCH = 32
_TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64", 9: "TYPE_BOOL"}


def write_repository(out: Path, explainer: bytes, masker: bytes, about: About) -> list[Path]:
    """``out``/minexp_explainer and ``out``/minexp_masker, each with version 1 and its config.pbtxt, and a README."""
    files = []
    for name, content in (("minexp_explainer", explainer), ("minexp_masker", masker)):
        model = onnx.load_from_string(content)
        labels = "labels.txt" if name == "minexp_explainer" else None
        folder = out / name
        path = folder / "1" / "model.onnx"
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        write_text(folder / "config.pbtxt", config(name, model, labels))
        files += [path, folder / "config.pbtxt"]
        if labels is not None:
            write_text(folder / labels, "\n".join(about.class_names) + "\n")
            files.append(folder / labels)
    write_text(out / "README.md", _readme(out, about))
    return [*files, out / "README.md"]


def config(name: str, model: onnx.ModelProto, labels: str | None) -> str:
    """Triton's config.pbtxt of a model whose first side is the batch."""
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH}",
        "dynamic_batching { max_queue_delay_microseconds: 2000 }",
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }',
    ]
    for field, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            sides = [side.dim_value or -1 for side in tensor.shape.dim[1:]]
            shape = (
                f"dims: [ {', '.join(map(str, sides))} ]" if sides else "dims: [ 1 ] reshape { shape: [ ] }"
            )
            extra = f' label_filename: "{labels}"' if labels and value.name == "label" else ""
            lines.append(
                f'{field} {{ name: "{value.name}" data_type: {_TYPES[tensor.elem_type]} {shape}{extra} }}'
            )
    return "\n".join(lines) + "\n"


def _readme(out: Path, about: About) -> str:
    h, w = about.preprocessing.size
    return f"""# minexp model repository

`minexp_explainer` takes images uint8 [B, {h}, {w}, {about.preprocessing.channels}] and gives masks with their
certificates; `minexp_masker` takes any size and gives masks alone. Predicate: {about.predicate}.

    # Triton Inference Server
    docker run --rm -p 8000:8000 -v "$PWD:/models" nvcr.io/nvidia/tritonserver:25.08-py3 \\
        tritonserver --model-repository=/models
    curl localhost:8000/v2/models/minexp_explainer

    # OpenVINO Model Server
    docker run --rm -p 9000:9000 -p 8000:8000 -v "$PWD:/models" openvino/model_server:latest \\
        --model_name minexp_explainer --model_path /models/minexp_explainer --port 9000 --rest_port 8000

    # KServe: storageUri of an InferenceService with the triton runtime
    #   modelFormat: {{name: triton}}, storageUri: s3://BUCKET/PATH/TO/THIS/FOLDER

Images are brought to {h} x {w} by the client ({_how(about)}); normalisation is inside the model.
"""


def _how(about: About) -> str:
    settings = about.preprocessing
    kind = f"{settings.interpolation} resize with antialiasing"
    if settings.resize is None:
        return kind
    return f"{kind} of the shorter side to {settings.resize}, then a centre crop"
