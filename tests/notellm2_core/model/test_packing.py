"""Notes in one row: each attends to itself alone, forward and backward, with any neighbours, on every kernel."""

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from notellm2_core.model.packing import PACKED_SDPA, Packing, can_be_packed, packed_states
from tests.notellm2_core.model.test_decoders import DECODERS, PADDED, architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [5, 12, 1, 30, 9, 31, 200]  # of several groups


def padded_words(lengths: list[int], width: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Random word embeddings [N, T, h], and the mask [N, T]; rubbish on padding."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, -length if left else 0 : None if left else length] = 1
    return words, mask


def decoder(kind: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(architecture(kind), attn_implementation=attention).eval()  # no dropout


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), left=st.booleans())
def test_packing_there_and_back(lengths: list[int], left: bool) -> None:
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
        assert back.numel() <= 3 * sum(max(n + 8, 1.25 * n) for n in lengths)  # little padding
    assert start == len(row)
    for number, end in enumerate(packing.ends[1:].tolist()):
        begin = int(packing.ends[number])
        assert packing.positions[begin:end].tolist() == list(range(end - begin))
        notes = packing.index[begin:end] // mask.shape[1]
        assert len(set(notes.tolist())) == 1 and torch.equal(row[begin:end], words[notes[0]][mask[notes[0]].bool()])


@pytest.mark.parametrize("kind", [kind for kind, (_, has) in DECODERS.items() if "sdpa" in has and kind not in PADDED])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_note_as_if_alone(kind: str, bf16: bool) -> None:
    """Against each note by itself: states, and the gradients at the words and at every weight. In bf16 the same up to
    its 8 bits, on both of its ways (short notes by products, the long one by torch's flash attention)."""
    width = decoder(kind, "sdpa").get_input_embeddings().embedding_dim
    gradients = []
    for way in ("packed", "alone"):
        llm = decoder(kind, PACKED_SDPA if way == "packed" else "sdpa")
        words, mask = padded_words(LENGTHS, width)
        words.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if way == "packed":
                states = packed_states(llm, words, mask)[mask.bool()]
            else:
                each = [
                    llm(inputs_embeds=words[i : i + 1, :n], use_cache=False).last_hidden_state[0]
                    for i, n in enumerate(LENGTHS)
                ]
                states = torch.cat(each)
        loss = states.float() * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        loss.sum().backward()  # (the squares of normalised states would have the same sum with any weights)
        assert words.grad is not None and not words.grad[mask == 0].any()
        weights = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
        gradients.append({"states": states.detach().float(), "words": words.grad, **weights})
    packed, alone = gradients
    assert packed.keys() == alone.keys()
    largest = max(expected.norm() for expected in alone.values())
    for name, expected in alone.items():
        error = (packed[name] - expected).norm() / expected.norm().clamp(
            min=largest * 1e-2
        )  # (of a key's bias it is 0)
        assert error < (3e-2 if bf16 else 1e-5), f"{name}: {error}"


@pytest.mark.parametrize("kind", ["llama", "mistral"])  # (mistral looks back 8 tokens)
@pytest.mark.parametrize("left", [False, True])
def test_what_all_begin_with_is_computed_once(kind: str, left: bool) -> None:
    """The same states behind it; in the row it is once: 3 tokens, and what 6 notes have of their own."""
    lengths = [5, 12, 4, 30, 9, 31]
    llm = decoder(kind, PACKED_SDPA)
    words, mask = padded_words(lengths, 32, left)
    of_own = mask * (mask.cumsum(1) > 3)
    for row in range(1, len(lengths)):
        words[row, (mask * (of_own == 0))[row].bool()] = words[0, (mask * (of_own == 0))[0].bool()]
    expected, actual = packed_states(llm, words, mask), packed_states(llm, words, mask, num_shared=3)
    torch.testing.assert_close(actual[of_own.bool()], expected[of_own.bool()])
    assert int((actual.abs().sum(-1) > 0).sum()) == len(Packing.of(mask, 3).index) == 3 + sum(n - 3 for n in lengths)


@pytest.mark.parametrize("kind", [kind for kind, (_, has) in DECODERS.items() if "sdpa" in has and kind not in PADDED])
def test_needed_states_are_the_same_where_the_last_mlp_sees_nothing_else(kind: str) -> None:
    llm = decoder(kind, PACKED_SDPA)
    words, mask = padded_words(LENGTHS, llm.get_input_embeddings().embedding_dim)
    last = mask.sum(1) - 1
    needed = torch.stack([last, last // 2], dim=1)
    rows = torch.arange(len(LENGTHS))[:, None]
    seen: list[int] = []
    for name, module in llm.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda _, given, made: seen.append(given[0].shape[1]))
    with torch.no_grad():
        expected, actual = packed_states(llm, words, mask), packed_states(llm, words, mask, needed_positions=needed)
    torch.testing.assert_close(actual[rows, needed], expected[rows, needed])
    if kind not in ("gpt2", "opt"):  # they name their parts otherwise
        assert seen[-2:] == [sum(LENGTHS), needed.numel()]
    with_gradient = packed_states(llm, words, mask, needed_positions=needed)
    torch.testing.assert_close(with_gradient, expected)


def test_without_packing_it_is_sdpa() -> None:
    """Rows of one length, or with a mask, as anybody may give them to the LLM itself."""
    words, mask = padded_words([7, 12], 32)
    for given_mask in (None, mask):
        packed, plain = (
            decoder("mistral", attention)(inputs_embeds=words, attention_mask=given_mask).last_hidden_state
            for attention in (PACKED_SDPA, "sdpa")
        )
        real = torch.ones_like(mask).bool() if given_mask is None else mask.bool()
        torch.testing.assert_close(packed[real], plain[real])


def test_who_can_be_packed() -> None:
    assert can_be_packed(decoder("llama", "sdpa")) and not can_be_packed(decoder("llama", "eager"))
    assert not can_be_packed(decoder("lfm2", "sdpa"))  # a convolution would reach into the next note
    both_ways = AutoConfig.for_model("gemma3_text", **DECODERS["gemma3_text"][0], use_bidirectional_attention=True)
    assert not can_be_packed(AutoModel.from_config(both_ways, attn_implementation="sdpa"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [kind for kind, (_, has) in DECODERS.items() if "sdpa" in has])
def test_the_probe_of_a_decoder(kind: str, device: str) -> None:
    """Found at construction, with weights or without (`describe`). Nemotron's layers drop the packing. The decoder is
    then as before, and no random number has been drawn, by dropout say.
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
    """Without their memory, which would be 27 GB: less than 1 GB for the products of one layer."""
    with torch.device("meta"):
        llm = AutoModel.from_config(AutoConfig.for_model("llama"), attn_implementation="sdpa")
    assert llm.num_parameters() > 6e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
    assert can_be_packed(llm)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


def test_without_its_attention_nothing_is_packed() -> None:
    words, mask = padded_words([3, 5], 32)
    with pytest.raises(AssertionError, match="would attend to each other"):
        packed_states(decoder("llama", "sdpa"), words, mask)


@pytest.mark.parametrize(("bf16", "expected"), [(False, {32, 33, 64, 65}), (True, {64, 128})])
def test_rows_of_few_lengths_where_each_length_costs(bf16: bool, expected: set[int]) -> None:
    """oneDNN keeps what it has prepared for each number of tokens, so there it sees multiples of 64 alone."""
    llm, seen = decoder("llama", PACKED_SDPA), set()
    llm.norm.register_forward_hook(lambda _, given, made: seen.add(made.shape[1]))
    for num_tokens in (32, 33, 64, 65):
        words, mask = padded_words([num_tokens - 20, 20], llm.config.hidden_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = packed_states(llm, words, mask)
        assert states.shape[:2] == mask.shape
    assert seen == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_flash_attention_of_a_gpu(kind: str) -> None:
    """varlen_attn against padded groups in fp32, with and without a window: states, and gradients at the words and at
    every weight. Heads of 64 numbers."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    of_kind = AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=2, **sizes)
    if kind == "mistral":
        of_kind.sliding_window = 8
    llm = AutoModel.from_config(of_kind, attn_implementation=PACKED_SDPA).to(DEVICE)
    words, mask = (x.to(DEVICE) for x in padded_words(LENGTHS, 256))
    words, mask = words[mask.sum(1) > 3], mask[mask.sum(1) > 3]
    words[:, :3] = words[0, :3]
    upstream = torch.randn(words.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    upstream[:, :3] = 0

    def made(words: Tensor, num_shared: int) -> dict[str, Tensor]:
        words = words.clone().requires_grad_()
        llm.zero_grad(set_to_none=True)
        states = packed_states(llm, words, mask, num_shared)
        (states.float() * upstream).sum().backward()
        assert words.grad is not None
        of_weights = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
        return {"states": states.detach()[:, 3:], "words": words.grad[:, 3:], **of_weights}

    expected = made(words, 0)
    for parameter in llm.parameters():  # not llm.bfloat16(), which rounds the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    for num_shared in (0, 3):
        actual = made(words.bfloat16(), num_shared)
        assert actual.keys() == expected.keys()
        for name, values in expected.items():
            error = (actual[name].float() - values).norm() / values.norm()
            assert error < 5e-2, f"{name}, {num_shared}: {error}"
