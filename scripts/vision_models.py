"""Image classifiers to train: new ones by name, loaded ones made fit for training, and what prepares their images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    MobileNetV1Config,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    TimmWrapperConfig,
    ViTConfig,
)

import common
from hf_r2.layers import BATCH_NORMS

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DROPOUT, MOMENTUM = 0.2, 0.1
BASIC: dict[str, Any] = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
NEW: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mobilenet_v1": (MobileNetV1Config, {"classifier_dropout_prob": DROPOUT}),
    "mobilenet_v2": (MobileNetV2Config, {"classifier_dropout_prob": DROPOUT}),
    "resnet-18": (ResNetConfig, {**BASIC, "depths": [2, 2, 2, 2]}),
    "resnet-50": (ResNetConfig, {"depths": [3, 4, 6, 3]}),
    "resnet-101": (ResNetConfig, {"depths": [3, 4, 23, 3]}),
    "vit": (ViTConfig, {}),
    "inception_v3": (TimmWrapperConfig, {"architecture": "inception_v3"}),
}
SIZES = {"inception_v3": 299}  # pixels; 224 for all others


def new(name: str, labels: list[str], image_size: int) -> PreTrainedModel:
    """An untrained classifier: one of `NEW`, or the architecture of a config.json (folder or hub id).

    Ends with one line where there is no such config, or timm is missing.
    """
    names = dict(enumerate(labels))
    options: dict[str, Any] = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
    if name in NEW:
        kind, settings = NEW[name]
        if kind is TimmWrapperConfig:
            need_timm(name)
        elif "image_size" in kind().to_dict():
            settings = {**settings, "image_size": image_size}
        config: Any = kind(**settings, **options)
    else:
        try:
            config = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(f"config_name must be one of {', '.join(NEW)}, or a config: {reason}") from error
    model = AutoModelForImageClassification.from_config(config)
    make_trainable_(model)
    return model


def need_timm(name: str) -> None:
    """Ends with one line where the packages of timm's models are missing."""
    missing = [package for package in ("timm", "torchvision") if find_spec(package) is None]
    if missing:
        lacks = f"{name} comes from timm, and {', '.join(missing)} is missing"
        raise SystemExit(f"{lacks}: pip install '.[timm]' in the folder of the source")


def load(name: str, labels: list[str] | None = None) -> PreTrainedModel:
    """A trained classifier (folder or hub id), with a new head for `labels` where they are given, fit for training."""
    options: dict[str, Any] = {}
    if labels is not None:
        options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        options["ignore_mismatched_sizes"] = True
    model = common.load_model(AutoModelForImageClassification, name, **options)
    make_trainable_(model)
    return model


def make_trainable_(model: nn.Module) -> None:
    """Undoes settings of transformers' MobileNets that are for inference only.

    Their dropout is 0.999 (0.8 in V2) and the momentum of their batch norms 0.9997 (0.997) in torch's sense, so that
    running statistics would be those of the last batch.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and (module.momentum or 0) > 0.5:
            module.momentum = MOMENTUM
        elif isinstance(module, nn.Dropout) and module.p > 0.5:
            module.p = DROPOUT


def square_processor(image_size: int) -> Any:
    """Prepares images of up to `image_size` pixels as `images.Pictures` does: the middle, scaled up, bytes to [-1, 1]."""
    size, half = {"shortest_edge": image_size}, [0.5] * 3
    return ConvNextImageProcessorPil(size=size, crop_pct=1.0, resample=3, image_mean=half, image_std=half)


def processor(name: str | None, image_size: int) -> Any:
    """The image processor of a trained model (the one that a folder of scripts without one gets is ImageNet's)."""
    if name is not None and (not Path(name).is_dir() or (Path(name) / "preprocessor_config.json").is_file()):
        return AutoImageProcessor.from_pretrained(name)
    return ConvNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_pct=0.875,
        resample=2,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
