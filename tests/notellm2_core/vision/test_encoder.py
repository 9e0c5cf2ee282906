import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn

from notellm2_core.config.model import VisionSettings
from notellm2_core.runtime.packaged_weights import PACKAGES
from notellm2_core.vision.architecture import Preprocess, library
from notellm2_core.vision.encoder import VisionEncoder, load_vision_encoder, to_pixels, vision_architecture, vision_dims
from notellm2_core.vision.towers import architecture_of, build_tower

TINY = VisionSettings(library="tiny")
LITE0 = VisionSettings(library="timm", name="tf_efficientnet_lite0", pretrained="package:efficientnet-lite0")
SMALL_CLIP = "ViT-small-for-tests"


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A small registered open_clip model and a checkpoint file of it: (model, file)."""
    open_clip = library("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    cfg = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / f"{SMALL_CLIP}.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(folder / f"{SMALL_CLIP}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(SMALL_CLIP).eval()
    torch.save(model.state_dict(), folder / "clip.pt")
    return model, folder / "clip.pt"


@pytest.mark.parametrize(
    ("vision", "dims"),
    [
        (VisionSettings(name="ViT-B-16"), (196, 768)),  # (224 / 16)^2 patches
        (VisionSettings(name="ViT-bigG-14"), (256, 1664)),  # (224 / 14)^2 patches, before the 1280-d projection
        (VisionSettings(name="ViT-B-16-SigLIP"), (196, 768)),  # a timm model inside open_clip, without a class token
        (LITE0, (49, 1280)),
        (VisionSettings(library="timm", name="swin_tiny_patch4_window7_224"), (49, 768)),  # channels last
        (VisionSettings(library="timm", name="vit_base_patch16_224.augreg_in1k", pretrained=None), (196, 768)),
        (TINY, (16, 32)),
    ],
)
def test_dims_without_weights(vision, dims):
    assert vision_dims(vision) == dims


def test_parameter_count_of_the_papers_encoder():
    """85.8 M (Table 7): patches 3*16*16*768 = 589,824, class token 768, positions 197*768 = 151,296, two layer norms
    3,072, and 12 blocks of 7,087,872 (two norms 3,072; attention 4*768*768 + 4*768; MLP 2*768*3072 + 3072 + 768).
    """
    block = 3_072 + 4 * 768 * 768 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768
    with torch.device("meta"):
        tower = build_tower(architecture_of(VisionSettings(name="ViT-B-16")))
    assert sum(p.numel() for p in tower.parameters()) == 589_824 + 768 + 151_296 + 3_072 + 12 * block == 85_799_424


def test_clip_features_are_those_before_the_projection(small_clip):
    """The patches are ln_post's output without the class token; global feature @ projection is CLIP's image feature."""
    model, file = small_clip
    encoder = load_vision_encoder(VisionSettings(name=SMALL_CLIP, pretrained=str(file)))
    pixels = torch.randn(3, 3, 32, 32)
    outputs = []
    handle = model.visual.ln_post.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        expected = model.encode_image(pixels)
    handle.remove()
    patches, pooled = encoder(pixels)
    assert patches.shape == (3, 16, 16) and pooled.shape == (3, 16)
    torch.testing.assert_close(patches, outputs[0][:, 1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled @ model.visual.proj, expected, rtol=1e-5, atol=1e-6)


def test_openai_weights_get_the_activation_they_were_trained_with():
    assert architecture_of(VisionSettings(name="ViT-B-16", pretrained="openai")).model["quick_gelu"]
    assert not architecture_of(VisionSettings(name="ViT-B-16", pretrained="laion2b_s34b_b88k")).model["quick_gelu"]


def test_an_open_clip_folder_is_read_with_its_preprocessing(small_clip, tmp_path):
    model, file = small_clip
    raw = library("open_clip").get_model_config(SMALL_CLIP)
    pre = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": raw, "preprocess_cfg": pre}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # a folder of the hub may be for transformers too
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    encoder = load_vision_encoder(VisionSettings(name="anything", pretrained=str(tmp_path)))
    assert encoder.architecture.preprocess.resize == "squash"
    assert encoder.architecture.preprocess.std == (0.25, 0.25, 0.25)
    same = load_vision_encoder(VisionSettings(name=SMALL_CLIP, pretrained=str(file)))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(pixels)[0], same(pixels)[0])
    assert encoder.encoder_id != same.encoder_id  # because of the preprocessing


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_timm_checkpoint_file(tmp_path, name):
    """The file holds a classifier. The features are timm's, and its classifier reads the global one."""
    torch.manual_seed(0)
    model = library("timm").create_model(name, num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    encoder = load_vision_encoder(VisionSettings(library="timm", name=name, pretrained=str(tmp_path / "model.pt")))
    side = encoder.architecture.preprocess.size_px
    pixels = torch.randn(2, 3, side, side)
    patches, pooled = encoder(pixels)
    assert patches.shape == (2, encoder.num_patches, encoder.width)
    with torch.no_grad():
        torch.testing.assert_close(model.get_classifier()(pooled), model(pixels), rtol=1e-4, atol=1e-5)


def test_efficientnet_from_pip():
    """EfficientNet's global feature is the mean of its 7 x 7 map. ReLU6 bounds both, and they depend on the image."""
    pytest.importorskip(PACKAGES["package:efficientnet-lite0"].module)
    encoder = load_vision_encoder(LITE0)
    pixels = torch.stack([encoder.preprocess(random_image(256, 171)), encoder.preprocess(Image.new("RGB", (90, 120)))])
    patches, pooled = encoder(pixels)
    assert patches.shape == (2, 49, 1280) and pooled.shape == (2, 1280)
    torch.testing.assert_close(patches.mean(1), pooled, rtol=1e-4, atol=1e-5)
    assert patches.min() >= 0 and patches.max() <= 6
    assert (pooled[0] - pooled[1]).abs().max() > 0.1
    assert load_vision_encoder(LITE0).encoder_id == encoder.encoder_id


def test_package_weights_that_do_not_fit_are_refused(monkeypatch):
    pytest.importorskip(PACKAGES["package:efficientnet-lite0"].module)
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: dict(list(real(*a, **k).items())[1:]))
    with pytest.raises(ValueError, match="295 tensors that do not match the 296"):
        load_vision_encoder(LITE0)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (VisionSettings(name="ViT-B16"), "no model 'ViT-B16'; close to it: ViT-B-16"),
        (VisionSettings(library="timm", name="efficientnet_lite"), "close to it: .*efficientnet_lite0"),
        (VisionSettings(name="RN50"), "ModifiedResNet of open_clip has no patch features; supported: open_clip ViTs"),
        (VisionSettings(name="coca_ViT-B-32"), "no patch features; supported"),
        (VisionSettings(library="timm", name="mobilenetv3_small_100"), "do not go together; supported"),
        (VisionSettings(library="timm", name="volo_d1_224"), "197 tokens of timm's VOLO are not the patches of a squ"),
        (VisionSettings(library="timm", name="coat_tiny"), "CoaT of timm has no patch features; supported"),
    ],
)
def test_unusable_models(vision, message):
    with pytest.raises(ValueError, match=message):
        vision_dims(vision)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (VisionSettings(pretrained="nope"), "'nope' is neither a file, .* openai, laion400m"),
        (VisionSettings(pretrained=None), "None is neither a file"),
        (VisionSettings(library="timm", name="test_vit", pretrained="nope"), "timm knows for test_vit: r160_in1k"),
        (LITE0.model_copy(update={"name": "tf_efficientnet_lite1"}), "belong to timm's tf_efficientnet_lite0"),
        (LITE0.model_copy(update={"pretrained": "package:x"}), "known packages: package:efficientnet-lite0"),
    ],
)
def test_unusable_weights(vision, message):
    with pytest.raises(ValueError, match=message):
        load_vision_encoder(vision)


def test_a_file_of_another_model_is_one_line(small_clip, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    for vision in (
        VisionSettings(name=SMALL_CLIP, pretrained=str(tmp_path / "x.pt")),
        VisionSettings(library="timm", name="test_vit", pretrained=str(tmp_path / "x.pt")),
    ):
        with pytest.raises(ValueError, match=r"no vision weights from .*x\.pt") as e:
            load_vision_encoder(vision)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "vision",
    [VisionSettings(), VisionSettings(library="timm", name="test_vit.r160_in1k", pretrained=None)],
)
def test_an_unreachable_hub_is_named_with_the_setting_that_helps(vision, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"from the hub \(.*Set model.vision.pretrained to a checkpoint file"):
        load_vision_encoder(vision)


def test_saved_encoder_gives_the_same_bits(tmp_path, small_clip):
    for number, vision in enumerate([TINY, VisionSettings(name=SMALL_CLIP, pretrained=str(small_clip[1]))]):
        encoder = load_vision_encoder(vision)
        encoder.save_pretrained(tmp_path / str(number))
        loaded = VisionEncoder.from_pretrained(tmp_path / str(number))
        pixels = encoder.preprocess(random_image(70, 50))[None]
        assert torch.equal(loaded.preprocess(random_image(70, 50))[None], pixels)
        for a, b in zip(encoder(pixels), loaded(pixels), strict=True):
            assert torch.equal(a, b)
        assert (loaded.encoder_id, loaded.num_patches, loaded.width) == (encoder.encoder_id, 16, encoder.width)
        by_setting = VisionSettings(name="any", pretrained=str(tmp_path / str(number)))
        assert load_vision_encoder(by_setting).encoder_id == encoder.encoder_id
        assert vision_dims(by_setting) == (16, encoder.width)
        assert vision_architecture(by_setting) == encoder.architecture


def test_a_saved_encoder_that_was_changed_is_refused(tmp_path):
    load_vision_encoder(TINY).save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    changed = good | {"tower.first.bias": good["tower.first.bias"] + 1e-6}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not match its checksum"):
        VisionEncoder.from_pretrained(tmp_path)
    save_file({k: v for k, v in good.items() if "bias" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded as a tiny encoder: .*first\.bias"):
        VisionEncoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be loaded"):
        VisionEncoder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"]["library"] = "zzz"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not the configuration of a saved vision encoder .KeyError.'zzz'"):
        VisionEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the configuration of a saved vision encoder"):
        VisionEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no vision encoder"):
        VisionEncoder.from_pretrained(tmp_path / "nowhere")


def test_frozen():
    """A frozen encoder inside a module in training stays in eval mode, has no gradients, and gives the same bits."""
    encoder = load_vision_encoder(TINY)
    pixels = torch.randn(2, 3, 32, 32)
    before = encoder(pixels)
    parent = nn.Sequential(encoder).train()
    assert parent.training and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    patches, pooled = encoder(pixels.requires_grad_())
    assert not patches.requires_grad and not pooled.requires_grad
    assert torch.equal(patches, before[0]) and torch.equal(pooled, before[1])


def test_tiny_distinguishes_colours_and_shapes():
    """Another colour changes the global feature by over a tenth of its length, another shape by over a fiftieth. The
    weights do not depend on the caller's random state.
    """
    encoder = load_vision_encoder(TINY)
    torch.manual_seed(1)
    assert load_vision_encoder(TINY).encoder_id == encoder.encoder_id

    def feature(colour: str, shape: str) -> torch.Tensor:
        image = Image.new("RGB", (64, 64), "white")
        getattr(ImageDraw.Draw(image), shape)((12, 12, 52, 52), fill=colour)
        return encoder(encoder.preprocess(image)[None])[1][0]

    base = feature("red", "rectangle")
    assert (feature("blue", "rectangle") - base).norm() > 0.1 * base.norm()
    assert (feature("red", "ellipse") - base).norm() > 0.02 * base.norm()


def test_the_id_depends_on_the_weights_and_not_on_their_path(small_clip, tmp_path):
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(Path(small_clip[1]).read_bytes())
    ids = {
        load_vision_encoder(VisionSettings(name=SMALL_CLIP, pretrained=str(p))).encoder_id
        for p in (small_clip[1], copy)
    }
    assert len(ids) == 1 and len(ids.pop()) == 16


@settings(max_examples=25)
@given(
    width=st.integers(1, 260), height=st.integers(1, 260), crop=st.sampled_from([1.0, 0.875, 0.9]), squash=st.booleans()
)
def test_pixels_are_those_of_the_libraries(width, height, crop, squash):
    """For shapes up to 8:1 the pixels equal those of timm's transform, and (without crop_pct) of open_clip's."""
    if max(width, height) > 8 * min(width, height):
        width = height
    library("timm"), library("open_clip")
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from timm.data import create_transform

    how = Preprocess(size_px=56, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_ratio=crop)
    how = replace(how, resize="squash" if squash else "shortest")
    image = random_image(width, height, seed=width * height)
    theirs = create_transform(
        (3, 56, 56), mean=how.mean, std=how.std, interpolation="bicubic", crop_pct=crop,
        crop_mode="squash" if squash else "center",
    )  # fmt: skip
    torch.testing.assert_close(to_pixels(image, how), theirs(image), rtol=0, atol=1e-6)
    if crop == 1.0:
        cfg = PreprocessCfg(56, mean=how.mean, std=how.std, resize_mode=how.resize)
        torch.testing.assert_close(
            to_pixels(image, how), image_transform_v2(cfg, is_train=False)(image), rtol=0, atol=1e-6
        )


def test_a_line_of_pixels_is_not_enlarged_as_a_whole():
    """A 20,000 x 1 image would be resized to 640,000 x 32 before the crop; only its middle is resized."""
    image = Image.new("RGB", (20_000, 1), "white")
    image.paste("red", (9_990, 0, 10_010, 1))
    pixels = to_pixels(image, Preprocess(size_px=32))
    assert pixels.shape == (3, 32, 32)
    assert torch.equal(pixels[:, 16, 16], torch.tensor([1.0, -1.0, -1.0]))
