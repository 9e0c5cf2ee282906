from pathlib import Path

import pytest

from notellm2_core.config.load import load_config
from notellm2_core.config.methods import METHODS
from notellm2_core.config.settings import Config
from notellm2_core.model.describe import describe
from tests.support.tiny_model import EMPTY, tiny_config, tiny_model

CONFIGS = Path("pipelines/configs")
VIT_B_PROJECTION, BIGG_PROJECTION = 768 * 512, 1664 * 1280


def test_counts_are_those_of_the_tiny_model() -> None:
    """The built model's LLM has two more rows of 64 word embeddings than described, for the two new tokens."""
    description = describe(tiny_config())
    model, _ = tiny_model()
    real = sum(p.numel() for p in model.parameters())
    parameters = description["parameters"]
    assert parameters["total"] - parameters["vision"] == parameters["trainable"] == real - 2 * 64
    assert description["shapes"] == {
        "L": 16, "h_v": 32, "L_c": 4, "h_q": 32, "h_t": 64, "llm_layers": 2, "embedding": 64, "matryoshka": [],
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_is_laid_out_as_notes_are_encoded(method: str) -> None:
    """The positions are those of an encoded note without text, and the pieces follow each other without gaps."""
    layout = describe(tiny_config(method))["prompt"]
    _, processor = tiny_model(method)
    note = processor.encode(EMPTY)
    assert layout["tokens"] == len(note) and layout["n_m"] == len(note) - 1
    assert layout["image"] == (None if note.image_start < 0 else [note.image_start, note.image_start + 4])
    assert layout["n_v"] == (None if note.visual_index < 0 else note.visual_index)
    ends = [piece["first"] + piece["tokens"] for piece in layout["pieces"]]
    assert [piece["first"] for piece in layout["pieces"]] == [0, *ends[:-1]]


def test_the_trainable_parameters() -> None:
    """Trainable are connector, projector and, in place of the LLM, adapters of rank 2 on 7 linear layers of 2 blocks.

    Per block, q and o are 64 x 64, k and v 64 x 32, gate and up 64 x 128 and down 128 x 64, so the adapters have
    2 x (2 x 128 + 2 x 96 + 3 x 192) parameters.
    """
    config = tiny_config()
    config = Config(
        name="t",
        model=config.model.model_dump() | {"lora": {"rank": 2}},
        training={"trainable": ["llm", "connector", "projector"]},
    )
    parameters = describe(config)["parameters"]
    adapters = 2 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert parameters["trainable"] == adapters + parameters["connector"] + parameters["projector"]
    assert parameters["total"] == describe(tiny_config())["parameters"]["total"]


@pytest.mark.parametrize(
    ("name", "llm_parameters", "qformer", "vision_parameters", "projection", "totals", "printed"),
    [
        ("mtomato_base", 6_677_860_352, 49_620_480, 85.8e6, VIT_B_PROJECTION, (6.834, 6.870), ("6.8", "6.9")),
        ("mqwen_base", 7_098_994_688, 49_620_480, 85.8e6, VIT_B_PROJECTION, (7.255, 7.291), ("7.3", "7.3")),
        ("mqwen_bigg", 7_098_994_688, 142_869_504, 1.84e9, BIGG_PROJECTION, (9.108, 9.148), ("9.1", "9.2")),
    ],
)
def test_totals_of_table_7(
    name: str,
    llm_parameters: int,
    qformer: int,
    vision_parameters: float,
    projection: int,
    totals: tuple[float, float],
    printed: tuple[str, str],
) -> None:
    """`basic` and `notellm2`, in billions. The paper's numbers (one digit) count the tower's projection, like `total`.

    The parts without LLM, tower and Q-Former: queries 16 h_q, the MLP h_q x 4,096 + 4,096 + 4,096^2 + 4,096, the
    projector 4,096 x 64 + 64, tau 1; with late fusion, 8,192 x 4,096 + 4,096 and h_v x 4,096 + 4,096.
    """
    file = CONFIGS / f"paper_{name}.yaml"
    basic, fused = (describe(load_config(file, {"model.method": method})) for method in ("basic", "notellm2"))
    parameters = basic["parameters"]
    h_q, h_v = basic["shapes"]["h_q"], basic["shapes"]["h_v"]
    assert parameters["llm"] == llm_parameters
    assert basic["qformer_parameters"] == qformer
    assert parameters["vision"] == pytest.approx(vision_parameters, rel=3e-3)
    assert parameters["connector"] == qformer + 16 * h_q + h_q * 4096 + 4096 + 4096**2 + 4096
    assert (parameters["projector"], parameters["tau"]) == (4096 * 64 + 64, 1)
    assert (parameters["fusion"], fused["parameters"]["fusion"]) == (0, 8192 * 4096 + 4096 + h_v * 4096 + 4096)
    assert parameters["vision_projection"] == projection
    for description, total, digit in zip((basic, fused), totals, printed, strict=True):
        assert (description["parameters"]["total"] - projection) / 1e9 == pytest.approx(total, abs=1e-3)
        assert f"{description['parameters']['total'] / 1e9:.1f}" == digit


def test_without_the_tokenizer_the_pieces_are_still_reported() -> None:
    """Without Qwen's tokenizer, the pieces of the mICL prompt are in order, with 16 visual tokens and no positions."""
    layout = describe(load_config(CONFIGS / "paper_mqwen_base.yaml"))["prompt"]
    assert layout["tokens"] is None and "Qwen1.5-7B-Chat is not on this machine" in layout["why"]
    names = [piece["piece"] for piece in layout["pieces"]]
    assert names.index("<IMG>") < names.index("<IMG_EMB>") < names.index("title") < names.index("content")
    assert [piece["tokens"] for piece in layout["pieces"] if piece["piece"] == "<IMG>"] == [16]


def test_words_narrower_than_the_states() -> None:
    """As in OPT-350m, word embeddings are narrower than states: h_t is the width that connector and projector see."""
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 8,
    }
    llm = {"name": "x", "config": {"model_type": "opt", "vocab_size": 50, **sizes}}
    config = Config(name="t", model=tiny_config().model.model_dump() | {"llm": llm})
    assert describe(config)["shapes"]["h_t"] == 16


def test_an_unreachable_llm_needs_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be loaded"):
        describe(Config(name="x", model={"llm": {"name": "nobody/nothing"}, "vision": {"library": "tiny"}}))
