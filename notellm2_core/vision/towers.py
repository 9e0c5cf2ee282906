"""The vision towers of each library, built from the settings without their weights.

An `Architecture` describes a tower without weights in plain JSON. A tower maps pixels `[N, 3, S, S]` to
`(patches [N, L, h_v], global_feature [N, h_v])`:
- open_clip ViT: the patch tokens and the pooled token after the last layer norm, before the projection;
- timm: the final feature map, one patch per position (a ViT's prefix tokens are left out), and the pooled feature
  before the classifier;
- transformers: see `huggingface.py`;
- tiny: random weights from a fixed seed, for tests.
"""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from notellm2_core.config.model import VisionSettings
from notellm2_core.vision.architecture import SUPPORTED, Architecture, Preprocess, library, square_side
from notellm2_core.vision.huggingface import build_huggingface, huggingface_architecture, huggingface_projection


class OpenClipTower(nn.Module):
    """A ViT of open_clip without its projection."""

    def __init__(self, visual: nn.Module) -> None:
        """Raises ValueError if `visual` has no patch features."""
        super().__init__()
        from open_clip.transformer import VisionTransformer

        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type == "none":
            raise ValueError(f"{type(visual).__name__} of open_clip has no patch features; supported: {SUPPORTED}")
        visual.proj = None
        visual.output_tokens = True
        self.visual = visual

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, 3, S, S] -> patches [N, L, h_v], global feature [N, h_v]."""
        pooled, tokens = self.visual(pixels)
        return tokens, pooled


class TimmTower(nn.Module):
    """A timm model without its classifier."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, 3, S, S] -> patches [N, L, h_v], global feature [N, h_v].

        Raises ValueError if the model's features are not the patches of a square image.
        """
        features = self.trunk.forward_features(pixels)
        if not isinstance(features, Tensor):
            raise ValueError(f"{type(self.trunk).__name__} of timm has no patch features; supported: {SUPPORTED}")
        pooled = self.trunk.forward_head(features, pre_logits=True)
        if features.ndim == 4:  # a map: [N, h_v, H, W], or [N, H, W, h_v] (Swin)
            if features.shape[1] == self.trunk.num_features:
                features = features.permute(0, 2, 3, 1)
            return features.flatten(1, 2), pooled
        patches = features[:, getattr(self.trunk, "num_prefix_tokens", 0) :]
        if patches.shape[1] == 1 or math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:  # other tokens than patches
            raise ValueError(
                f"the {patches.shape[1]} tokens of timm's {type(self.trunk).__name__} are not the patches of a square "
                f"image; supported: {SUPPORTED}"
            )
        return patches, pooled


class TinyTower(nn.Module):
    """Two random convolutions: 16 patches of 32 numbers that follow colours and shapes; weights from a fixed seed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1)  # side: 32 -> 16
        self.second = nn.Conv2d(16, 32, kernel_size=4, stride=4)  # side: 16 -> 4
        generator = torch.Generator().manual_seed(0)
        for conv in (self.first, self.second):
            fan_in = conv.weight[0].numel()
            weight = torch.randn(conv.weight.shape, generator=generator, device="cpu") * math.sqrt(2 / fan_in)
            conv.weight.data = weight.to(conv.weight.device)
            conv.bias = nn.Parameter(torch.zeros(len(weight)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, 3, 32, 32] -> patches [N, 16, 32], global feature [N, 32]."""
        features = self.second(nn.functional.gelu(self.first(pixels)))  # [N, 32, 4, 4]
        patches = features.flatten(2).transpose(1, 2)  # [N, 16, 32]
        return patches, patches.mean(1)


@dataclass(frozen=True)
class Library:
    """How a library of vision models is used."""

    architecture_of: Callable[[VisionSettings], Architecture]
    build: Callable[[Architecture], nn.Module]
    projection: Callable[[Architecture], int]  # parameters of the final projection that the tower leaves out


def architecture_of(settings: VisionSettings) -> Architecture:
    """The architecture that the settings name. Reads no weights. Raises ValueError for an unknown name."""
    return LIBRARIES[settings.library].architecture_of(settings)


def build_tower(architecture: Architecture) -> nn.Module:
    """The tower with random weights, on the current default device."""
    return LIBRARIES[architecture.library].build(architecture)


def dropped_projection_parameters(architecture: Architecture) -> int:
    """Parameters of the model's final projection, which the tower leaves out but Table 7 counts; 0 without one.

    ViT-B-16: 768 * 512; ViT-bigG-14: 1664 * 1280.
    """
    return LIBRARIES[architecture.library].projection(architecture)


def _open_clip_architecture(settings: VisionSettings) -> Architecture:
    open_clip = library("open_clip")
    name = open_clip_name(settings)
    if ":" not in name:
        _check_name(name, open_clip.list_models(), "open_clip")
    try:
        raw = open_clip.get_model_config(name)
    except (OSError, ValueError) as e:  # the hub does not answer, or a file is not JSON
        raise ValueError(f"no configuration of the open_clip model {name}: {e}") from e
    model = {
        "embed_dim": raw["embed_dim"],
        "vision_cfg": raw["vision_cfg"] | {"timm_model_pretrained": False},
        "quick_gelu": bool(raw.get("quick_gelu", False)),
    }
    tag = open_clip.get_pretrained_cfg(name, settings.pretrained or "")
    model["quick_gelu"] |= bool(tag.get("quick_gelu", False))  # without it, open_clip only warns and uses GELU
    size = raw["vision_cfg"].get("image_size", 224)
    cfg = {"size": size, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD} | tag
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        cfg |= json.loads(path.read_text()).get("preprocess_cfg", {})
    return Architecture("open_clip", model, open_clip_preprocess(cfg))


def _open_clip_build(architecture: Architecture) -> nn.Module:
    return open_clip_tower(_open_clip_visual(architecture))


def _open_clip_projection(architecture: Architecture) -> int:
    with torch.device("meta"):
        visual = _open_clip_visual(architecture)
        whole = sum(p.numel() for p in visual.parameters())
        return whole - sum(p.numel() for p in open_clip_tower(visual).parameters())


def _open_clip_visual(architecture: Architecture) -> nn.Module:
    library("open_clip")
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(**architecture.model)


def open_clip_tower(visual: Any) -> nn.Module:
    """The tower of an open_clip model. Some of these, such as SigLIP, are timm models inside."""
    return TimmTower(visual.trunk) if hasattr(visual, "trunk") else OpenClipTower(visual)


def open_clip_name(settings: VisionSettings) -> str:
    """The name for open_clip: `local-dir:FOLDER` if `pretrained` is a folder with open_clip_config.json."""
    folder = settings.pretrained and Path(settings.pretrained)
    if folder and (folder / "open_clip_config.json").is_file():
        return f"local-dir:{folder}"
    return settings.name


def open_clip_preprocess(cfg: dict[str, Any]) -> Preprocess:
    """The preprocessing that an open_clip configuration (`preprocess_cfg`) describes.

    Raises ValueError for another resize mode than ours, or an input that is not square.
    """
    mode = cfg.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"resize_mode = {mode!r} of this open_clip model is not supported; choices: shortest, squash")
    return Preprocess(
        square_side(cfg["size"]), tuple(cfg["mean"]), tuple(cfg["std"]), cfg.get("interpolation", "bicubic"), mode
    )


def _timm_architecture(settings: VisionSettings) -> Architecture:
    timm = library("timm")
    _check_name(settings.name, timm.list_models(), "timm")
    with torch.device("meta"):
        return timm_architecture(timm.create_model(settings.name))


def _timm_build(architecture: Architecture) -> nn.Module:
    return TimmTower(library("timm").create_model(architecture.model["name"], num_classes=0))


def timm_architecture(model: Any) -> Architecture:
    """The architecture of a timm model, with the preprocessing of its pretrained configuration.

    Raises ValueError if its input is not square.
    """
    cfg = importlib.import_module("timm.data").resolve_data_config({}, model=model)
    squash = cfg["crop_mode"] == "squash"
    pre = Preprocess(
        size_px=square_side(cfg["input_size"][1:]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        resize="squash" if squash else "shortest",
        crop_ratio=cfg["crop_pct"],
    )
    return Architecture("timm", {"name": model.pretrained_cfg["architecture"]}, pre)


def _check_name(name: str, names: list[str], library: str) -> None:
    if name.split(".")[0] not in names and name not in names:
        close = get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        raise ValueError(f"{library} has no model {name!r}; close to it: {', '.join(close)}")


def _no_projection(_: Architecture) -> int:
    return 0


LIBRARIES = {
    "open_clip": Library(_open_clip_architecture, _open_clip_build, _open_clip_projection),
    "timm": Library(_timm_architecture, _timm_build, _no_projection),
    "transformers": Library(huggingface_architecture, build_huggingface, huggingface_projection),
    "tiny": Library(lambda _: Architecture("tiny", {}, Preprocess(size_px=32)), lambda _: TinyTower(), _no_projection),
}
