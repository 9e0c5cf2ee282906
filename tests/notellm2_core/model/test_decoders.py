"""Any causal decoder of transformers, by folder, works in the whole model; other models are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from notellm2_core.config.model import LLMSettings
from notellm2_core.model.build import build_model, load_model
from notellm2_core.model.llm import llm_architecture, load_llm, tiny_tokenizer
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.packed_attention import PACKED_SDPA
from notellm2_core.notes.processor import MLRMProcessor
from tests.support.tiny_model import EMPTY, LONG, SHORT, batch_of, features, tiny_config

NOTES = [SHORT, LONG, EMPTY]  # of 3 lengths, all longer than the sliding windows below
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512} | NO_ENDS
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 8}
WINDOW = {"sliding_window": 8}
BOTH, EAGER = ("sdpa", "eager"), ("eager",)

# model_type -> (sizes, the attentions that it has)
DECODERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (LLAMA, BOTH),
    "qwen2": (LLAMA | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, BOTH),
    "qwen3": (LLAMA | {"head_dim": 16}, BOTH),
    "mistral": (LLAMA | WINDOW, BOTH),
    "phi3": (LLAMA | WINDOW, BOTH),
    "gemma": (GEMMA, BOTH),
    "gemma2": (GEMMA | WINDOW, EAGER),  # it caps its attention's logits
    "gemma3_text": (GEMMA | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, BOTH),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512} | NO_ENDS, BOTH),  # learned positions
    "opt": (SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 1}, BOTH),  # words narrower than states
    "nemotron": (LLAMA, BOTH),  # its layers drop the packing argument
    "falcon": (SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True}, BOTH),
    "lfm2": (LLAMA | {"layer_types": ["conv", "full_attention"]}, BOTH),  # a convolution over the tokens
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4} | NO_ENDS, EAGER),  # ALiBi: no position_ids
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} | NO_ENDS, EAGER),  # no attention
}
PADDED = ("falcon", "lfm2", "nemotron")  # cannot be packed


def save_llm(folder: Path, architecture: Any, model_class: Any = hf.AutoModelForCausalLM) -> Any:
    """Save a random model with the tiny tokenizer. Its weights are large, so that all of them matter."""
    torch.manual_seed(0)
    model = model_class.from_config(architecture).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def architecture(kind: str) -> Any:
    return hf.AutoConfig.for_model(kind, vocab_size=len(tiny_tokenizer()), **DECODERS[kind][0])


def llm_states(model: MLRMModel, processor: MLRMProcessor, side: str) -> Tensor:
    """n_m of NOTES, [3, h_t]: padded on `side`, or each note alone."""
    with torch.no_grad():
        if side in ("left", "right"):
            processor.padding_side = side  # type: ignore[assignment]
            return model.states(batch_of(processor, NOTES)).llm_multimodal
        patches, pooled = features(len(NOTES))
        rows = []
        for i, note in enumerate(NOTES):
            own = patches[i : i + 1], pooled[i : i + 1]
            one = processor.collate([processor.encode(note)], *own, np.array([True]))
            rows.append(model.states(one).llm_multimodal)
        return torch.cat(rows)


@pytest.mark.parametrize("kind", DECODERS)
def test_any_decoder(kind: str, tmp_path: Path) -> None:
    """With left, right and no padding, sdpa (packed where possible) and eager, the states agree to 1e-5.

    The states are about 1 and differ by 0.1 between notes. (Mamba's scan rounds by 1.7e-5 on some CPUs.) A saved model
    gives the same bits, and the first layer alone works too.
    """
    save_llm(tmp_path / "llm", architecture(kind))
    states = []
    for attention in DECODERS[kind][1]:
        model, processor = build_model(tiny_config(name=str(tmp_path / "llm"), attention=attention), tmp_path)
        states += [llm_states(model, processor, side) for side in ("left", "none", "right")]
        packs = attention == "sdpa" and kind not in PADDED
        assert model.llm.config._attn_implementation == (PACKED_SDPA if packs else attention) or kind == "mamba"
    assert states[0].std() > 0.1 and torch.pdist(states[0]).min() > 0.1
    for other in states[1:]:
        torch.testing.assert_close(other, states[0], atol=5e-5 if kind == "mamba" else 1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert torch.equal(llm_states(*load_model(tmp_path / "model"), "right"), states[-1])
    one, _ = load_llm(LLMSettings(name=str(tmp_path / "llm"), num_layers=1, attention="eager"), tmp_path)
    assert one.config.num_hidden_layers == 1 and sum(p.numel() for p in one.parameters()) < model.llm.num_parameters()


VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
MULTIMODAL = {
    "gemma3": lambda text: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text, **GEMMA), vision_config=VIT | {"patch_size": 8}, mm_tokens_per_image=4
    ),
    "llava": lambda text: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text, **LLAMA), vision_config=hf.CLIPVisionConfig(**VIT, patch_size=8)
    ),
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_decoder_of_a_multimodal_checkpoint_is_loaded(kind: str, tmp_path: Path) -> None:
    """The decoder, whole or its first layer, has the checkpoint's weights; a model with it is saved and loaded."""
    whole = save_llm(
        tmp_path / "llm", MULTIMODAL[kind]({"vocab_size": len(tiny_tokenizer())}), hf.AutoModelForImageTextToText
    )
    theirs = whole.model.language_model.state_dict()
    for num_layers in (None, 1):
        settings = LLMSettings(name=str(tmp_path / "llm"), num_layers=num_layers)
        decoder, _ = load_llm(settings, tmp_path)
        assert decoder.config.num_hidden_layers == llm_architecture(settings).num_hidden_layers == (num_layers or 2)
        assert not hasattr(decoder, "vision_tower")
        assert all(torch.equal(weight, theirs[name]) for name, weight in decoder.state_dict().items())
    model, processor = build_model(tiny_config(name=str(tmp_path / "llm")), tmp_path)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    states = llm_states(model, processor, "left")
    torch.testing.assert_close(llm_states(*load_model(tmp_path / "model"), "right"), states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (hf.BertConfig(), "is a bert, not a decoder-only LLM; name a causal language model"),
        (hf.T5Config(), "is a t5, not a decoder-only LLM"),
        (hf.ViTConfig(), "is a vit, not a decoder-only LLM"),
        (hf.CLIPConfig(), "is a clip, not a decoder-only LLM"),
        (hf.Blip2Config(text_config=hf.T5Config()), "is a blip-2, not a decoder-only LLM"),
        (hf.Gemma2Config(), "is a gemma2, which has no sdpa attention; set model.llm.attention to eager"),
    ],
)
def test_other_models_are_refused(other: Any, message: str, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        llm_architecture(LLMSettings(name=str(tmp_path)))
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_llm(LLMSettings(name=str(tmp_path)), tmp_path)


def test_folders_without_usable_weights_are_refused(tmp_path: Path) -> None:
    """A tensor of another shape, damaged bytes, no weights and pickled weights are errors of one line each."""
    folder = tmp_path / "llm"
    model = save_llm(folder, architecture("qwen2"))
    good = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(good | {name: torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    messages = [f"weights of another shape for 1 tensors, among them {name.removeprefix('model.')}"]
    with pytest.raises(ValueError, match=messages[0]):
        load_llm(LLMSettings(name=str(folder)), tmp_path)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_llm(LLMSettings(name=str(folder)), tmp_path)
    (folder / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot be loaded \(.*safetensors.*; set model.llm.name to") as e:
            load_llm(LLMSettings(name=str(folder)), tmp_path)
        assert "\n" not in str(e.value)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")  # not unpickled


def test_a_missing_gguf_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*x\.gguf; set model.llm.name to"):
        load_llm(LLMSettings(name=str(tmp_path / "x.gguf")), tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"not a GGUF")
    with pytest.raises(ValueError, match=r"x\.gguf' cannot be loaded"):
        load_llm(LLMSettings(name=str(tmp_path / "x.gguf")), tmp_path)
    with pytest.raises(ValueError, match="package:efficientnet-lite0 is no package with an LLM"):
        load_llm(LLMSettings(name="package:efficientnet-lite0"), tmp_path)


def test_a_gguf_file_by_its_path(tmp_path: Path) -> None:
    """A GGUF without quantization, as llama.cpp writes it, is converted once, with its tensors in fp32."""
    import gguf

    width, inner, vocabulary = 32, 48, json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    words, merges = vocabulary["vocab"], [" ".join(pair) for pair in vocabulary["merges"]]
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words, key=words.__getitem__))
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(merges)
    shapes = {f"blk.0.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}.weight": (inner, width) for part in ("gate", "up")}
    shapes |= {"token_embd.weight": (len(words), width), "blk.0.ffn_down.weight": (width, inner)}
    norms = {f"{name}.weight": (width,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (shapes | norms).items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    settings = LLMSettings(name=str(tmp_path / "llama.gguf"))
    decoder: Any
    decoder, tokenizer = load_llm(settings, tmp_path / "cache")
    assert np.array_equal(decoder.embed_tokens.weight.detach(), tensors["token_embd.weight"])
    assert np.array_equal(decoder.layers[0].mlp.down_proj.weight.detach(), tensors["blk.0.ffn_down.weight"])
    assert tokenizer("a red kite")["input_ids"] == tiny_tokenizer()("a red kite")["input_ids"]
    assert llm_architecture(settings).hidden_size == width
    (converted,) = (tmp_path / "cache").glob("llama-*/model.safetensors")
    written = converted.stat().st_mtime_ns
    again, _ = load_llm(settings, tmp_path / "cache")
    assert converted.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), decoder.parameters(), strict=True))
