"""Vision encoders of transformers equal the library's models and processors, and open_clip's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from notellm2_core.config.model import VisionSettings
from notellm2_core.vision.architecture import Architecture, library
from notellm2_core.vision.encoder import VisionEncoder, load_vision_encoder, to_pixels, vision_dims
from notellm2_core.vision.huggingface import FAMILIES, preprocess_of
from notellm2_core.vision.towers import architecture_of, build_tower, dropped_projection_parameters

hf: Any = library("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WITH_MLP = SIZES | {"intermediate_size": 32}
SQUARE = {"size": {"height": 32, "width": 32}}
SHORTEST = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
CLIP = hf.CLIPImageProcessor(**SHORTEST)
TEXT = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
PROJECTED = WITH_MLP | {"projection_dim": 8}  # as in the dual config

# name -> (config, image processor); a dual config makes a checkpoint of the dual model
MODELS = {
    "clip": (hf.CLIPConfig(text_config=TEXT, vision_config=WITH_MLP, projection_dim=8), CLIP),
    "clip_vision": (hf.CLIPVisionConfig(**PROJECTED), CLIP),
    "siglip": (hf.SiglipConfig(text_config=TEXT, vision_config=WITH_MLP), hf.SiglipImageProcessor(**SQUARE)),
    "siglip_vision": (hf.SiglipVisionConfig(**WITH_MLP), hf.SiglipImageProcessor(**SQUARE)),
    "dinov2": (hf.Dinov2Config(**SIZES), hf.BitImageProcessor(**SHORTEST)),
    "dinov2_registers": (
        hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
        hf.BitImageProcessor(**SHORTEST),
    ),
    "dinov3": (hf.DINOv3ViTConfig(**WITH_MLP, num_register_tokens=4), hf.DINOv3ViTImageProcessor(**SQUARE)),
}


def vision(name: Path | str) -> VisionSettings:
    return VisionSettings(library="transformers", name=str(name))


def saved(folder: Path, kind: str) -> tuple[Path, Any]:
    """A checkpoint with random weights, biases and norms, and its model."""
    settings, processor = MODELS[kind]
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model


def architecture_files(folder: Path, settings: Any, processor: Any) -> Path:
    settings.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_the_models_own(kind: str, tmp_path: Path) -> None:
    """The 16 = (32 / 8)^2 patches come after the last layer norm, without class and register tokens. The global feature
    is the pooled output. The two JSON files alone give dimensions and architecture.
    """
    folder, whole = saved(tmp_path / "model", kind)
    encoder = load_vision_encoder(vision(folder))
    model = getattr(whole, "vision_model", whole)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=pixels)
    tokens = expected.last_hidden_state
    if "clip" in kind and "siglip" not in kind:
        tokens = model.post_layernorm(tokens)
    patches, pooled = encoder(pixels)
    assert patches.shape == (3, 16, 16)
    torch.testing.assert_close(patches, tokens[:, tokens.shape[1] - 16 :], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-5, atol=1e-6)
    if "siglip" not in kind:  # the first token is the class token
        torch.testing.assert_close(pooled, tokens[:, 0], rtol=1e-5, atol=1e-6)
    (folder / "model.safetensors").unlink()
    assert vision_dims(vision(folder)) == (16, 16)
    assert architecture_of(vision(folder)) == encoder.architecture


@pytest.mark.parametrize("kind", MODELS)
def test_saved_encoder_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    encoder = load_vision_encoder(vision(saved(tmp_path / "model", kind)[0]))
    encoder.save_pretrained(tmp_path / "copy")
    loaded = VisionEncoder.from_pretrained(tmp_path / "copy")
    assert loaded.encoder_id == encoder.encoder_id and loaded.architecture == encoder.architecture
    pixels = encoder.preprocess(random_image(70, 51))[None]
    assert torch.equal(loaded.preprocess(random_image(70, 51))[None], pixels)
    for a, b in zip(encoder(pixels), loaded(pixels), strict=True):
        assert torch.equal(a, b)
    by_setting = VisionSettings(library="transformers", name="x", pretrained=str(tmp_path / "copy"))
    assert load_vision_encoder(by_setting).encoder_id == encoder.encoder_id
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    save_file({k: v + 1e-6 for k, v in weights.items()}, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(ValueError, match="does not match its checksum"):
        VisionEncoder.from_pretrained(tmp_path / "copy")


def open_clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPVisionModel's weights under open_clip's names."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    renamed = {ours: weights[theirs] for theirs, ours in names.items()}
    parts = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    for i in range(SIZES["num_hidden_layers"]):
        layer, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        parts |= {f"{layer}.layer_norm1": f"{block}.ln_1", f"{layer}.layer_norm2": f"{block}.ln_2"}
        parts |= {f"{layer}.mlp.fc1": f"{block}.mlp.c_fc", f"{layer}.mlp.fc2": f"{block}.mlp.c_proj"}
        parts |= {f"{layer}.self_attn.out_proj": f"{block}.attn.out_proj"}
        for kind in ("weight", "bias"):
            joined = [weights[f"{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(joined)
    return renamed | {f"{b}.{kind}": weights[f"{a}.{kind}"] for a, b in parts.items() for kind in ("weight", "bias")}


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_clip_is_the_same_through_open_clip(quick_gelu: bool, tmp_path: Path) -> None:
    settings = hf.CLIPVisionConfig(**PROJECTED, hidden_act="quick_gelu" if quick_gelu else "gelu")
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    CLIP.save_pretrained(tmp_path)
    ours = load_vision_encoder(vision(tmp_path))
    vit = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2}
    open_clip_model = {"embed_dim": 8, "vision_cfg": vit, "quick_gelu": quick_gelu}
    architecture = Architecture("open_clip", open_clip_model, ours.architecture.preprocess)
    tower: Any = build_tower(architecture)
    tower.visual.load_state_dict(open_clip_weights(model.state_dict()), strict=True)
    theirs = VisionEncoder(architecture, tower)
    pixels = torch.randn(2, 3, 32, 32)
    for a, b in zip(ours(pixels), theirs(pixels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert dropped_projection_parameters(architecture) == dropped_projection_parameters(ours.architecture) == 16 * 8


def test_three_kinds_of_checkpoint_give_the_same_clip(tmp_path: Path) -> None:
    """The checkpoints: the dual model, its vision part, and that part under the names that transformers 4 wrote."""
    dual, model = saved(tmp_path / "dual", "clip")
    alone = architecture_files(tmp_path / "alone", *MODELS["clip_vision"])
    model.vision_model.save_pretrained(alone, is_main_process=True)
    architecture_files(alone, *MODELS["clip_vision"])
    older = architecture_files(tmp_path / "older", *MODELS["clip_vision"])
    weights = {f"vision_model.{k}": v for k, v in load_file(alone / "model.safetensors").items()}
    save_file(weights, older / "model.safetensors", metadata={"format": "pt"})
    assert len({load_vision_encoder(vision(folder)).encoder_id for folder in (dual, alone, older)}) == 1


def test_the_papers_encoders_with_and_without_their_projection() -> None:
    """With width w, n layers, MLP m, patch p and L patches, the parameters are
    3ppw + w + (L+1)w + 2 * 2w + n(4w + 4ww + 4w + 2wm + m + w).

    ViT-B-16: w = 768, m = 3072, L = 196: 85,799,424, and its projection 768 * 512. ViT-bigG-14: w = 1664, n = 48,
    m = 8192, L = 256: 1,842,777,344, and its projection 1664 * 1280.
    """
    expected = {"ViT-B-16": (768, 12, 3072, 16, 196, 512), "ViT-bigG-14": (1664, 48, 8192, 14, 256, 1280)}
    for name, (w, n, m, p, patches, d) in expected.items():
        assert vision_dims(VisionSettings(name=name)) == (patches, w)
        architecture = architecture_of(VisionSettings(name=name))
        with torch.device("meta"):
            tower = build_tower(architecture)
        layers = n * (4 * w + 4 * w * w + 4 * w + 2 * w * m + m + w)
        assert sum(x.numel() for x in tower.parameters()) == 3 * p * p * w + w + (patches + 1) * w + 4 * w + layers
        assert dropped_projection_parameters(architecture) == w * d
    b16 = VisionSettings(library="timm", name="vit_base_patch16_siglip_224", pretrained=None)
    for without in (b16, VisionSettings(library="tiny"), VisionSettings(name="ViT-B-16-SigLIP")):
        assert dropped_projection_parameters(architecture_of(without)) == 0


def test_sizes_of_real_architectures(tmp_path: Path) -> None:
    """Architectures with the config.json and preprocessor_config.json of the hub, on the meta device.

    openai/clip-vit-base-patch16 has the 85,799,424 parameters of open_clip's ViT-B-16, and 768 * 512 in its
    visual_projection. DINOv2 was made for 518 pixels, but its processor makes 224: (224 / 14)^2 patches.
    """
    clip = hf.CLIPConfig(vision_config={"patch_size": 16}, projection_dim=512)
    dinov2 = hf.Dinov2Config(image_size=518), hf.BitImageProcessor(size={"shortest_edge": 256})
    cases = {
        "clip": (clip, hf.CLIPImageProcessor(), (196, 768), 768 * 512),
        "siglip": (hf.SiglipConfig(), hf.SiglipImageProcessor(), (196, 768), 0),
        "dinov2": (*dinov2, (256, 768), 0),
        "dinov3": (hf.DINOv3ViTConfig(num_register_tokens=4), hf.DINOv3ViTImageProcessor(), (196, 384), 0),
    }
    for name, (sizes, processor, dims, projection) in cases.items():
        named = vision(architecture_files(tmp_path / name, sizes, processor))
        assert vision_dims(named) == dims
        assert dropped_projection_parameters(architecture_of(named)) == projection
    with torch.device("meta"):
        tower = build_tower(architecture_of(vision(tmp_path / "clip")))
    assert sum(p.numel() for p in tower.parameters()) == 85_799_424


@settings(max_examples=15)
@given(width=st.integers(4, 200), height=st.integers(4, 200), resized=st.integers(32, 60), resample=st.integers(2, 3))
def test_pixels_are_those_of_the_library(width: int, height: int, resized: int, resample: int) -> None:
    """For shapes up to 8:1 our pixels equal those of the library's Pillow processors.

    Its torchvision processors, the default, round differently between the two passes of a resize, so the mean
    difference is below one grey level, even on noise. DINOv3's has no Pillow variant and does not round: the difference
    is below two grey levels everywhere.
    """
    if max(width, height) > 8 * min(width, height):
        width = height
    image = random_image(width, height, seed=width * height)
    crop = {"size": {"shortest_edge": resized}, "crop_size": {"height": 32, "width": 32}, "resample": resample}
    square = {"size": {"height": resized, "width": resized}, "resample": resample}
    dinov3 = square | {"resample": 2}
    for name, how in (("CLIP", crop), ("Bit", crop), ("Siglip", square), ("ViT", square), ("DINOv3ViT", dinov3)):
        processor = getattr(hf, f"{name}ImageProcessor")(**how)
        ours = to_pixels(image, preprocess_of(processor, name))
        levels = 255 * torch.tensor(processor.image_std).view(3, 1, 1)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert ours.shape == theirs.shape
        difference = ((ours - theirs) * levels).abs()
        assert difference.mean() < 1
        if name == "DINOv3ViT":
            assert difference.max() < 2
        else:
            pillow = getattr(hf, f"{name}ImageProcessorPil")(**how)(image, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(ours, torch.as_tensor(pillow), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize = False, which is not supported; supported: true"),
        ({"do_normalize": False}, "do_normalize = False"),
        ({"do_pad": True}, "do_pad = True"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"shortest_edge": 30}}, "a centre crop inside of the resized image"),
        ({"do_center_crop": False}, "a centre crop inside of the resized image"),
        ({"size": {"shortest_edge": 40, "longest_edge": 80}}, "shortest_edge, or height and width"),
        ({"crop_size": {"height": 32, "width": 16}}, "not square"),
        ({"crop_size": {"height": 24, "width": 24}}, "reads images of 32 pixels, .* makes them 24"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type = Siglip2ImageProcessor"),
    ],
)
def test_unsupported_preprocessing_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    architecture_files(tmp_path, *MODELS["clip_vision"])
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        vision_dims(vision(tmp_path))


def test_a_bicubic_dinov3_processor_is_refused() -> None:
    with pytest.raises(ValueError, match="resample = bicubic in a DINOv3ViTImageProcessor"):
        preprocess_of(hf.DINOv3ViTImageProcessor(**SQUARE, resample=3), "somebody/dinov3")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (hf.Siglip2VisionConfig(), "siglip2_vision_model, which takes images of any shape .*naflex"),
        (hf.Siglip2Config(), "siglip2_vision_model, which takes images of any shape .*naflex"),
        (hf.ResNetConfig(), "is a resnet, which gives no patch features .*; supported: open_clip ViTs.* DINOv3 ViT"),
        (hf.BertConfig(), "is a bert, which gives no patch features .*; supported"),
        (hf.SiglipVisionConfig(**WITH_MLP, vision_use_head=False), "no pooling head, so no global feature"),
    ],
)
def test_models_without_patch_features(other: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        vision_dims(vision(architecture_files(tmp_path, other, CLIP)))


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    """A missing tensor, shape, weight file or JSON file is an error of one line; no tower keeps random weights."""
    folder, _ = saved(tmp_path / "model", "dinov2")
    good = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.mlp.fc1.bias"
    save_file({k: v for k, v in good.items() if k != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no weights for 1 tensors, among them {name}"):
        load_vision_encoder(vision(folder))
    save_file(good | {name: torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"weights of another shape for 1 tensors, among them {name}"):
        load_vision_encoder(vision(folder))
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"its model\.safetensors is neither"):
        load_vision_encoder(vision(folder))
    for file in ("model.safetensors", "preprocessor_config.json", "config.json"):
        (folder / file).unlink()
        with pytest.raises(ValueError, match=f"no vision encoder .* its {file} is neither in a folder") as e:
            load_vision_encoder(vision(folder))
        assert "\n" not in str(e.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, "dinov2")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"its model\.safetensors is neither"):
        load_vision_encoder(vision(folder))


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"no vision encoder 'nobody/nothing': .*Set model.vision.name to a fold") as e:
        vision_dims(vision("nobody/nothing"))
    assert "\n" not in str(e.value)


def test_pretrained_is_not_for_transformers() -> None:
    """The default of `pretrained` is openai for open_clip only."""
    assert VisionSettings().pretrained == "openai" and VisionSettings(name="ViT-L-14").pretrained == "openai"
    assert vision("x").pretrained is None
    with pytest.raises(ValueError, match="'laion' is no folder that save_pretrained wrote.* leave pretrained out"):
        vision_dims(VisionSettings(library="transformers", name="x", pretrained="laion"))


def test_every_family_is_tested() -> None:
    kinds = {getattr(settings, "vision_config", settings).model_type for settings, _ in MODELS.values()}
    assert kinds == set(FAMILIES)
