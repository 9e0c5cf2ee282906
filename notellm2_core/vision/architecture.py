"""What a vision tower is without its weights: plain JSON that each library of `vision_towers` builds from."""

import importlib
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

from notellm2_core.config.model import VisionLibrary

SUPPORTED = (
    "open_clip ViTs, timm ViTs and CNNs whose feature map is as wide as their pooled feature, and from transformers "
    "CLIP, SigLIP and SigLIP 2 of fixed resolution, DINOv2 (with registers too) and DINOv3 ViT"
)


@dataclass(frozen=True)
class Preprocess:
    """From an RGB picture to the tower's pixels; see `vision.to_pixels`."""

    size_px: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"  # squash: the aspect ratio is not kept
    crop_ratio: float = 1.0  # the side of the centre crop, as a share of the resized short side
    crop_corner: Literal["nearest", "floor"] = "nearest"  # how half a pixel is rounded: torchvision; transformers


@dataclass(frozen=True)
class Architecture:
    """A tower without its weights. `model`: what the library needs to build it."""

    library: VisionLibrary
    model: dict[str, Any]
    preprocess: Preprocess

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        if self.preprocess.crop_corner == "nearest":  # left out: the ids of open_clip and timm stay what they are
            del raw["preprocess"]["crop_corner"]
        return raw

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Architecture":
        pre = dict(raw["preprocess"])
        pre |= {"mean": tuple(pre["mean"]), "std": tuple(pre["std"])}
        return cls(raw["library"], raw["model"], Preprocess(**pre))


def square_side(size: int | tuple[int, ...] | list[int]) -> int:
    """The side of a square input in pixels. Raises ValueError if it is not square."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"an input of {size} pixels is not square; choose a model with a square input")
    return sides.pop()


def library(name: Literal["open_clip", "timm", "transformers"]) -> ModuleType:
    """The library, imported only where it is used: it takes seconds."""
    importlib.import_module("notellm2_core.runtime.torch_compat")  # all of them import torchvision
    return importlib.import_module(name)
