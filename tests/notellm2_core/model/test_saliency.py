"""Eq. 3-6 equal a worked example and a slow loop; the attention and its gradient equal slow references."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

from notellm2_core.model.build import build_model
from notellm2_core.model.mlrm import MLRMConfig, MLRMModel, MLRMOutput
from notellm2_core.model.packed_attention import PACKED_SDPA
from notellm2_core.model.saliency import Measurement, attention_gradients, measure, saliency_scores, visual_positions
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import MLRMProcessor, NoteBatch
from tests.support.tiny_model import EMPTY, LONG, SHORT, batch_of, features, tiny_config, tiny_model

SCORES = ("visual", "text", "other")


def test_worked_example() -> None:
    """2 heads, 4 tokens: one visual, two of text, then the final compressed word c = 3. I sums |A G| over the heads:

              head 1: A            G           head 2: A         G               I
        row 0  1                 5             1                 5             (diagonal)
        row 1  .5 .5             2  9          .2 .8            -5  9          1+1 = 2
        row 2  .2 .4 .4         -5  5  9        0 .5 .5          7  2  9       1+0 = 1  2+1 = 3
        row 3  .1 .2 .3 .4      10 -5 10  9    .4 .1 .1 .4      -5 10 20  9    1+2 = 3  1+1 = 2  3+2 = 5

    P_v = {(3,0)}: S_v = 3. P_t = {(3,1), (3,2)}: S_t = (2 + 5) / 2 = 3.5. P_o = {(1,0), (2,0), (2,1)}:
    S_o = (2 + 1 + 3) / 3 = 2. Taking |.| after the sum would make row 1 |1 - 1| = 0. With token 1 as the visual
    compressed word, S_v = (3 + 2) / 2 = 2.5 and S_t = 5. Without a visual token S_v is undefined, S_t = 10 / 3.
    """
    attention = torch.tensor(
        [
            [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.4, 0.4, 0], [0.1, 0.2, 0.3, 0.4]],
            [[1, 0, 0, 0], [0.2, 0.8, 0, 0], [0, 0.5, 0.5, 0], [0.4, 0.1, 0.1, 0.4]],
        ]
    )[None]  # [1, 2, 4, 4]
    gradient = torch.tensor(
        [
            [[5, 7, 7, 7], [2, 9, 7, 7], [-5, 5, 9, 7], [10, -5, 10, 9]],
            [[5, 7, 7, 7], [-5, 9, 7, 7], [7, 2, 9, 7], [-5, 10, 20, 9]],
        ]
    ).float()[None]

    def scores(*visual: int) -> tuple[float, ...]:
        mask = torch.tensor([[i in visual for i in range(4)]])
        actual = saliency_scores(attention, gradient, mask, torch.ones(1, 4, dtype=torch.int64), torch.tensor([3]))
        return tuple(score.item() for score in actual)

    assert scores(0) == pytest.approx((3, 3.5, 2))
    assert scores(0, 1) == pytest.approx((2.5, 5, 2))
    visual, text, other = scores()
    assert math.isnan(visual) and (text, other) == pytest.approx((10 / 3, 2))
    assert scores(0, 3) == scores(0)  # c does not flow to itself


def loop_scores(attention: np.ndarray, gradient: np.ndarray, visual: set[int], real: list[int]) -> list[float]:
    """Eq. 3-6 for one note as printed, pair by pair. `real`: the positions without padding, in order."""
    c, sets = real[-1], {name: [] for name in SCORES}
    for i in real:
        for j in real:
            if j < i:
                name = "other" if i != c else "visual" if j in visual else "text"
                flows = [abs(a[i, j] * g[i, j]) for a, g in zip(attention, gradient, strict=True)]
                sets[name].append(sum(flows))
    return [sum(flows) / len(flows) if flows else math.nan for flows in sets.values()]


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), left=st.booleans(), num_heads=st.integers(1, 3),
    visual_share=st.floats(0, 1), seed=st.integers(0, 10_000),
)  # fmt: skip
@settings(max_examples=60)
def test_equals_the_loop(lengths: list[int], left: bool, num_heads: int, visual_share: float, seed: int) -> None:
    """Lengths and positions are arbitrary. Values on padding, and NaN above the diagonal, are never read."""
    rng = np.random.default_rng(seed)
    n, t = len(lengths), max(lengths)
    starts = [t - length if left else 0 for length in lengths]
    real = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    attention, gradient = rng.normal(size=(2, n, num_heads, t, t))
    visual = rng.random((n, t)) < visual_share
    mask = np.array([[i in positions for i in range(t)] for positions in real])
    attention[:, :, *np.triu_indices(t, 1)] = np.nan
    actual = saliency_scores(
        *(torch.tensor(x) for x in (attention, gradient, visual)),
        torch.tensor(mask.astype(int)),
        torch.tensor([positions[-1] for positions in real]),
    )
    expected = [loop_scores(attention[i], gradient[i], set(np.flatnonzero(visual[i])), real[i]) for i in range(n)]
    np.testing.assert_allclose(torch.stack(actual).numpy().T, expected, rtol=1e-10)


def squares(output: MLRMOutput) -> Tensor:
    """A loss that is a sum over the notes."""
    total = output.multimodal.square().sum()
    return total if output.visual is None else total + output.visual.square().sum()


def contrast(output: MLRMOutput) -> Tensor:
    """A loss over all pairs of notes, in any order and in the model's precision."""
    unit = functional.normalize(output.multimodal, dim=1)
    return (3 * unit @ unit.T).logsumexp(dim=1).sum()


def one_layer(method: str = "notellm2") -> tuple[MLRMModel, NoteBatch]:
    """One layer in fp64 with eager attention, and two notes of unequal lengths."""
    model, processor = tiny_model(method, num_layers=1, attention="eager")
    return model.double(), batch_of(processor, [SHORT, LONG])


def test_the_attention_is_the_softmax_of_the_layer() -> None:
    """The reference is softmax(q k^T / sqrt(d)) from the raw matrices with rotary positions, for an unpadded note."""
    model, batch = one_layer()
    embedded: list[Tensor] = []
    handle = model.llm.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    ((attention, _),) = attention_gradients(model, batch, contrast)
    handle.remove()
    layer, config = model.llm.layers[0], model.llm.config
    x, width = embedded[0][1], config.hidden_size // config.num_attention_heads  # note 1 is the longer one
    x = x * (x.square().mean(1, keepdim=True) + config.rms_norm_eps).rsqrt() * layer.input_layernorm.weight
    angles = torch.arange(len(x))[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    cos, sin = (f(angles.double()).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))  # [T, 1, d]

    def rotated(y: Tensor) -> Tensor:  # [T, heads, d]
        a, b = y.chunk(2, dim=2)
        return y * cos + torch.cat([-b, a], dim=2) * sin

    q = rotated((x @ layer.self_attn.q_proj.weight.T).view(len(x), -1, width))
    k = rotated((x @ layer.self_attn.k_proj.weight.T).view(len(x), -1, width))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(attention[1], scores.softmax(2).detach(), atol=1e-6, rtol=0)  # its softmax is fp32


def test_the_gradient_is_that_of_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is central differences: an attention weight is changed by +-h after its softmax."""
    model, batch = one_layer()
    change = torch.zeros(())

    def eager(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(dim=3) + change
        return (weights @ value).transpose(1, 2), None

    def norm(module: Any, x: Tensor) -> Tensor:  # in fp64; the original rounds to fp32
        return functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    ((attention, gradient),) = attention_gradients(model, batch, contrast)
    change = torch.zeros_like(attention)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)

    def changed_loss(position: tuple[int, ...], h: float) -> float:
        change.zero_()
        change[position] = h
        with torch.no_grad():
            return contrast(model(batch)).item()

    c, v = batch.last_index.tolist(), batch.visual_index.tolist()
    first = batch.image_mask[0].nonzero()[0].item()
    for position in [(0, 0, c[0], first), (0, 3, c[0], v[0]), (1, 1, c[1], 2), (1, 2, c[1], c[1])]:
        slope = (changed_loss(position, 1e-4) - changed_loss(position, -1e-4)) / 2e-4
        assert gradient[position].item() == pytest.approx(slope, rel=1e-5)
        assert abs(slope) > 1e-6
    assert gradient[0, :, v[0]].abs().max() == 0  # in the last layer, only the row of c is read by this loss


@pytest.mark.parametrize("method", ["basic", "notellm2"])
def test_visual_positions(method: str) -> None:
    """The positions are those of the L_c = 4 visual embeddings and, with mICL, of the token before <IMG_EMB>."""
    _, processor = tiny_model(method)
    batch = batch_of(processor, [SHORT, LONG])
    for i, positions in enumerate(visual_positions(batch)):
        actual = batch.input_ids[i][positions].tolist()
        assert actual[:4] == [processor.note_tokenizer.new_token_ids[0]] * 4
        assert len(actual) == (5 if method == "notellm2" else 4)
        if method == "notellm2":
            assert batch.input_ids[i, batch.visual_index[i] + 1] == processor.note_tokenizer.new_token_ids[1]


def without_images(processor: MLRMProcessor, notes: list[Note], has_image: list[bool]) -> NoteBatch:
    return processor.collate([processor.encode(n) for n in notes], *features(len(notes)), np.array(has_image))


def same(a: Measurement, b: Measurement) -> None:
    assert (a.num_defined, a.num_notes, a.num_without_image) == (b.num_defined, b.num_notes, b.num_without_image)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x == pytest.approx(y, rel=1e-4)


@pytest.mark.parametrize("method", ["basic", "notellm2"])
def test_padding_and_batches_do_not_matter(method: str) -> None:
    """Left, right and no padding give the same scores; with a sum as loss, other batches and orders do too."""
    model, processor = tiny_model(method)
    notes, actual = [SHORT, LONG, EMPTY], []
    for side in ("right", "left"):
        processor.padding_side = side
        actual.append(measure(model, [(batch_of(processor, notes), squares)]))
    patches, pooled = features(3)
    alone = [
        (processor.collate([processor.encode(n)], patches[i : i + 1], pooled[i : i + 1], np.array([True])), squares)
        for i, n in enumerate(notes)
    ]
    same(actual[0], actual[1])
    same(actual[0], measure(model, alone))
    assert measure(model, alone[::-1]).layers[0] == pytest.approx(measure(model, alone).layers[0], rel=1e-9)
    assert len(actual[0].layers) == 2 and actual[0].num_defined == dict.fromkeys(SCORES, 3)
    assert all(score > 0 for score in actual[0].layers[0].values())
    # In the last layer the loss reads only the rows of compressed words: with one word, no other flow has a gradient.
    assert (actual[0].layers[1]["other"] == 0) == (method == "basic")


def notes_of(batch: NoteBatch, rows: Tensor) -> NoteBatch:
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return NoteBatch(**{name: value[rows] for name, value in values.items() if value is not None})


def test_the_order_inside_a_batch_does_not_matter() -> None:
    model, processor = tiny_model("notellm2")
    batch = batch_of(processor, [SHORT, LONG, EMPTY])
    order = torch.tensor([2, 0, 1])
    same(measure(model, [(batch, contrast)]), measure(model, [(notes_of(batch, order), contrast)]))


def test_notes_without_an_image_are_left_out_and_counted() -> None:
    """Notes without an image do not change the means of the others. Without any image no score is defined."""
    model, processor = tiny_model("notellm2")
    mixed = without_images(processor, [SHORT, LONG, EMPTY], [True, False, True])
    actual = measure(model, [(mixed, squares)])
    assert (actual.num_notes, actual.num_without_image) == (2, 1)
    rows = torch.tensor([0, 2])
    for a, b in zip(actual.layers, measure(model, [(notes_of(mixed, rows), squares)]).layers, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    undefined = measure(model, [(without_images(processor, [SHORT, LONG], [False, False]), squares)])
    assert undefined.layers == (dict.fromkeys(SCORES),) * 2
    assert undefined.num_defined == dict.fromkeys(SCORES, 0)


def test_no_image_embeddings_in_the_llm() -> None:
    """In a prompt without an image E_v is empty, so S_v is None, not 0, and counts as undefined."""
    model, processor = tiny_model("only_late_fusion")
    actual = measure(model, [(batch_of(processor, [LONG]), squares)])
    assert actual.num_defined == {"visual": 0, "text": 1, "other": 1}
    assert actual.layers[0]["visual"] is None and (actual.layers[0]["text"] or 0) > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_measuring_leaves_the_model_as_it_was(frozen: bool) -> None:
    """Weights, gradients, trained parts, mode and attention stay, also if the model is frozen or the measuring fails.

    Dropout is off, so two measurements are equal.
    """
    config = tiny_config("notellm2")
    connector = config.model.connector.model_copy(update={"dropout": 0.5})
    model, processor = build_model(
        config.model_copy(update={"model": config.model.model_copy(update={"connector": connector})}), Path("unused")
    )
    model.requires_grad_(not frozen)
    model.train()
    model.tau.grad = torch.ones(1)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = [(batch_of(processor, [SHORT, LONG]), contrast)]

    def unchanged() -> None:
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["tau"]
        assert {p.requires_grad for p in model.parameters()} == {not frozen}
        assert model.training and model.llm.config._attn_implementation == PACKED_SDPA
        assert not model.llm._forward_hooks and not model.llm._forward_pre_hooks

    actual = measure(model, batches)
    unchanged()
    same(actual, measure(model, batches))

    def fails(output: MLRMOutput) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        measure(model, [(batches[0][0], fails)])
    unchanged()


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    """A gradient that is not finite must not count as an undefined score."""
    model, processor = tiny_model("basic")
    nn.init.constant_(model.projector.weight, math.inf)
    with pytest.raises(ValueError, match="not finite"):
        measure(model, [(batch_of(processor, [SHORT, LONG]), squares)])


def test_an_llm_without_attention() -> None:
    """Mamba has no attention: the error is one sentence, and the model is unchanged."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 600}
    model, processor = tiny_model("basic")
    config = MLRMConfig(**model.config.to_dict() | {"llm": {"model_type": "mamba", **sizes}, "attention": "eager"})
    mamba = MLRMModel(config)
    with pytest.raises(ValueError, match="a mamba, has layers without attention.*saliency_pairs to 0"):
        measure(mamba, [(batch_of(processor, [SHORT, LONG]), squares)])
    assert all(p.requires_grad for p in mamba.parameters())
