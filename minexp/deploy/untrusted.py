"""What a model file must not contain, read from its bytes before any library interprets them.

ONNX is protobuf (https://protobuf.dev/programming-guides/encoding). A graph can name files outside itself, operators
of foreign domains and functions of its own, and announce tensors that its bytes do not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError

MAX_FILE = 2 << 30  # protobuf's own limit
MAX_NODES = 100_000
MAX_DEPTH = 4  # graphs within graphs
DOMAINS = ("", "ai.onnx")
# Never written here, and not repeatable or able to reach beyond the model's tensors.
REFUSED = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)
# Bytes an element of ONNX's TensorProto.DataType takes, in bits where it is less than one.
_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    16: 16,
    21: 4,
    22: 4,
}


class _Refused(Exception):
    """Why the file is not run."""


def read_model(path: str | Path) -> tuple[bytes, dict[str, str]]:
    """The file's bytes and its metadata. Raises RequestError, one line, for whatever is not a plain model."""
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} is not there: give an explainer.onnx that `minexp export` wrote")
    if path.stat().st_size > MAX_FILE:
        raise RequestError(f"{path} is larger than 2 GiB: no single ONNX file is")
    content = path.read_bytes()
    try:
        return content, _model(memoryview(content))
    except _Refused as reason:
        raise RequestError(f"{path}: {reason}") from None
    except (IndexError, ValueError, UnicodeDecodeError, RecursionError):
        raise RequestError(
            f"{path} is damaged or no ONNX model: give an explainer.onnx that `minexp export` wrote"
        ) from None


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: int for a varint, memoryview for bytes and fixed widths."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        value: Any
        if kind == 0:
            value, place = _varint(message, place)
        else:
            width = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                width, place = _varint(message, place)
            if width is None or place + width > len(message):
                raise ValueError("not a message")
            value = message[place : place + width]
            place += width
        yield key >> 3, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("not a number")


def _text(value: Any) -> str:
    return bytes(value).decode()


def _integers(values: list[Any]) -> list[int]:
    """A repeated integer field, packed or not."""
    out: list[int] = []
    for value in values:
        if isinstance(value, int):
            out.append(value)
            continue
        place = 0
        while place < len(value):
            number, place = _varint(value, place)
            out.append(number)
    return out


def _collect(message: memoryview) -> dict[int, list[Any]]:
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(message):
        fields.setdefault(number, []).append(value)
    return fields


def _model(message: memoryview) -> dict[str, str]:
    fields = _collect(message)
    if len(fields.get(7, ())) != 1 or not fields.get(8):
        raise ValueError("not a model")
    if fields.get(20) or fields.get(25):
        raise _Refused("holds training information or functions of its own; it is not run")
    for opset in fields[8]:
        _domain(_collect(opset).get(1, []))
    _graph(fields[7][0], 0, [0])
    metadata = {}
    for entry in fields.get(14, ()):
        pair = _collect(entry)
        metadata[_text(pair[1][-1]) if 1 in pair else ""] = _text(pair[2][-1]) if 2 in pair else ""
    return metadata


def _domain(values: list[Any]) -> None:
    domain = _text(values[-1]) if values else ""
    if domain not in DOMAINS:
        raise _Refused(f"uses operators of the domain {domain[:40]!r}; only ONNX's own are run")


def _graph(message: memoryview, depth: int, nodes: list[int]) -> None:
    if depth > MAX_DEPTH:
        raise _Refused(f"nests graphs more than {MAX_DEPTH} deep; it is not run")
    for number, value in _fields(message):
        if number == 1:
            nodes[0] += 1
            if nodes[0] > MAX_NODES:
                raise _Refused(f"has more than {MAX_NODES} nodes; it is not run")
            _node(value, depth, nodes)
        elif number == 5:
            _tensor(value)
        elif number == 15:
            raise _Refused("holds sparse tensors; it is not run")


def _node(message: memoryview, depth: int, nodes: list[int]) -> None:
    fields = _collect(message)
    _domain(fields.get(7, []))
    operator = _text(fields[4][-1]) if 4 in fields else ""
    if operator in REFUSED:
        raise _Refused(f"uses the operator {operator}, whose answers do not repeat; it is not run")
    for attribute in fields.get(5, ()):
        for number, value in _fields(attribute):
            if number in (5, 10):
                _tensor(value)
            elif number in (6, 11):
                _graph(value, depth + 1, nodes)
            elif number in (22, 23):
                raise _Refused("holds sparse tensors; it is not run")


def _tensor(message: memoryview) -> None:
    fields = _collect(message)
    if fields.get(13) or any(fields.get(14, ())):
        raise _Refused("keeps tensors in files beside it; only single-file models are run")
    kind = int(fields[2][-1]) if 2 in fields else 0
    sides = _integers(fields.get(1, []))
    announced = math.prod(sides)
    if kind == 8 or any(side >= 1 << 40 for side in sides):
        raise _Refused("holds a tensor of text or of an impossible shape; it is not run")
    if kind not in _BITS:
        raise _Refused(f"holds a tensor of an unknown type ({kind}); it is not run")
    if 9 in fields:
        held = sum(len(value) for value in fields[9]) * 8 // _BITS[kind]
    else:
        # in typed fields a value takes four or eight bytes, or one at least as a varint
        values = [value for number in (4, 5, 7, 10, 11) for value in fields.get(number, ())]
        held = sum(1 if isinstance(value, int) else len(value) for value in values)
    if announced > held:
        raise _Refused(f"announces a tensor of {announced} values and holds {held}; it is damaged")
