"""Packed notes: each attends only to itself, forward and backward, with any neighbours, on every kernel."""

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from notellm2_core.model.packed_attention import PACKED_SDPA
from notellm2_core.model.packed_llm import can_be_packed, packed_states
from notellm2_core.model.packing import Packing
from tests.notellm2_core.model.test_decoders import DECODERS, PADDED, architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [5, 12, 1, 30, 9, 31, 200]  # in several groups


def padded_words(lengths: list[int], width: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Random word embeddings [N, T, h], on padding too, and the mask [N, T]."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, -length if left else 0 : None if left else length] = 1
    return words, mask


def decoder(kind: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(architecture(kind), attn_implementation=attention).eval()  # no dropout


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), left=st.booleans())
def test_packing_and_unpacking(lengths: list[int], left: bool) -> None:
    words, mask = padded_words(lengths, 3, left)
    packing = Packing.of(mask)
    row = words.flatten(0, 1)[packing.index]
    assert len(row) == sum(lengths) == int(packing.ends[-1])
    assert sorted(packing.ends.diff().tolist()) == sorted(lengths)
    start = 0
    for group in packing.groups:
        assert group.first == start
        start = group.last
        back = group.padded(row)
        assert torch.equal(group.packed(back), row[group.first : group.last])
        assert back.numel() <= 3 * sum(max(n + 8, 1.25 * n) for n in lengths)  # bounded padding
    assert start == len(row)
    for number, end in enumerate(packing.ends[1:].tolist()):
        begin = int(packing.ends[number])
        assert packing.positions[begin:end].tolist() == list(range(end - begin))
        notes = packing.index[begin:end] // mask.shape[1]
        assert len(set(notes.tolist())) == 1 and torch.equal(row[begin:end], words[notes[0]][mask[notes[0]].bool()])


@pytest.mark.parametrize("kind", [kind for kind, (_, has) in DECODERS.items() if "sdpa" in has and kind not in PADDED])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_note_as_if_alone(kind: str, bf16: bool) -> None:
    """States, and gradients of the words and of every weight, are those of each note by itself.

    In bf16 they agree up to its 8 bits, with both of its kernels: short notes use matrix products, the long one torch's
    flash attention.
    """
    width = decoder(kind, "sdpa").get_input_embeddings().embedding_dim
    gradients = []
    for layout in ("packed", "alone"):
        llm = decoder(kind, PACKED_SDPA if layout == "packed" else "sdpa")
        words, mask = padded_words(LENGTHS, width)
        words.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if layout == "packed":
                states = packed_states(llm, words, mask)[mask.bool()]
            else:
                states_by_note = [
                    llm(inputs_embeds=words[i : i + 1, :n], use_cache=False).last_hidden_state[0]
                    for i, n in enumerate(LENGTHS)
                ]
                states = torch.cat(states_by_note)
        loss = states.float() * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        loss.sum().backward()  # (squares of normalised states always have the same sum)
        assert words.grad is not None and not words.grad[mask == 0].any()
        weights = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
        gradients.append({"states": states.detach().float(), "words": words.grad, **weights})
    packed, alone = gradients
    assert packed.keys() == alone.keys()
    largest = max(expected.norm() for expected in alone.values())
    for name, expected in alone.items():
        error = (packed[name] - expected).norm() / expected.norm().clamp(
            min=largest * 1e-2
        )  # (a key's bias has a gradient of 0)
        assert error < (3e-2 if bf16 else 1e-5), f"{name}: {error}"


@pytest.mark.parametrize("kind", ["llama", "mistral"])  # (mistral looks back 8 tokens)
@pytest.mark.parametrize("left", [False, True])
def test_the_shared_prefix_is_computed_once(kind: str, left: bool) -> None:
    """The states after the prefix do not change. The row has its 3 tokens once, then the other tokens of 6 notes."""
    lengths = [5, 12, 4, 30, 9, 31]
    llm = decoder(kind, PACKED_SDPA)
    words, mask = padded_words(lengths, 32, left)
    own_mask = mask * (mask.cumsum(1) > 3)
    for row in range(1, len(lengths)):
        words[row, (mask * (own_mask == 0))[row].bool()] = words[0, (mask * (own_mask == 0))[0].bool()]
    expected, actual = packed_states(llm, words, mask), packed_states(llm, words, mask, num_shared=3)
    torch.testing.assert_close(actual[own_mask.bool()], expected[own_mask.bool()])
    assert int((actual.abs().sum(-1) > 0).sum()) == len(Packing.of(mask, 3).index) == 3 + sum(n - 3 for n in lengths)


@pytest.mark.parametrize("kind", [kind for kind, (_, has) in DECODERS.items() if "sdpa" in has and kind not in PADDED])
def test_the_last_mlp_computes_only_needed_positions(kind: str) -> None:
    llm = decoder(kind, PACKED_SDPA)
    words, mask = padded_words(LENGTHS, llm.get_input_embeddings().embedding_dim)
    last = mask.sum(1) - 1
    needed = torch.stack([last, last // 2], dim=1)
    rows = torch.arange(len(LENGTHS))[:, None]
    num_positions: list[int] = []
    for name, module in llm.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda _, inputs, output: num_positions.append(inputs[0].shape[1]))
    with torch.no_grad():
        expected, actual = packed_states(llm, words, mask), packed_states(llm, words, mask, needed_positions=needed)
    torch.testing.assert_close(actual[rows, needed], expected[rows, needed])
    if kind not in ("gpt2", "opt"):  # their modules have other names
        assert num_positions[-2:] == [sum(LENGTHS), needed.numel()]
    with_gradient = packed_states(llm, words, mask, needed_positions=needed)
    torch.testing.assert_close(with_gradient, expected)


def test_without_packing_it_is_sdpa() -> None:
    """A direct call of the LLM, with rows of one length or with a mask, computes sdpa."""
    words, mask = padded_words([7, 12], 32)
    for attention_mask in (None, mask):
        packed, plain = (
            decoder("mistral", attention)(inputs_embeds=words, attention_mask=attention_mask).last_hidden_state
            for attention in (PACKED_SDPA, "sdpa")
        )
        real = torch.ones_like(mask).bool() if attention_mask is None else mask.bool()
        torch.testing.assert_close(packed[real], plain[real])


def test_which_decoders_can_be_packed() -> None:
    assert can_be_packed(decoder("llama", "sdpa")) and not can_be_packed(decoder("llama", "eager"))
    assert not can_be_packed(decoder("lfm2", "sdpa"))  # a convolution would reach into the next note
    both_ways = AutoConfig.for_model("gemma3_text", **DECODERS["gemma3_text"][0], use_bidirectional_attention=True)
    assert not can_be_packed(AutoModel.from_config(both_ways, attn_implementation="sdpa"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [kind for kind, (_, has) in DECODERS.items() if "sdpa" in has])
def test_the_probe_of_a_decoder(kind: str, device: str) -> None:
    """The probe works with weights and without (`describe`), leaves the decoder unchanged, and draws no random number,
    not even for dropout. (Nemotron's layers drop the packing.)
    """
    torch.manual_seed(0)
    with torch.device(device):
        llm = AutoModel.from_config(architecture(kind), attn_implementation="sdpa").train()
    before, state = {name: p.clone() for name, p in llm.named_parameters()}, torch.get_rng_state()
    assert can_be_packed(llm) == (kind not in PADDED)
    assert llm.config._attn_implementation == "sdpa" and torch.equal(torch.get_rng_state(), state)
    assert all(p.device.type == device and p.grad is None for p in llm.parameters())
    assert device == "meta" or all(torch.equal(p, before[name]) for name, p in llm.named_parameters())


def test_the_probe_of_7_billion_weights() -> None:
    """The probe allocates less than 1 GB, for the products of one layer; the weights would take 27 GB."""
    with torch.device("meta"):
        llm = AutoModel.from_config(AutoConfig.for_model("llama"), attn_implementation="sdpa")
    assert llm.num_parameters() > 6e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
    assert can_be_packed(llm)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


def test_packing_needs_its_attention() -> None:
    words, mask = padded_words([3, 5], 32)
    with pytest.raises(AssertionError, match="would attend to each other"):
        packed_states(decoder("llama", "sdpa"), words, mask)


@pytest.mark.parametrize(("bf16", "expected"), [(False, {32, 33, 64, 65}), (True, {64, 128})])
def test_rows_have_few_lengths_in_bf16(bf16: bool, expected: set[int]) -> None:
    """oneDNN caches prepared 16-bit kernels per number of tokens, so rows in bf16 have multiples of 64 tokens."""
    llm, row_lengths = decoder("llama", PACKED_SDPA), set()
    llm.norm.register_forward_hook(lambda _, inputs, output: row_lengths.add(output.shape[1]))
    for num_tokens in (32, 33, 64, 65):
        words, mask = padded_words([num_tokens - 20, 20], llm.config.hidden_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = packed_states(llm, words, mask)
        assert states.shape[:2] == mask.shape
    assert row_lengths == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_flash_attention_of_a_gpu(kind: str) -> None:
    """varlen_attn agrees with padded groups in fp32, with and without a window and with heads of 64 numbers: in the
    states, and in the gradients of the words and of every weight.
    """
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=2, **sizes)
    if kind == "mistral":
        config.sliding_window = 8
    llm = AutoModel.from_config(config, attn_implementation=PACKED_SDPA).to(DEVICE)
    words, mask = (x.to(DEVICE) for x in padded_words(LENGTHS, 256))
    words, mask = words[mask.sum(1) > 3], mask[mask.sum(1) > 3]
    words[:, :3] = words[0, :3]
    upstream = torch.randn(words.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    upstream[:, :3] = 0

    def states_and_gradients(words: Tensor, num_shared: int) -> dict[str, Tensor]:
        words = words.clone().requires_grad_()
        llm.zero_grad(set_to_none=True)
        states = packed_states(llm, words, mask, num_shared)
        (states.float() * upstream).sum().backward()
        assert words.grad is not None
        weights = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
        return {"states": states.detach()[:, 3:], "words": words.grad[:, 3:], **weights}

    expected = states_and_gradients(words, 0)
    for parameter in llm.parameters():  # not llm.bfloat16(), which rounds the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    for num_shared in (0, 3):
        actual = states_and_gradients(words.bfloat16(), num_shared)
        assert actual.keys() == expected.keys()
        for name, values in expected.items():
            error = (actual[name].float() - values).norm() / values.norm()
            assert error < 5e-2, f"{name}, {num_shared}: {error}"
