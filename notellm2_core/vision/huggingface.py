"""Vision towers of Hugging Face's transformers, by hub name or folder: CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3.

It reads `config.json`, `preprocessor_config.json` and safetensors. Nothing is unpickled, and no remote code runs.
"""

from dataclasses import dataclass, fields
from typing import Any

from PIL import Image
from torch import Tensor, nn

from notellm2_core.config.model import VisionSettings
from notellm2_core.runtime.pretrained import one_line, quiet, require_complete
from notellm2_core.vision.architecture import SUPPORTED, Architecture, Preprocess, library, square_side


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from those of others."""

    num_class_tokens: int = 1  # before the registers and the patches
    norm_tokens: bool = False  # True: the model normalises only the class token, so the tower applies the last norm
    fixed_size: bool = False  # True: one position embedding for each patch, so no other image size fits


FAMILIES = {
    "clip_vision_model": Family(norm_tokens=True, fixed_size=True),
    "siglip_vision_model": Family(num_class_tokens=0, fixed_size=True),
    "dinov2": Family(),
    "dinov2_with_registers": Family(),
    "dinov3_vit": Family(),
}

_REFUSED = {"siglip2_vision_model": "takes images of any shape as lists of patches (naflex), not as pixels"}

# Image processors that only resize, crop the centre, rescale and normalise.
_PLAIN_PROCESSORS = ("BitImageProcessor", "CLIPImageProcessor", "DINOv3ViTImageProcessor", "SiglipImageProcessor",
                     "ViTImageProcessor")  # fmt: skip


class HuggingFaceTower(nn.Module):
    """Patches after the last layer norm, without class and register tokens; the model's own pooled output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        family = FAMILIES[model.config.model_type]
        self.norm_tokens = family.norm_tokens
        self.num_prefix_tokens = family.num_class_tokens + getattr(model.config, "num_register_tokens", 0)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values=pixels)
        tokens = output.last_hidden_state
        if self.norm_tokens:
            tokens = self.model.post_layernorm(tokens)
        return tokens[:, self.num_prefix_tokens :], output.pooler_output


def huggingface_architecture(settings: VisionSettings) -> Architecture:
    """The architecture from config.json and preprocessor_config.json. Reads no weights.

    Raises ValueError where they cannot be loaded, for an unsupported kind of model, and for preprocessing that
    `Preprocess` cannot express.
    """
    name = settings.name
    if settings.pretrained is not None:
        raise ValueError(
            f"model.vision.pretrained = {settings.pretrained!r} is no folder that save_pretrained wrote; with library "
            "= transformers the weights are those of model.vision.name: leave pretrained out."
        )
    auto = library("transformers")
    try:
        with quiet():
            whole = auto.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(_not_loaded(name, "config.json", e)) from e
    vision = getattr(whole, "vision_config", whole)  # a model that reads text, too, nests it
    if vision.model_type not in FAMILIES:
        why = _REFUSED.get(vision.model_type, "gives no patch features with a global feature here")
        raise ValueError(f"{name} is a {vision.model_type}, which {why}; supported: {SUPPORTED}")
    if not getattr(vision, "vision_use_head", True):
        raise ValueError(f"{name} has no pooling head, so no global feature; use the whole {vision.model_type}")
    try:
        with quiet():
            processor = auto.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(_not_loaded(name, "preprocessor_config.json", e)) from e
    preprocess = preprocess_of(processor, name)
    if FAMILIES[vision.model_type].fixed_size and preprocess.size_px != square_side(vision.image_size):
        raise ValueError(
            f"{name} reads images of {vision.image_size} pixels, its preprocessor_config.json makes them "
            f"{preprocess.size_px}; the two have to agree."
        )
    return Architecture("transformers", _own_fields(whole, vision), preprocess)


def build_huggingface(architecture: Architecture) -> nn.Module:
    """The tower with random weights."""
    auto = library("transformers")
    return HuggingFaceTower(auto.AutoModel.from_config(_config_of(architecture)))


def load_huggingface(settings: VisionSettings, architecture: Architecture) -> nn.Module:
    """The tower with its weights, in fp32. Raises ValueError where they cannot be loaded or do not fit config.json."""
    auto = library("transformers")
    try:
        with quiet():
            model, report = auto.AutoModel.from_pretrained(
                settings.name,
                config=_config_of(architecture),
                dtype="float32",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
            )
    except Exception as e:  # the hub client and the reader of safetensors raise errors of many types
        raise ValueError(_not_loaded(settings.name, "model.safetensors", e)) from e
    require_complete(report, settings.name)
    return HuggingFaceTower(model)


def huggingface_projection(architecture: Architecture) -> int:
    """Parameters of CLIP's `visual_projection`, which has no bias; the other models have no projection."""
    model = architecture.model
    return model["hidden_size"] * model["projection_dim"] if model["model_type"] == "clip_vision_model" else 0


def preprocess_of(processor: Any, name: str) -> Preprocess:
    """The `Preprocess` that equals an image processor of transformers. Raises ValueError where there is none."""
    kind = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    if kind not in _PLAIN_PROCESSORS:
        raise _unsupported(name, f"image_processor_type = {kind}", ", ".join(_PLAIN_PROCESSORS))
    for step, expected in {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False}.items():
        if bool(getattr(processor, step, None)) != expected:
            raise _unsupported(name, f"{step} = {not expected}", str(expected).lower())
    if abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise _unsupported(name, f"rescale_factor = {processor.rescale_factor}", "1/255")
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise _unsupported(name, f"size = {size}", "shortest_edge, or height and width")
    resized = square_side(list(size.values()))
    crop = resized
    if processor.do_center_crop:
        crop = square_side([processor.crop_size["height"], processor.crop_size["width"]])
    if crop > resized or ("shortest_edge" in size and not processor.do_center_crop):
        raise _unsupported(name, f"size = {size} with crop_size = {crop}", "a centre crop inside of the resized image")
    interpolation = Image.Resampling(int(processor.resample)).name.lower()
    if kind == "DINOv3ViTImageProcessor" and interpolation != "bilinear":
        # It resizes after rescaling and does not clip, and a bicubic kernel overshoots black and white.
        raise _unsupported(name, f"resample = {interpolation} in a {kind}", "bilinear")
    return Preprocess(
        size_px=crop,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation=interpolation,
        resize="shortest" if "shortest_edge" in size else "squash",
        crop_ratio=crop / (resized + 0.5),  # rounded down, this gives `resized` for all sizes
        crop_corner="floor",
    )


def _own_fields(whole: Any, vision: Any) -> dict[str, Any]:
    """The fields that this kind of model defines itself: those of all models of transformers change no feature."""
    common = {field.name for field in fields(library("transformers").PreTrainedConfig)}
    own = [field.name for field in fields(vision) if field.name not in common and not field.name.startswith("_")]
    config = {"model_type": vision.model_type} | {name: getattr(vision, name) for name in own}
    if "projection_dim" in config:  # CLIPModel projects to its own width and ignores that of its vision_config
        config["projection_dim"] = getattr(whole, "projection_dim", vision.projection_dim)
    return config


def _config_of(architecture: Architecture) -> Any:
    return library("transformers").AutoConfig.for_model(**architecture.model)


def _unsupported(name: str, setting: str, supported: str) -> ValueError:
    return ValueError(f"the preprocessing of {name} has {setting}, which is not supported; supported: {supported}")


def _not_loaded(name: str, file: str, error: Exception) -> str:
    return (
        f"no vision encoder {name!r}: its {file} is neither in a folder of that name nor available from the hub "
        f"({one_line(error)}). Set model.vision.name to a folder with config.json, preprocessor_config.json and "
        "model.safetensors, or HF_HOME to a filled cache."
    )
