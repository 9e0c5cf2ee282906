"""The model card is a function of its fields, and states no more than they do."""

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

from notellm2_core.config.settings import Config
from notellm2_core.model.build import build_model
from notellm2_core.model.card import Architecture, card_fields, model_card, read_card_fields
from notellm2_core.model.llm import tiny_tokenizer
from notellm2_core.training.state.save import save_model
from notellm2_core.vision.encoder import load_vision_encoder
from tests.support.tiny_model import NUM_PATCHES, VISION_WIDTH, tiny_config

ARCHITECTURE = Architecture(
    encoder_id="0123456789abcdef", num_patches=196, vision_width=768, num_visual_words=16, num_layers=24,
    llm_width=4096, projection_dim=64,
)  # fmt: skip
SIZES = {"llm.a.weight": 1000, "llm.b.weight": 234, "connector.queries": 5, "tau": 1}
TRAINING = {"steps": 7956, "num_train_pairs": 12345, "num_train_notes": 678, "num_validation_pairs": 90,
            "validation_recall_at_10": 0.31415926}  # fmt: skip
RECALL = "| method | R@10 |\n|---|---|\n| notellm2 | 12.3 |\n"


def fields(days: tuple[str, str] | None = ("2025-01-05", "2025-01-19"), **model: Any) -> dict[str, Any]:
    config = Config(name="weekly", model={"llm": {"name": "Qwen/Qwen-7B-Chat"}, **model})
    return card_fields(config, ARCHITECTURE, SIZES, days, TRAINING)


def split(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_states_every_field() -> None:
    """The LLM has 1000 + 234 parameters, and 0.31415926 is printed with four digits."""
    front, body = split(model_card(fields(), RECALL))
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "feature-extraction"
    assert front["base_model"] == ["Qwen/Qwen-7B-Chat"] and front["tags"][0] == "notellm2"
    assert body.lstrip().startswith("# weekly\n")
    for text in (
        "| prompt | micl |", "| late fusion | yes |", "| losses | visual, multimodal |",
        "| LLM | Qwen/Qwen-7B-Chat, 24 layers |", "open_clip ViT-B-16 (openai), checksum 0123456789abcdef",
        "| llm, parameters | 1,234 |", "| visual tokens | 16 |", "| content words read | 80 |",
        "Logs from 2025-01-05 to 2025-01-19 (exclusive, UTC). 12,345 pairs of 678 notes, and 90 pairs for validation.",
        "| validation_recall_at_10 | 0.3142 |", RECALL, "Embedder.from_pretrained", "# [1, 64], unit length",
    ):  # fmt: skip
        assert text in body, text


def test_a_licence_is_never_invented() -> None:
    front, body = split(model_card(fields()))
    assert (front["license"], front["license_name"]) == ("other", "not-stated")
    assert "None is stated" in body and "licences of the LLM and of the vision encoder" in body
    front, body = split(model_card(fields(license="apache-2.0")))
    assert front["license"] == "apache-2.0" and "license_name" not in front
    assert "`apache-2.0` for the trained weights. The licences of the LLM" in body


def test_the_card_states_what_is_unknown(tmp_path: Path) -> None:
    """A folder, a package and a name without owner are no models of the hub, so they are no base model."""
    (tmp_path / "llm").mkdir()
    for name in (str(tmp_path / "llm"), "package:smollm2", "tiny"):
        assert fields(llm={"name": name})["base_model"] == []
    hub = {"library": "open_clip", "name": "hf-hub:owner/tower"}
    assert fields(vision=hub)["base_model"] == ["Qwen/Qwen-7B-Chat", "owner/tower"]
    initial = fields(days=None, llm={"name": "tiny"}) | {"training": None}
    front, body = split(model_card(initial))
    assert "base_model" not in front
    for text in ("before its first step", "days of the logs were not recorded", "Not measured here"):
        assert text in body


def test_the_layout_decides_library_and_example() -> None:
    front, body = split(model_card(fields(), layout="sentence-transformers"))
    assert front["library_name"] == "sentence-transformers" and front["pipeline_tag"] == "sentence-similarity"
    assert "sentence_transformer(" in body and "Embedder" not in body
    assert "notellm2_core.model.mlrm" not in model_card(fields())  # the Embedder registers the model itself


NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DECODERS = {
    "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4},
    "bloom": {"n_layer": 3, "hidden_size": 32, "n_head": 4},
    "opt": {"num_hidden_layers": 3, "hidden_size": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4},
}


@pytest.mark.parametrize(
    ("method", "connector", "llm", "expected"),
    [
        ("notellm2", "qformer", "tiny", (4, 2, 64)),
        ("only_late_fusion", "qformer", "tiny", (0, 2, 64)),  # its prompt has no image
        ("notellm2", "linear", "tiny", (NUM_PATCHES, 2, 64)),  # a visual token per patch
        ("notellm2", "mlp", "tiny", (NUM_PATCHES, 2, 64)),
        *(("notellm2", "qformer", kind, (4, 3, 32)) for kind in DECODERS),  # each has its own names of sizes
    ],
)
def test_the_numbers_are_the_models(
    method: str, connector: str, llm: str, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    """`expected` has the visual tokens, and the layers and the width of the LLM from its definition above."""
    name = "tiny"
    if llm in DECODERS:
        tokenizer, name = tiny_tokenizer(), str(tmp_path / "llm")
        sizes = hf.AutoConfig.for_model(llm, vocab_size=len(tokenizer), **DECODERS[llm], **NO_ENDS)
        hf.AutoModel.from_config(sizes).save_pretrained(name)
        tokenizer.save_pretrained(name)
    config = tiny_config(method, connector=connector, name=name, attention="eager")
    load_vision_encoder(config.model.vision).save_pretrained(tmp_path / "vision")
    save_model(*build_model(config, tmp_path), tmp_path / "vision", tmp_path / "out", config)
    actual = read_card_fields(tmp_path / "out")
    shapes = actual["shapes"]
    assert (shapes["visual tokens"], actual["llm"]["num_layers"], shapes["LLM width"]) == expected
    assert (shapes["patches per image"], shapes["vision width"]) == (NUM_PATCHES, VISION_WIDTH)


def test_unreadable_card_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no card\.json"):
        read_card_fields(tmp_path)
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_card_fields(tmp_path)
