"""Batches: every pair once per epoch, no note twice in a batch, and masks of positives, against slow loops."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.config.training import TrainingSettings
from notellm2_core.model.build import build_model
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.model.tokenise import tokenise
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import FieldTokens
from notellm2_core.training.data import sampler
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset
from notellm2_core.training.data.sampler import batch_schedule, planned_steps
from notellm2_core.vision.feature_table import FeatureTable
from tests.support.world import World, pair_dataset, tiny_config


def random_pairs(num_pairs: int, num_notes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, num_notes, num_pairs)
    return np.stack([first, (first + rng.integers(1, num_notes, num_pairs)) % num_notes], axis=1)


def test_epochs_of_disjoint_pairs_are_permutations() -> None:
    """With 12 disjoint pairs in batches of 4, steps 0-2 are one permutation and steps 3-5 another."""
    batches = batch_schedule(np.arange(24).reshape(12, 2), 4, 6, seed=1)
    for epoch in (batches[:3], batches[3:]):
        assert sorted(epoch.reshape(-1).tolist()) == list(range(12))
    assert batches[:3].tolist() != batches[3:].tolist()


def test_the_steps_of_an_epoch_are_rounded_up() -> None:
    """100 pairs in batches of 16 are 7 steps, 112 too, and 113 are 8."""
    epochs = TrainingSettings(num_epochs=3, batch_pairs=16)
    assert [planned_steps(epochs, pairs) for pairs in (1, 16, 100, 112, 113)] == [3, 3, 21, 21, 24]
    assert planned_steps(TrainingSettings(num_steps=5, batch_pairs=16), 100) == 5


@given(st.integers(1, 60), st.integers(3, 80), st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=60)
def test_schedule_is_fair_and_a_prefix_of_itself(num_pairs: int, num_notes: int, batch: int, seed: int) -> None:
    pairs = random_pairs(num_pairs, num_notes, seed)
    long = batch_schedule(pairs, batch, 12, seed)
    assert (batch_schedule(pairs, batch, 5, seed) == long[:5]).all()
    # At most min(4 batches, one epoch) of pairs wait, so no pair is ahead of another by more.
    counts = np.bincount(long.reshape(-1), minlength=num_pairs)
    assert counts.max() - counts.min() <= 1 + min(4 * batch, num_pairs)


def test_no_note_is_twice_in_a_batch_if_waiting_helps() -> None:
    """200 pairs over 100 notes in batches of 8: nearly every batch drawn at random would repeat a note."""
    pairs = random_pairs(200, 100, 0)
    for batch in batch_schedule(pairs, 8, 50, seed=0):
        assert len(set(pairs[batch].reshape(-1).tolist())) == 16


def test_a_hub_does_not_stop_the_batches() -> None:
    """If one note is in every pair, batches are filled with the pairs in their order."""
    pairs = np.stack([np.zeros(20, dtype=np.int64), np.arange(1, 21)], axis=1)
    batches = batch_schedule(pairs, 4, 5, seed=0)
    assert sorted(batches.reshape(-1).tolist()) == list(range(20))


def test_a_pair_that_waited_too_long_brings_its_contents_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3, pairs in their order. After 0-10, the twelve pairs 0-11 to 0-22 wait, which is the limit. So 0-11
    is taken with its contents, 11-30 must wait, and 0-12 is taken.
    """
    monkeypatch.setattr(sampler, "_permutations", lambda num_pairs, seed: iter(range(num_pairs)))
    pairs = np.array([*((0, n) for n in range(10, 23)), (11, 30)])
    assert pairs[batch_schedule(pairs, 3, 1, seed=0)[0]].tolist() == [[0, 10], [0, 11], [0, 12]]


def test_a_schedule_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"no training pairs: lower pairs\.low"):
        batch_schedule(np.empty((0, 2), dtype=np.int64), 4, 1, 0)


@pytest.fixture
def small() -> PairDataset:
    """a-b and b-c are pairs; d has c's image; e has a's text and image; f and g have a's text and no image."""
    text = {"a": "x", "b": "y", "c": "z", "d": "w", "e": "x", "f": "x", "g": "x", "h": ""}
    images = {"a": "i1", "b": "i2", "c": "i3", "d": "i3", "e": "i1", "f": None, "g": None, "h": None}
    notes = {n: Note(n, t, (), "") for n, t in text.items()}
    table = FeatureTable(np.zeros((3, 17, 32), np.float16), {"i1": 0, "i2": 1, "i3": 2})
    pairs = [("a", "b"), ("b", "c"), ("d", "h"), ("e", "h"), ("f", "h"), ("g", "h")]
    _, processor = build_model(tiny_config(), Path())
    tokens = dict(zip(notes, processor.note_tokenizer.tokenize(list(notes.values())), strict=True))
    return PairDataset(processor, tokens, images, table, pairs)


def test_known_positives(small: PairDataset) -> None:
    """Each expected pair of rows is positive for one reason, in both directions; all other pairs are negatives."""
    rows = np.array([small.note_ids.index(n) for n in "abcdefga"])
    positives = small.labels(rows).known_positives
    assert positives is not None and small.labels(rows, "ignore").known_positives is None
    assert small.labels(rows, "count").count_known and not small.labels(rows, "mask").count_known

    def matrix(pairs: list[str]) -> torch.Tensor:
        m = torch.eye(8, dtype=torch.bool)
        for a, b in pairs:
            for i in [i for i, n in enumerate("abcdefga") if n == a]:
                for j in [j for j, n in enumerate("abcdefga") if n == b]:
                    m[i, j] = m[j, i] = True
        return m

    # Positives depend on the content read: e has a's content, so e is related to b as a is.
    both = ["ab", "bc", "aa", "ae", "be", "fg"]  # equal text, and equal or no image
    assert (positives["multimodal"] == matrix(both)).all()
    image = ["ab", "bc", "aa", "ae", "be", "cd", "bd"]  # equal images; notes without one are not equal
    assert (positives["image"] == matrix(image)).all()
    text = ["ab", "bc", "aa", "ae", "af", "ag", "ef", "eg", "fg", "be", "bf", "bg"]
    assert (positives["text"] == matrix(text)).all()
    contents = small.content_ids(rows).tolist()
    assert contents[0] == contents[4] == contents[7] and contents[5] == contents[6] and len(set(contents)) == 5
    has = small.labels(np.array([small.note_ids.index(n) for n in "afh"])).has
    assert (has["image"].tolist(), has["text"].tolist()) == ([True, False, False], [True, True, False])


def test_hard_negatives_of_a_batch(small: PairDataset) -> None:
    """Hard negatives come from the query's list, minus contents already in the batch: of a's list c and d remain,
    because b is in the batch and e has a's content. f's list has only h.
    """
    negatives = {"a": "bced", "f": "h"}
    note_indices = [[small.note_ids.index(n) for n in negatives.get(note, "")] for note in small.note_ids]
    small.hard_negatives = [np.array(notes, dtype=np.int64) for notes in note_indices]
    pair = np.array([small.note_ids.index(n) for n in "ab"])
    drawn = [small.with_hard_negatives(pair, 2, (0, step)) for step in range(20)]
    names = {"".join(small.note_ids[n] for n in rows) for rows in drawn}
    assert names == {"abcd", "abdc"}
    assert np.array_equal(drawn[3], small.with_hard_negatives(pair, 2, (0, 3)))
    other = np.array([small.note_ids.index(n) for n in "fg"])
    first = small.with_hard_negatives(other, 1, (0, 0))
    assert first.tolist() == [*other, small.note_ids.index("h")]
    assert len(small.with_hard_negatives(np.arange(8), 3, (0, 0))) == 8 + 3 * 4  # no other notes: some are repeated
    assert np.array_equal(small.with_hard_negatives(pair, 0, (0, 0)), pair)
    small.hard_negatives = None
    with pytest.raises(ValueError, match="num = 1 needs --hard-negatives: give it, or set num to 0"):
        small.with_hard_negatives(pair, 1, (0, 0))


def test_a_batch_of_several_inputs(small: PairDataset) -> None:
    """The batch has notes a and f whole, then their images, then their texts. f has no image; texts hide the image."""
    rows = np.array([small.note_ids.index(n) for n in "af"])
    batch = small.note_batch(rows, ("multimodal", "image", "text"))
    assert batch.has_image.tolist() == [True, False, True, False, False, False]
    assert torch.equal(batch.input_ids[2], batch.input_ids[3])  # without text
    assert torch.equal(batch.input_ids[0], batch.input_ids[4])  # the template stays
    one = small.note_batch(rows)
    assert torch.equal(batch.input_ids[:2, : one.input_ids.shape[1]], one.input_ids)


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=30)
def test_related_in_either_direction_equals_a_loop(num_pairs: int, seed: int) -> None:
    pairs = [(str(a), str(b)) for a, b in random_pairs(num_pairs, 9, seed)]
    tokens = {str(i): FieldTokens(*(np.array([i], np.int32),) * 3) for i in range(9)}
    table = FeatureTable(np.zeros((0, 2, 4), np.float16), {})
    data = PairDataset(None, tokens, {}, table, pairs)  # type: ignore[arg-type]
    rows = np.arange(len(data.note_ids))
    positives = data.labels(rows).known_positives["multimodal"]
    for i, a in enumerate(data.note_ids):
        for j, b in enumerate(data.note_ids):
            assert positives[i, j].item() == (a == b or (a, b) in pairs or (b, a) in pairs)


def test_a_dataset_from_disk(world: World, tmp_path: Path) -> None:
    """64 + 12 notes with their images' features by row, zeros without image; batches are padded to the longest."""
    _, processor = build_model(tiny_config(), tmp_path)
    data = pair_dataset(world, processor, tmp_path)
    assert (len(data.train_pairs), len(data.validation_pairs), len(data.note_ids)) == (32, 6, 76)
    assert len(data.train_notes) == 64
    rows = np.array([4, 5, 6])
    batch = data.note_batch(rows)
    assert batch.has_image.tolist() == [True, False, True]
    assert batch.patches[1].abs().sum() == 0 and batch.patches[0].abs().sum() > 0
    torch.testing.assert_close(batch.global_feature[0], batch.patches[0].mean(dim=0), atol=2e-3, rtol=0)
    assert batch.attention_mask.sum(dim=1).max() == batch.input_ids.shape[1]
    tokenise(processor.note_tokenizer, world.path("notes"), tmp_path / "tokens")
    token_reader = InputReader(processor, replace(world.inputs, notes=tmp_path / "tokens"))
    again = load_pair_dataset(token_reader, world.path("pairs"), tmp_path)  # with the existing feature table
    assert (again.note_batch(rows).input_ids == batch.input_ids).all()
    assert (again.num_tokens(rows) == batch.attention_mask.sum(dim=1).numpy()).all()
    assert (again.note_batch(rows).patches == batch.patches).all()
    assert len(list(tmp_path.glob("features-*.npy"))) == 1


def test_wrong_inputs_are_named(world: World, tmp_path: Path) -> None:
    _, processor = build_model(tiny_config(), tmp_path)
    with pytest.raises(ValueError, match=r"nowhere/train holds no pairs"):
        load_pair_dataset(InputReader(processor, world.inputs), tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match="not among the notes, the first is 'a'"):
        PairDataset(None, {}, {}, FeatureTable(np.zeros((0, 2, 4)), {}), [("a", "b")])  # type: ignore[arg-type]
    (tmp_path / "note_images.parquet").write_bytes((world.path("images") / "note_images.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"vision/config.json does not exist"):
        without_encoder = InputReader(processor, replace(world.inputs, images=tmp_path))
        load_pair_dataset(without_encoder, world.path("pairs"), tmp_path)


def test_a_damaged_feature_table_is_named(world: World, tmp_path: Path) -> None:
    _, processor = build_model(tiny_config(), tmp_path)
    pair_dataset(world, processor, tmp_path)
    (table,) = tmp_path.glob("features-*.npy")
    for size in (500, 0):
        os.truncate(table, size)
        with pytest.raises(ValueError, match=r"features-.*.npy is damaged .*; a run makes it where it is missing"):
            pair_dataset(world, processor, tmp_path)
