"""From the text that names a model (SPEC) to the module, with its preprocessing and labels where those are known."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import RequestError, near, one_line
from .zoos import ZOOS, Built

FORMS = "torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory or file.py:factory"


def build(spec: str, *, num_classes: int | None, pretrained: bool, trust_model: bool) -> Any:
    """What SPEC names: a `Built`, or whatever object the user's factory returned.

    pretrained: the source's own weights are wanted (they may be downloaded). RequestError with the way out for
    every SPEC that cannot be built.
    """
    suffix = Path(spec).suffix.lower()
    if suffix == ".onnx":
        return _onnx(spec)
    if suffix == ".pt2":
        return Built(_exported(spec, trust_model))
    kind, colon, name = spec.partition(":")
    if not colon or not name:
        raise RequestError(f"unknown model '{spec}'; write it as {FORMS}")
    if kind in ZOOS:
        return ZOOS[kind](name, num_classes, pretrained)
    return _factory(spec, num_classes)


def _factory(spec: str, num_classes: int | None) -> Any:
    factory = named_object(spec, "model", FORMS)
    takes = inspect.signature(factory).parameters
    if num_classes is not None and "num_classes" not in takes:
        raise RequestError(f"{spec} takes no num_classes; leave --num-classes out or add the parameter")
    try:
        return factory(**({} if num_classes is None else {"num_classes": num_classes}))
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"{spec} failed ({one_line(error)}); a factory returns a model when called"
        ) from error


def named_object(spec: str, what: str, forms: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` or `file.py:name` names; RequestError where there is none.

    what, forms: what it is to be, and how that is written, for the error.
    """
    where, _, name = spec.rpartition(":")
    if not name.isidentifier():
        raise RequestError(f"unknown {what} '{spec}'; write it as {forms}")
    module = _file_module(where) if where.endswith(".py") else _named_module(where, spec, what, forms)
    found = getattr(module, name, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RequestError(f"{where} has no function '{name}'; near: {near(name, public)}")
    return found


def _file_module(where: str) -> Any:
    path = Path(where)
    if not path.is_file():
        raise RequestError(f"no file {where}; a function of a file is written path/to/file.py:function")
    description = importlib.util.spec_from_file_location(f"minexp_user_{path.stem}", path)
    if description is None or description.loader is None:
        raise RequestError(f"{where} cannot be imported as Python")
    module = importlib.util.module_from_spec(description)
    sys.modules[description.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        description.loader.exec_module(module)
    except Exception as error:
        del sys.modules[description.name]
        raise RequestError(
            f"{where} fails when imported ({one_line(error)}); correct it and run again"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _named_module(where: str, spec: str, what: str, forms: str) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)  # an installed command does not look into the current folder by itself
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise RequestError(f"no module '{where}' for the {what} '{spec}'; write it as {forms}") from error
        raise RequestError(
            f"{where} fails when imported ({one_line(error)}); install what it needs"
        ) from error
    except Exception as error:
        raise RequestError(
            f"{where} fails when imported ({one_line(error)}); write the {what} as {forms}"
        ) from error
    finally:
        sys.path.remove(here)


def _onnx(spec: str) -> Built:
    from .deploy.onnx_classifier import OnnxModule, preprocessing_of

    module = OnnxModule(spec)
    return Built(module, preprocessing_of(module))


def _exported(spec: str, trust_model: bool) -> nn.Module:
    if not trust_model:
        raise RequestError(
            f"{spec}: torch runs code while it loads a .pt2 file; if you trust it, say so with --trust-model"
        )
    try:
        return torch.export.unflatten(torch.export.load(spec))
    except Exception as error:
        raise RequestError(
            f"{spec} could not be loaded as an exported program ({one_line(error)})"
        ) from error
