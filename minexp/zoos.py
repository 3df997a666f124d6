"""Models of torchvision, timm and transformers, with the preprocessing and the labels that come with them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data.preprocessing import Preprocessing
from .errors import RequestError, near, one_line


@dataclass(frozen=True)
class Built:
    """A model as its source describes it; what is unknown is None."""

    model: nn.Module
    preprocessing: Preprocessing | None = None
    class_names: Sequence[str] | None = None


def library(name: str) -> Any:
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
    models = library("torchvision").models
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
    library("torchvision")  # timm imports it
    timm = library("timm")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        known = timm.list_models()
        if name.partition(".")[0] not in known:
            raise RequestError(f"timm has no model '{name}'; near: {near(name, known)}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = _downloaded(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **options))
    settings = Preprocessing.from_json(timm.data.resolve_model_data_config(model))
    return Built(model, settings, None if num_classes is not None else _imagenet_names(timm.data, model))


def _imagenet_names(data: Any, model: nn.Module) -> list[str] | None:
    """Class names of the ImageNet subset that the model's number of classes stands for in timm."""
    given = getattr(model, "pretrained_cfg", {}).get("label_names")
    if given:
        return [str(name) for name in given]
    subset = data.infer_imagenet_subset(model)
    if subset is None:
        return None
    info = data.ImageNetInfo(subset)
    return [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]


def _hugging_face(name: str, num_classes: int | None, pretrained: bool) -> Built:
    if importlib.util.find_spec("torchvision") is not None:
        library("torchvision")  # transformers imports it where it is there
    transformers = library("transformers")
    auto = transformers.AutoModelForImageClassification
    options = {} if num_classes is None else {"num_labels": num_classes}
    try:
        # Safetensors only, and no code from the repository: neither can run anything on load.
        with quiet(transformers):
            if pretrained:
                model = auto.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options)
            else:
                config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
                config.architectures = config.architectures or []
                model = auto.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RequestError(
            f"hf:{name} could not be loaded ({one_line(error)}); give the id of an image classifier with safetensors "
            "weights, or a folder with config.json, preprocessor_config.json and model.safetensors"
        ) from error
    labels = model.config.id2label
    names = [str(labels[index]) for index in sorted(labels)]
    try:
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        side = getattr(model.config, "image_size", None) or 224
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        warnings.warn(
            f"hf:{name} has no preprocessor_config.json; give --mean and --std of its training", stacklevel=2
        )
        return Built(model, Preprocessing((height, width)), names)
    if settings.get("do_flip_channel_order"):
        model = nn.Sequential(ReversedChannels(), model)
    return Built(model, _processor_settings(settings), names)


class ReversedChannels(nn.Module):
    """BGR for models whose processor flips the channels, as MobileViT's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """transformers without its progress bars and reports."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _processor_settings(settings: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing of a Hugging Face image processor (preprocessor_config.json)."""
    size = settings.get("size", 224)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    sides = (size["height"], size["width"]) if isinstance(size, Mapping) and "height" in size else None
    edge: int = size.get("shortest_edge", 224) if isinstance(size, Mapping) else size
    target = sides or (edge, edge)
    resize: int | tuple[int, int] | None = edge if sides is None and isinstance(size, Mapping) else None
    if crop is not None:
        target = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        resize = sides or edge
    if (
        "crop_pct" in settings and not sides
    ):  # ConvNeXT's and PoolFormer's: resize to edge / crop_pct, then crop
        resize = int(edge / settings["crop_pct"]) if crop is not None or edge < 384 else None
    elif str(settings.get("image_processor_type")).startswith("Levit"):
        resize = int(256 / 224 * edge)
    mean, std = _normalisation(settings)
    return Preprocessing(
        size=target,
        resize=resize,
        interpolation=RESAMPLING.get(settings.get("resample", 2), "bilinear"),
        mean=mean,
        std=std,
    )


RESAMPLING = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}  # Pillow's numbers


def _normalisation(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1], whatever range the processor scales them to first."""
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    shift = 1.0 if settings.get("rescale_offset") else 0.0  # EfficientNet's processor: x / 127.5 − 1
    normalised = settings.get("do_normalize", True)
    mean = (settings.get("image_mean") if normalised else None) or (0.0,) * 3
    std = (settings.get("image_std") if normalised else None) or (1.0,) * 3
    if settings.get("include_top", False):  # EfficientNet's again: divides by the deviation twice
        std = tuple(value**2 for value in std)
    return tuple((value + shift) / scale for value in mean), tuple(value / scale for value in std)


ZOOS: dict[str, Callable[[str, int | None, bool], Built]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
}
