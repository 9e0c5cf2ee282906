"""The vision encoder V_theta: pixels -> patch features and a global feature.

It is not part of the trained model. A frozen encoder computes its features once per distinct image (`extract.py`); a
trained one runs before the model in every step (`with_features`). A copy is saved beside every checkpoint. `encoder_id`
identifies what it computes.

Shapes: N images, S input side in pixels, L patches, h_v width.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from notellm2_core.config.model import VisionSettings
from notellm2_core.vision.architecture import SUPPORTED, Architecture, Preprocess
from notellm2_core.vision.towers import LIBRARIES, architecture_of, build_tower
from notellm2_core.vision.weights import load_tower

FEATURES_VERSION = 1  # part of encoder_id: raise it when this code computes other features from the same weights
_MAX_ASPECT = 8  # longer images are cropped to their middle before they are resized


class VisionEncoder(nn.Module):
    """A tower with its preprocessing. Always in eval mode; in fp32 and without gradients unless it is trained."""

    def __init__(self, architecture: Architecture, tower: nn.Module) -> None:
        """Raises ValueError if the tower has no patch features as wide as its global feature."""
        super().__init__()
        self.architecture = architecture
        # channels_last halves the time of convolutions on a CPU
        self.tower = tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)
        self.eval()
        for weight in self.parameters():  # the memory alignment of weights read from a file can change the last bits
            weight.data = weight.data.clone()
        self.num_patches, self.width = _measure(architecture, tower)
        self.encoder_id = _encoder_id(architecture, self.state_dict())

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in eval mode, so that neither batch norm nor dropout changes while the encoder is trained."""
        return super().train(False)

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image of any size -> [3, S, S]."""
        return to_pixels(image, self.architecture.preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] -> patches [N, L, h_v], global feature [N, h_v]; without a graph where it is frozen."""
        trained = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            patches, pooled = self.tower(pixels.contiguous(memory_format=torch.channels_last))
        return patches.contiguous(), pooled

    def with_weights(self, weights: Mapping[str, Tensor]) -> "VisionEncoder":
        """A new encoder of this architecture with `weights`, named as in its `state_dict`, in fp32."""
        tower = build_tower(self.architecture)
        tower.load_state_dict({k.removeprefix("tower."): v.float() for k, v in weights.items()}, strict=True)
        return VisionEncoder(self.architecture, tower)

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"encoder_id": self.encoder_id, "num_patches": self.num_patches, "width": self.width}
        text = json.dumps(config | {"architecture": self.architecture.to_json()}, indent=1)
        (folder / "config.json").write_text(text + "\n")
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: Path) -> "VisionEncoder":
        """The encoder that `save_pretrained` wrote. Raises ValueError if a file is missing, damaged or changed."""
        config, architecture = _read_config(Path(folder)), _read_architecture(Path(folder))
        tower = build_tower(architecture)
        file = Path(folder) / "model.safetensors"
        try:
            weights = load_file(file)
            tower.load_state_dict({k.removeprefix("tower."): v for k, v in weights.items()}, strict=True)
        except (OSError, SafetensorError, RuntimeError) as e:
            raise ValueError(f"{file} cannot be loaded as a {architecture.library} encoder: {e}") from e
        encoder = cls(architecture, tower)
        if encoder.encoder_id != config["encoder_id"]:
            raise ValueError(
                f"{folder} does not match its checksum: its config.json says encoder {config['encoder_id']}, its "
                f"weights and settings are {encoder.encoder_id}; copy it again."
            )
        return encoder


def load_vision_encoder(settings: VisionSettings) -> VisionEncoder:
    """The encoder that the settings name, with its weights.

    Raises ValueError for an unknown name, a model without patch features, and weights that cannot be loaded.
    """
    if (folder := _saved_folder(settings)) is not None:
        return VisionEncoder.from_pretrained(folder)
    architecture, tower = load_tower(settings)
    return VisionEncoder(architecture, tower.float())


def vision_dims(settings: VisionSettings) -> tuple[int, int]:
    """(L, h_v) of the encoder that the settings name. Reads no weights."""
    with torch.device("meta"):
        architecture = vision_architecture(settings)
        return _measure(architecture, build_tower(architecture).eval())


def vision_architecture(settings: VisionSettings) -> Architecture:
    """The architecture that the settings name, or that their folder holds. Reads no weights."""
    if (folder := _saved_folder(settings)) is not None:
        return _read_architecture(folder)
    return architecture_of(settings)


def to_pixels(image: Image.Image, how: Preprocess) -> Tensor:
    """An RGB image -> [3, S, S] in fp32, the same numbers as the library's own transform gives."""
    return normalise(torch.from_numpy(resize_and_crop(image, how)), how)


def normalise(pixels: Tensor, how: Preprocess) -> Tensor:
    """[..., S, S, 3] uint8 -> [..., 3, S, S] fp32: scaled to [0, 1], minus the mean, divided by the deviation."""
    scaled = pixels.movedim(-1, -3).contiguous().float() / 255
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (how.mean, how.std))
    return (scaled - mean) / std


def resize_and_crop(image: Image.Image, how: Preprocess) -> np.ndarray:
    """Resize, then crop the centre: [S, S, 3] uint8.

    Images longer than 8:1 are cropped to their middle 8:1 first. The centre crop reads only the middle 1:1 anyway, and
    a line of 10,000 x 1 pixels would be enlarged to gigabytes.
    """
    width, height = image.size
    if how.resize == "shortest" and max(width, height) > _MAX_ASPECT * min(width, height):
        longest = _MAX_ASPECT * min(width, height)
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    side = math.floor(how.size_px / how.crop_ratio)
    if how.resize == "squash":
        new = (side, side)
    else:
        short = min(width, height)
        new = (int(side * width / short), int(side * height / short))
    image = image.resize(new, Image.Resampling[how.interpolation.upper()])
    corner = round if how.crop_corner == "nearest" else math.floor
    left, top = (corner((length - how.size_px) / 2) for length in new)
    return np.array(image.crop((left, top, left + how.size_px, top + how.size_px)))


def _measure(architecture: Architecture, tower: nn.Module) -> tuple[int, int]:
    """(L, h_v), from one black image on the tower's device, which may be meta."""
    side = architecture.preprocess.size_px
    device = next(tower.parameters()).device
    with torch.inference_mode():
        patches, pooled = tower(torch.zeros(1, 3, side, side, device=device))
    if patches.ndim != 3 or pooled.shape != (1, patches.shape[2]):
        raise ValueError(
            f"{architecture.model.get('name', architecture.library)}: patch features of shape {tuple(patches.shape)} "
            f"and a global feature of shape {tuple(pooled.shape)} do not go together; supported: {SUPPORTED}"
        )
    return patches.shape[1], patches.shape[2]


def _encoder_id(architecture: Architecture, weights: dict[str, Tensor]) -> str:
    """16 hex digits of a checksum over all that the features depend on: version, architecture and weights."""
    digest = hashlib.sha256(json.dumps([FEATURES_VERSION, architecture.to_json()], sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _saved_folder(settings: VisionSettings) -> Path | None:
    """`pretrained`, if it is a folder that `save_pretrained` wrote."""
    folder = settings.pretrained and Path(settings.pretrained)
    if not folder or not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return None
    return None if (folder / "open_clip_config.json").is_file() else folder  # a hub's copy has all three


def saved_encoder_id(folder: Path) -> str:
    """The encoder_id in the config.json of `folder`. Reads no weights. Raises ValueError where it holds no encoder."""
    return str(_read_config(folder)["encoder_id"])


def _read_architecture(folder: Path) -> Architecture:
    raw = _read_config(folder)["architecture"]
    try:
        architecture = Architecture.from_json(raw)
        _ = LIBRARIES[architecture.library]
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder / 'config.json'} is not the configuration of a saved vision encoder ({e!r})") from e
    return architecture


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        _ = config["architecture"]["preprocess"], config["encoder_id"], config["num_patches"], config["width"]
    except OSError as e:
        raise ValueError(f"{folder} holds no vision encoder: {file} cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is not the configuration of a saved vision encoder ({e!r})") from e
    return config
