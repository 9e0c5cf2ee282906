"""A vision tower without its weights: plain JSON from which `towers.py` builds it in its library."""

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
    """How an RGB image becomes the tower's input; see `encoder.to_pixels`."""

    size_px: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"  # squash: to a square, which changes the aspect ratio
    crop_ratio: float = 1.0  # side of the centre crop, as a share of the resized short side
    crop_corner: Literal["nearest", "floor"] = "nearest"  # rounding of half a pixel: torchvision's; transformers'


@dataclass(frozen=True)
class Architecture:
    """A tower without its weights."""

    library: VisionLibrary
    model: dict[str, Any]  # what the library builds the tower from
    preprocess: Preprocess

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        if self.preprocess.crop_corner == "nearest":  # left out, so that the encoder ids of open_clip and timm stay
            del raw["preprocess"]["crop_corner"]
        return raw

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Architecture":
        pre = dict(raw["preprocess"])
        pre |= {"mean": tuple(pre["mean"]), "std": tuple(pre["std"])}
        return cls(raw["library"], raw["model"], Preprocess(**pre))


def square_side(size: int | tuple[int, ...] | list[int]) -> int:
    """The side of a square input in pixels. Raises ValueError if the input is not square."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"an input of {size} pixels is not square; choose a model with a square input")
    return sides.pop()


def library(name: Literal["open_clip", "timm", "transformers"]) -> ModuleType:
    """The library's module. Call it only where it is used: the import takes seconds."""
    importlib.import_module("notellm2_core.runtime.torch_compat")  # first, because all of them import torchvision
    return importlib.import_module(name)
