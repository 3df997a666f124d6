"""From the text that names a model (SPEC) and a weights file to a module, its preprocessing and its labels."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data.preprocessing import Preprocessing
from .errors import RequestError

FORMS = "torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory or file.py:factory"


@dataclass(frozen=True)
class Built:
    """A model as its source describes it; what is unknown is None."""

    model: nn.Module
    preprocessing: Preprocessing | None = None
    class_names: Sequence[str] | None = None


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
    if kind == "torchvision":
        return _torchvision(name, num_classes, pretrained)
    if kind == "timm":
        return _timm(name, num_classes, pretrained)
    if kind == "hf":
        return _hugging_face(name, num_classes)
    return _factory(spec, num_classes)


def near(name: str, known: Iterable[str]) -> str:
    """The known names closest to `name`, for an error line."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:6])


def one_line(error: BaseException) -> str:
    """The error as `Type: text` on one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RequestError(f"{name} is not installed ({error}); pip install 'minexp[vision]'") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # torchvision's compiled operators belong to another build of torch. Its classifiers use none of them; only
    # the import insists that these two are declared.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    for key in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
        del sys.modules[key]
    return importlib.import_module(name)


_KEPT: list[Any] = []  # declarations last only as long as their library object


def _downloaded(spec: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{spec}: its own weights could not be loaded ({one_line(error)}); give yours with --weights FILE"
        ) from error


def _torchvision(name: str, num_classes: int | None, pretrained: bool) -> Built:
    models = _library("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise RequestError(f"torchvision has no classifier '{name}'; near: {near(name, known)}")
    weights = models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    preprocessing = Preprocessing(
        size=(transform.crop_size[0],) * 2,
        resize=transform.resize_size[0],
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    categories = weights.meta["categories"]
    if pretrained and num_classes in (None, len(categories)):
        model = _downloaded(f"torchvision:{name}", lambda: models.get_model(name, weights=weights))
        return Built(model, preprocessing, categories)
    if pretrained:
        raise RequestError(
            f"torchvision:{name} has {len(categories)} classes; with --num-classes give --weights FILE"
        )
    options = {"num_classes": num_classes} if num_classes is not None else {}
    model = models.get_model(name, weights=None, **options)
    return Built(model, preprocessing, categories if num_classes in (None, len(categories)) else None)


def _timm(name: str, num_classes: int | None, pretrained: bool) -> Built:
    _library("torchvision")  # timm imports it
    timm = _library("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise RequestError(f"timm has no model '{name}'; near: {near(name, known)}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = _downloaded(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **options))
    config = dict(timm.data.resolve_model_data_config(model))
    if config.get("interpolation") not in ("bilinear", "bicubic", "nearest"):
        config["interpolation"] = "bicubic"
    return Built(model, Preprocessing.from_json(config))


def _hugging_face(name: str, num_classes: int | None) -> Built:
    transformers = _library("transformers")
    options = {} if num_classes is None else {"num_labels": num_classes}
    try:
        # Safetensors only, and no code from the repository: neither can run anything on load.
        model = transformers.AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, **options
        )
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RequestError(
            f"hf:{name} could not be loaded ({one_line(error)}); give the id of an image classifier with safetensors "
            "weights, or a folder with config.json, preprocessor_config.json and model.safetensors"
        ) from error
    labels = model.config.id2label
    return Built(model, _processor_settings(settings), [str(labels[index]) for index in sorted(labels)])


def _processor_settings(settings: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing of a Hugging Face image processor (preprocessor_config.json)."""
    size = settings.get("size", 224)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else (size if crop is not None else None)
    if isinstance(crop, Mapping):
        target = (crop["height"], crop["width"])
    elif crop is not None:
        target = (crop, crop)
    elif isinstance(size, Mapping) and "height" in size:
        target = (size["height"], size["width"])
    else:
        target = (edge or size,) * 2
    resize = edge
    if (
        edge is not None and "crop_pct" in settings
    ):  # ConvNeXT's processor: resize to edge / crop_pct, then crop
        resize = int(edge / settings["crop_pct"]) if edge < 384 else None
        target = (edge, edge)
    normalised = settings.get("do_normalize", True)
    mean = settings.get("image_mean") if normalised else None
    std = settings.get("image_std") if normalised else None
    return Preprocessing(
        size=target,
        resize=resize,
        interpolation={0: "nearest", 2: "bilinear", 3: "bicubic"}.get(
            settings.get("resample", 2), "bilinear"
        ),
        mean=tuple(mean or (0.0,) * 3),
        std=tuple(std or (1.0,) * 3),
    )


def _factory(spec: str, num_classes: int | None) -> Any:
    where, _, name = spec.rpartition(":")
    if not name.isidentifier():
        raise RequestError(f"unknown model '{spec}'; write it as {FORMS}")
    module = _file_module(where) if where.endswith(".py") else _named_module(where, spec)
    factory = getattr(module, name, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RequestError(f"{where} has no factory '{name}'; near: {near(name, public)}")
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


def _file_module(where: str) -> Any:
    path = Path(where)
    if not path.is_file():
        raise RequestError(f"no file {where}; a model from a file is written path/to/file.py:factory")
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


def _named_module(where: str, spec: str) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)  # an installed command does not look into the current folder by itself
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise RequestError(f"no module '{where}' for the model '{spec}'; write it as {FORMS}") from error
        raise RequestError(
            f"{where} fails when imported ({one_line(error)}); install what it needs"
        ) from error
    except Exception as error:
        raise RequestError(
            f"{where} fails when imported ({one_line(error)}); write the model as {FORMS}"
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
