import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from notellm2_core.config.methods import METHODS
from notellm2_core.model.mlrm import MLRMModel, MLRMOutput
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import InputKind, MLRMProcessor, NoteBatch
from tests.support.tiny_model import EMPTY, LONG, NUM_PATCHES, SHORT, batch_of, features, tiny_model


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest) -> tuple[MLRMModel, MLRMProcessor]:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def notellm2() -> tuple[MLRMModel, MLRMProcessor]:
    return tiny_model("notellm2")


def embed(model: MLRMModel, batch: NoteBatch) -> MLRMOutput:
    with torch.no_grad():
        return model(batch)


def close(a: Tensor | None, b: Tensor | None) -> None:
    if a is None or b is None:
        assert a is None and b is None
    else:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_shapes(pair: tuple[MLRMModel, MLRMProcessor]) -> None:
    model, processor = pair
    output, states = embed(model, batch_of(processor, [SHORT, LONG])), model.states(batch_of(processor, [SHORT, LONG]))
    assert output.multimodal.shape == (2, 64) and states.multimodal.shape == (2, 64)
    assert model.tau.shape == (1,) and model.tau.item() == 3.0
    method = METHODS[model.config.method]
    assert (model.connector is not None) == method.visual_prompt
    if not method.late_fusion:
        assert output.gate_mean is None and model.fusion is None
        assert states.global_branch is None and states.multimodal is states.llm_multimodal
    else:
        assert output.gate_mean is not None and 0 < output.gate_mean.item() < 1 and output.gate_mean.shape == (1,)
    if method.prompt == "micl":
        assert output.visual is not None and output.visual.shape == (2, 64)
    else:
        assert output.visual is None


def test_slow_reference(notellm2: tuple[MLRMModel, MLRMProcessor]) -> None:
    """The reference joins one note's embeddings piece by piece, without padding and mask, and applies Eq. 7 by hand."""
    model, processor = notellm2
    note = processor.encode(LONG)
    patches, pooled = (torch.from_numpy(f.astype(np.float32)) for f in features(1))
    with torch.no_grad():
        words = model.llm.embed_tokens(torch.from_numpy(note.token_ids))
        end = note.image_start + processor.num_queries
        joined = torch.cat([words[: note.image_start], model.connector(patches)[0], words[end:]])
        hidden = model.llm(inputs_embeds=joined[None]).last_hidden_state[0]
        v = pooled[0] @ model.fusion.visual.weight.T + model.fusion.visual.bias
        expected = []
        for n in (hidden[-1], hidden[note.visual_index]):
            z = 1 / (1 + torch.exp(-(model.fusion.gate.weight @ torch.cat([v, n]) + model.fusion.gate.bias)))
            expected.append(model.projector.weight @ (z * v + (1 - z) * n) + model.projector.bias)
        output = model(batch_of(processor, [LONG]))
    close(output.multimodal[0], expected[0])
    close(output.visual[0], expected[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_matter(method: str, attention: str) -> None:
    """Left, right and no padding give the same embeddings and the same gradients of the word embeddings."""
    model, processor = tiny_model(method, attention=attention)
    notes, (patches, pooled) = [SHORT, LONG, EMPTY], features(3)
    outputs, gradients = [], []
    for side in ("right", "left"):
        processor.padding_side = side
        model.zero_grad()
        output = model(batch_of(processor, notes))
        output.multimodal.square().sum().backward()
        outputs.append(output)
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)
    close(outputs[0].multimodal, outputs[1].multimodal)
    close(outputs[0].visual, outputs[1].visual)
    for i, note in enumerate(notes):  # alone, so an embedding does not depend on its batch either
        one = processor.collate([processor.encode(note)], patches[i : i + 1], pooled[i : i + 1], np.array([True]))
        assert one.attention_mask.all()
        close(embed(model, one).multimodal[0], outputs[0].multimodal[i])


@pytest.mark.parametrize("method", ["micl", "notellm2"])
def test_the_visual_word_does_not_depend_on_the_text(method: str) -> None:
    model, processor = tiny_model(method)
    patches, pooled = (np.repeat(f, 3, axis=0) for f in features(1))
    batch = processor.collate([processor.encode(n) for n in (SHORT, LONG, EMPTY)], patches, pooled, np.ones(3, bool))
    output = embed(model, batch)
    close(output.visual[0], output.visual[1])
    close(output.visual[0], output.visual[2])
    assert torch.pdist(output.multimodal).min() > 1e-3


def test_image_input_sees_no_text_and_text_input_no_image(pair: tuple[MLRMModel, MLRMProcessor]) -> None:
    model, processor = pair
    other = Note("other", "Nothing in common", ("x", "y"), "with the first note")

    def run(note: Note, inputs: InputKind, seed: int) -> Tensor:
        patches, pooled = features(1, seed)
        batch = processor.collate([processor.encode(note, inputs)], patches, pooled, np.array([True]))
        return embed(model, batch).multimodal

    assert torch.equal(run(SHORT, "image", 0), run(other, "image", 0))
    assert torch.equal(run(SHORT, "text", 0), run(SHORT, "text", 1))
    for inputs, seed in (("image", 1), ("multimodal", 1)):
        assert not torch.allclose(run(SHORT, inputs, 0), run(SHORT, inputs, seed), atol=1e-4)  # type: ignore[arg-type]
    assert not torch.allclose(run(SHORT, "text", 0), run(other, "text", 0), atol=1e-4)


def test_without_image_every_module_still_runs(pair: tuple[MLRMModel, MLRMProcessor]) -> None:
    """v and the visual words are zeros. All parameters have gradients, because all ranks must reduce the same ones."""
    model, processor = pair
    batch = processor.collate([processor.encode(SHORT)], None, None, np.array([False]))
    states = model.states(batch)
    assert states.global_branch is None or not states.global_branch.any()
    model.zero_grad()
    output = model(batch)
    (output.multimodal.sum() + (0 if output.visual is None else output.visual.sum())).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"tau"}  # only the loss reads tau
    assert model.connector is None or not model.connector.first.weight.grad.any()


def test_parameter_groups_are_a_partition(pair: tuple[MLRMModel, MLRMProcessor]) -> None:
    model, _ = pair
    groups = model.parameter_groups()
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [name for name, _ in groups["tau"]] == ["tau"]
    assert all(name.startswith("llm.") for name, _ in groups["llm"])
    method = METHODS[model.config.method]
    is_part = {"connector": method.visual_prompt, "fusion": method.late_fusion, "projector": True}
    assert {name.split(".")[0] for name, _ in groups["new"]} == {part for part in is_part if is_part[part]}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, processor = tiny_model()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.llm.layers)
        model(batch_of(processor, [SHORT, LONG])).multimodal.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_bf16_weights_take_fp32_features(notellm2: tuple[MLRMModel, MLRMProcessor]) -> None:
    """DeepSpeed casts the weights to bf16; the result stays near that of fp32 (8 bits of mantissa)."""
    model, processor = tiny_model()
    batch = batch_of(processor, [SHORT, LONG])
    full = embed(model, batch).multimodal
    half = embed(model.to(torch.bfloat16), batch).multimodal
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(full, half.float()).min() > 0.99


def test_rotary_frequencies_stay_exact_in_bf16(notellm2: tuple[MLRMModel, MLRMProcessor]) -> None:
    """Every cast of the model to bf16 leaves the frequencies in fp32, and casts the weights."""
    for cast in (lambda m: nn.Module.to(m, "cpu", torch.bfloat16), lambda m: nn.Sequential(m).bfloat16()[0]):
        model = copy.deepcopy(notellm2[0])
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert any(name.endswith("inv_freq") for name in before)
        cast(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name])


def test_hostile_notes_have_finite_embeddings(pair: tuple[MLRMModel, MLRMProcessor]) -> None:
    model, processor = pair
    texts = ("<IMG> <IMG_EMB>", "'}\n\"", "x" * 100_000, "👩‍👩‍👧‍👦", "\u202eمرحبا", "")
    output = embed(model, batch_of(processor, [Note(t[:5], t, (t, t), t) for t in texts]))
    assert output.multimodal.isfinite().all()


def test_batch_moves_whole(notellm2: tuple[MLRMModel, MLRMProcessor]) -> None:
    batch = batch_of(notellm2[1], [SHORT])
    as_note = dataclasses.replace(batch, pixels=torch.zeros(1, 8, 8, 3), image_index=torch.zeros(1, dtype=torch.int64))
    moved = as_note.to("meta")
    assert len(batch) == 1 and batch.to("meta").pixels is None
    assert all(getattr(moved, f.name).device.type == "meta" for f in dataclasses.fields(moved))


def test_without_visual_prompt_the_image_reaches_the_gate_alone() -> None:
    """The prompt of only_late_fusion has no image: the LLM's state is the text's, and only v depends on the image."""
    model, processor = tiny_model("only_late_fusion")
    assert not processor.encode(LONG).token_ids.tolist().count(processor.note_tokenizer.new_token_ids[0])
    states = [
        model.states(processor.collate([processor.encode(LONG)], *features(1, s), np.array([True]))) for s in (0, 1)
    ]
    assert torch.equal(states[0].llm_multimodal, states[1].llm_multimodal)
    assert not torch.allclose(states[0].multimodal, states[1].multimodal, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_connectors_for_ablation_map_every_patch(kind: str) -> None:
    """L_c = L: each patch becomes its own visual word, by one linear layer or two."""
    model, processor = tiny_model(connector=kind)
    batch = batch_of(processor, [SHORT, LONG])
    assert batch.image_mask.sum(1).tolist() == [NUM_PATCHES, NUM_PATCHES]
    words = model.connector(batch.patches)
    assert words.shape == (2, NUM_PATCHES, 64)
    torch.testing.assert_close(model.connector(batch.patches[:, 3:4]), words[:, 3:4])
    layers = {"mlp": 2, "linear": 1}[kind]
    assert sum(p.ndim == 2 for p in model.connector.parameters()) == layers
    assert embed(model, batch).multimodal.isfinite().all()


def test_gate_and_projector_keep_their_precision_under_autocast(notellm2: tuple[MLRMModel, MLRMProcessor]) -> None:
    """Under autocast only the LLM and the connector compute in bf16."""
    model, processor = notellm2
    batch = batch_of(processor, [SHORT, LONG])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            states, output = model.states(batch), model(batch)
        assert model.fusion is not None and states.global_branch is not None
        fused, _ = model.fusion(states.global_branch, states.llm_multimodal)
        assert output.multimodal.dtype == torch.float32
        assert torch.equal(states.multimodal, fused)
        assert torch.equal(output.multimodal, model.projector(states.multimodal))
        assert not torch.equal(output.multimodal, model(batch).multimodal)  # the LLM used bf16
