import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, LlamaConfig, LlamaModel

from notellm2_core.config.methods import METHODS
from notellm2_core.config.model import ConnectorSettings, LLMSettings
from notellm2_core.model.build import add_word_embeddings, load_model, require_its_tokenizer
from notellm2_core.model.llm import load_llm
from notellm2_core.model.mlrm import MLRMConfig, MLRMModel
from notellm2_core.notes.processor import MLRMProcessor
from tests.support.tiny_model import EMPTY, LONG, SHORT, batch_of, tiny_model

IN_A_FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
from notellm2_core.model.build import load_model
from tests.support.tiny_model import EMPTY, LONG, SHORT, batch_of
torch.set_num_threads(1)
for method in sys.argv[2:]:
    model, processor = load_model(Path(sys.argv[1], method))
    with torch.no_grad():
        output = model(batch_of(processor, [SHORT, LONG, EMPTY]))
    torch.save([output.multimodal, output.visual], Path(sys.argv[1], f"{method}.pt"))
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_same_seed_builds_the_same_model() -> None:
    torch.manual_seed(3)
    a, _ = tiny_model(seed=7)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    b, _ = tiny_model(seed=7)
    c, _ = tiny_model(seed=8)
    assert torch.equal(before, torch.get_rng_state())
    states = a.state_dict(), b.state_dict(), c.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    differ = {k for k in states[0] if not torch.equal(states[0][k], states[2][k])}
    assert "connector.qformer.queries" in differ and not any(k.startswith("llm.") for k in differ)


def test_the_pretrained_weights_do_not_change() -> None:
    """Building a model initialises only its new modules."""
    pretrained, _ = load_llm(LLMSettings(name="tiny"), Path("unused"))
    model, _ = tiny_model()
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(model.llm.state_dict()[name][: len(weight)], weight), name


def test_new_tokens_get_the_mean_of_the_other_embeddings() -> None:
    """A table, like Qwen's, may have more rows than tokens: with 10 rows and 7 tokens, ids 7 and 8 fit, 12 does not."""
    decoder = LlamaModel(
        LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    )
    before = decoder.embed_tokens.weight.detach().clone()
    add_word_embeddings(decoder, [7, 8], 7)
    assert decoder.embed_tokens.weight.shape == (10, 4)
    torch.testing.assert_close(decoder.embed_tokens.weight[7], before[:7].mean(0))
    torch.testing.assert_close(decoder.embed_tokens.weight[8], before[:7].mean(0))
    assert torch.equal(decoder.embed_tokens.weight[:7], before[:7])
    add_word_embeddings(decoder, [3, 12], 7)  # 3 is an old token: it keeps its row
    assert decoder.embed_tokens.weight.shape == (13, 4) and decoder.config.vocab_size == 13
    assert torch.equal(decoder.embed_tokens.weight[:7], before[:7])
    torch.testing.assert_close(decoder.embed_tokens.weight[12], before[:7].mean(0))


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    """The model of every method is saved by this process and loaded by another."""
    outputs = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for method in METHODS:
            model, processor = tiny_model(method)
            model.save_pretrained(tmp_path / method)
            processor.save_pretrained(tmp_path / method)
            with torch.no_grad():
                outputs[method] = model(batch_of(processor, [SHORT, LONG, EMPTY]))
    finally:
        torch.set_num_threads(threads)
    code = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path), *METHODS]
    subprocess.run(code, check=True, capture_output=True)
    for method, output in outputs.items():
        saved = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert torch.equal(saved[0], output.multimodal), method
        assert output.visual is None or torch.equal(saved[1], output.visual), method


def test_transformers_auto_classes_know_it(saved: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(saved), MLRMConfig)
    assert isinstance(AutoModel.from_pretrained(saved), MLRMModel)
    assert isinstance(AutoProcessor.from_pretrained(saved), MLRMProcessor)


def test_the_configuration_names_no_folder(saved: Path) -> None:
    assert "_name_or_path" not in json.loads((saved / "config.json").read_text())["llm"]


@pytest.mark.parametrize("loader", [load_model, AutoModel.from_pretrained])
@pytest.mark.parametrize("damage", ["missing", "missing_llm", "shape", "unknown"])
def test_an_incomplete_checkpoint_is_refused(saved: Path, damage: str, loader) -> None:  # type: ignore[no-untyped-def]
    weights = load_file(saved / "model.safetensors")
    if damage == "missing":
        del weights["connector.qformer.queries"]
    elif damage == "missing_llm":
        del weights["llm.layers.1.mlp.up_proj.weight"]
    elif damage == "shape":
        weights["projector.weight"] = torch.zeros(32, 64)
    else:
        weights["surprise"] = torch.zeros(1)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    words = {"missing": "queries", "missing_llm": "up_proj", "unknown": "surprise"}
    words["shape"] = "has weights of another shape for 1 tensors, among them projector.weight"
    with pytest.raises(ValueError, match=words[damage]):
        loader(saved)


@pytest.mark.parametrize("name", ["num_queries", "prompt", "num_patches"])
def test_a_processor_of_another_model_is_refused(saved: Path, name: str) -> None:
    file = saved / "processor_config.json"
    settings = json.loads(file.read_text())
    settings[name] = "basic" if name == "prompt" else settings[name] - 1
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"the processor has {name} = .*use the one that was saved with the model"):
        load_model(saved)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("processor_config.json", {"prompt": "foo"}),
        ("processor_config.json", {"surprise": 1}),
        ("config.json", {"connector": None}),
        ("config.json", {"connector": {"kind": "qformer", "surprise": 1}}),
        ("config.json", {"connector": ConnectorSettings().model_dump() | {"vision_width": 8, "surprise": 1}}),
    ],
)
def test_a_damaged_configuration_is_one_sentence(saved: Path, file: str, change: dict[str, object]) -> None:
    (saved / file).write_text(json.dumps(json.loads((saved / file).read_text()) | change))
    with pytest.raises(ValueError, match=r"cannot be read|lacks llm or connector|is not the configuration of"):
        load_model(saved)


def test_nothing_is_unpickled(saved: Path) -> None:
    """A checkpoint that exists only as a pickle is refused."""
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(saved)


def test_words_without_an_embedding_are_refused() -> None:
    """Only tokens that were added to the tokenizer may lack one: they get the mean, as the new tokens do."""
    decoder, tokenizer = load_llm(LLMSettings(name="tiny"), Path("unused"))
    num_words = len(tokenizer)
    with pytest.raises(ValueError, match=f"has {num_words} words, its table of embeddings {num_words - 1}"):
        require_its_tokenizer(
            LlamaModel(LlamaConfig(**{**decoder.config.to_dict(), "vocab_size": num_words - 1})), tokenizer, "x"
        )
    tokenizer.add_tokens(["<ours>"])
    require_its_tokenizer(decoder, tokenizer, "x")
    mean = decoder.get_input_embeddings().weight.mean(0)
    add_word_embeddings(decoder, [num_words + 1], num_words + 1)
    torch.testing.assert_close(decoder.get_input_embeddings().weight[num_words:], mean.expand(2, -1))


def test_a_folder_without_a_model(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(saved)
    (saved / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(saved)


def test_a_folder_with_another_model(tmp_path: Path) -> None:
    load_llm(LLMSettings(name="tiny"), tmp_path)[0].save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama holds a llama, not a trained model of this project"):
        load_model(tmp_path / "llama")


def test_a_model_trained_with_flash_attention_loads_without_it(saved: Path) -> None:
    """Without flash-attn the model warns, and computes the same with sdpa."""
    written = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(written | {"attention": "flash_attention_2"}))
    with pytest.warns(UserWarning, match="flash-attn is not installed"):
        model, processor = load_model(saved)
    with torch.no_grad():
        batch = batch_of(processor, [SHORT, LONG])
        torch.testing.assert_close(model(batch).multimodal, tiny_model()[0](batch).multimodal)
