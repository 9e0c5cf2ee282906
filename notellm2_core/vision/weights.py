"""Loads the weights of a vision tower: from a hub tag, a checkpoint file, a folder, or a pip package."""

from pathlib import Path

import torch
from torch import nn

from notellm2_core.config.model import VisionSettings
from notellm2_core.runtime.packaged_weights import package_path
from notellm2_core.vision.architecture import Architecture, library
from notellm2_core.vision.huggingface import load_huggingface
from notellm2_core.vision.towers import (
    TimmTower,
    TinyTower,
    architecture_of,
    open_clip_name,
    open_clip_preprocess,
    open_clip_tower,
    timm_architecture,
)

# Packaged weights -> their timm model. The tensors are in timm's order, under other names.
_TIMM_NAMES = {"package:efficientnet-lite0": "tf_efficientnet_lite0"}


def load_tower(settings: VisionSettings) -> tuple[Architecture, nn.Module]:
    """The tower with its weights. Raises ValueError where a name is unknown or the weights cannot be loaded."""
    architecture = architecture_of(settings)
    if settings.library == "tiny":
        return architecture, TinyTower()
    if settings.library == "timm":
        model = _timm_model(settings)
        return timm_architecture(model), TimmTower(model)
    if settings.library == "transformers":
        return architecture, load_huggingface(settings, architecture)
    return _open_clip_model(settings, architecture)


def _open_clip_model(settings: VisionSettings, architecture: Architecture) -> tuple[Architecture, nn.Module]:
    open_clip = library("open_clip")
    name, pretrained = open_clip_name(settings), settings.pretrained
    hub = name.startswith("hf-hub:")
    if ":" not in name:
        tags = open_clip.list_pretrained_tags_by_model(name)
        hub = pretrained in tags
        if not hub and not (pretrained and Path(pretrained).is_file()):
            raise ValueError(
                f"pretrained = {pretrained!r} is neither a file, nor a folder with open_clip_config.json, nor one of "
                f"the weights that open_clip knows for {name}: {', '.join(tags)}"
            )
    try:
        full = open_clip.create_model(
            name,
            pretrained=pretrained if ":" not in name else None,
            force_quick_gelu=architecture.model["quick_gelu"],
            require_pretrained=True,
        )
    except Exception as e:  # the hub client raises errors of many types; a file may have keys or shapes that do not fit
        raise ValueError(_no_weights(settings, hub, e)) from e
    if name.startswith("hf-hub:"):  # only the hub's file has its preprocessing
        architecture = Architecture("open_clip", architecture.model, open_clip_preprocess(full.visual.preprocess_cfg))
    return architecture, open_clip_tower(full.visual)


def _timm_model(settings: VisionSettings) -> nn.Module:
    """A timm model with weights and without a classifier."""
    timm = library("timm")
    name, pretrained = settings.name, settings.pretrained
    if pretrained and pretrained.startswith("package:"):
        return _from_package(settings)
    if pretrained and Path(pretrained).is_file():
        model = timm.create_model(name, num_classes=0)
        try:
            weights = timm.models.load_state_dict(pretrained, weights_only=True)
            head = f"{model.pretrained_cfg['classifier']}."
            model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(head)}, strict=True)
        except Exception as e:  # from unpickling, from reading safetensors, or a key that does not fit
            raise ValueError(_no_weights(settings, False, e)) from e
        return model
    base, _, named_tag = name.partition(".")
    tag = pretrained or named_tag
    tags = [n.removeprefix(f"{base}.") for n in timm.list_pretrained(f"{base}.*")]
    if tag not in tags:
        raise ValueError(
            f"pretrained = {pretrained!r} is neither a file, nor a folder written by save_pretrained, nor one of the "
            f"weights that timm knows for {base}: {', '.join(tags)}"
        )
    try:
        return timm.create_model(f"{base}.{tag}", pretrained=True, num_classes=0)
    except Exception as e:  # the hub client raises errors of many types
        raise ValueError(_no_weights(settings, True, e)) from e


def _from_package(settings: VisionSettings) -> nn.Module:
    """A timm model with the weights of a pip package, which is not imported. They are matched by position."""
    package = str(settings.pretrained)
    if package not in _TIMM_NAMES:
        raise ValueError(f"pretrained = {package!r}; known packages: {', '.join(_TIMM_NAMES)}")
    name = _TIMM_NAMES[package]
    if settings.name != name:
        raise ValueError(f"the weights of {package} belong to timm's {name}, not to {settings.name}")
    path = package_path(package)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = library("timm").create_model(name)
    ours = model.state_dict()
    if [t.shape for t in weights.values()] != [t.shape for t in ours.values()]:
        raise ValueError(f"{path} has {len(weights)} tensors that do not match the {len(ours)} of timm's {name}")
    model.load_state_dict(dict(zip(ours, weights.values(), strict=True)), strict=True)
    model.reset_classifier(0)
    return model


def _no_weights(settings: VisionSettings, hub: bool, error: Exception) -> str:
    tried = f"the hub ({settings.name}, {settings.pretrained})" if hub else f"{settings.pretrained}"
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"no vision weights from {tried}: {reason}. Set model.vision.pretrained to a checkpoint file, or to a folder "
        "with its weights, or HF_HOME to a filled cache."
    )
