"""Batches: every pair once per epoch, no note twice, and masks of what belongs together, against slow loops."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.model.build import build_model
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.model.tokenise import tokenise
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import FieldTokens
from notellm2_core.training.data import sampler
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset
from notellm2_core.training.data.sampler import batch_schedule
from notellm2_core.vision.feature_table import FeatureTable
from tests.support.world import World, pair_dataset, tiny_config


def some_pairs(num_pairs: int, num_notes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, num_notes, num_pairs)
    return np.stack([first, (first + rng.integers(1, num_notes, num_pairs)) % num_notes], axis=1)


def test_epochs_are_permutations_where_no_notes_are_shared() -> None:
    """12 disjoint pairs, batches of 4: steps 0-2 are one permutation, steps 3-5 another."""
    batches = batch_schedule(np.arange(24).reshape(12, 2), 4, 6, seed=1)
    for epoch in (batches[:3], batches[3:]):
        assert sorted(epoch.reshape(-1).tolist()) == list(range(12))
    assert batches[:3].tolist() != batches[3:].tolist()


@given(st.integers(1, 60), st.integers(3, 80), st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_schedule_is_fair_and_a_prefix_of_itself(num_pairs: int, num_notes: int, batch: int, seed: int) -> None:
    pairs = some_pairs(num_pairs, num_notes, seed)
    long = batch_schedule(pairs, batch, 12, seed)
    assert (batch_schedule(pairs, batch, 5, seed) == long[:5]).all()
    # At most min(4 batches, one epoch) wait, so no pair is ahead of another by more than those.
    counts = np.bincount(long.reshape(-1), minlength=num_pairs)
    assert counts.max() - counts.min() <= 1 + min(4 * batch, num_pairs)


def test_no_note_is_twice_in_a_batch_where_waiting_helps() -> None:
    """200 pairs over 100 notes, batches of 8: a batch drawn blindly would repeat a note nearly always."""
    pairs = some_pairs(200, 100, 0)
    for batch in batch_schedule(pairs, 8, 50, seed=0):
        assert len(set(pairs[batch].reshape(-1).tolist())) == 16


def test_a_hub_does_not_stop_the_batches() -> None:
    """One note in every pair: batches fill up all the same, with the pairs in their order."""
    pairs = np.stack([np.zeros(20, dtype=np.int64), np.arange(1, 21)], axis=1)
    batches = batch_schedule(pairs, 4, 5, seed=0)
    assert sorted(batches.reshape(-1).tolist()) == list(range(20))


def test_a_pair_that_waited_too_long_brings_its_contents_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3, pairs in their order. After 0-10, the twelve pairs 0-11 to 0-22 wait, which is the limit; so 0-11
    is taken, and 11-30 must not follow it: it waits, and 0-12 is taken.
    """
    monkeypatch.setattr(sampler, "_permutations", lambda num_pairs, seed: iter(range(num_pairs)))
    pairs = np.array([*((0, n) for n in range(10, 23)), (11, 30)])
    assert pairs[batch_schedule(pairs, 3, 1, seed=0)[0]].tolist() == [[0, 10], [0, 11], [0, 12]]


def test_a_schedule_needs_pairs() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        batch_schedule(np.empty((0, 2), dtype=np.int64), 4, 1, 0)


@pytest.fixture
def small() -> PairDataset:
    """a-b and b-c are pairs; d has c's image; e has a's text and image; f has a's text and no image, as has g."""
    text = {"a": "x", "b": "y", "c": "z", "d": "w", "e": "x", "f": "x", "g": "x", "h": ""}
    images = {"a": "i1", "b": "i2", "c": "i3", "d": "i3", "e": "i1", "f": None, "g": None, "h": None}
    notes = {n: Note(n, t, (), "") for n, t in text.items()}
    table = FeatureTable(np.zeros((3, 17, 32), np.float16), {"i1": 0, "i2": 1, "i3": 2})
    pairs = [("a", "b"), ("b", "c"), ("d", "h"), ("e", "h"), ("f", "h"), ("g", "h")]
    _, processor = build_model(tiny_config(), Path())
    tokens = dict(zip(notes, processor.note_tokenizer.tokenize(list(notes.values())), strict=True))
    return PairDataset(processor, tokens, images, table, pairs)


def test_known_positives(small: PairDataset) -> None:
    """Each expected pair of rows is there for one reason, in both directions; everything else is a negative."""
    rows = np.array([small.note_ids.index(n) for n in "abcdefga"])
    known = small.labels(rows).known_positives
    assert known is not None and small.labels(rows, "ignore").known_positives is None
    assert small.labels(rows, "count").count_known and not small.labels(rows, "mask").count_known

    def matrix(pairs: list[str]) -> torch.Tensor:
        m = torch.eye(8, dtype=torch.bool)
        for a, b in pairs:
            for i in [i for i, n in enumerate("abcdefga") if n == a]:
                for j in [j for j, n in enumerate("abcdefga") if n == b]:
                    m[i, j] = m[j, i] = True
        return m

    # KnownPairs are of what is read: e, which shows what a shows, is related to b as a is.
    assert (known["multimodal"] == matrix(["ab", "bc", "aa", "ae", "be", "fg"])).all()  # text and image equal, or none
    image = ["ab", "bc", "aa", "ae", "be", "cd", "bd"]  # the image alone; no image is no image
    assert (known["image"] == matrix(image)).all()
    text = ["ab", "bc", "aa", "ae", "af", "ag", "ef", "eg", "fg", "be", "bf", "bg"]
    assert (known["text"] == matrix(text)).all()
    codes = small.content_ids(rows).tolist()
    assert codes[0] == codes[4] == codes[7] and codes[5] == codes[6] and len(set(codes)) == 5
    has = small.labels(np.array([small.note_ids.index(n) for n in "afh"])).has
    assert (has["image"].tolist(), has["text"].tolist()) == ([True, False, False], [True, True, False])


def test_hard_negatives_of_a_batch(small: PairDataset) -> None:
    """Of those of the query, without what the batch shows already: a has c and d left, as b is there and e shows what a
    does. f has only h.
    """
    negatives = {"a": "bced", "f": "h"}
    places = [[small.note_ids.index(n) for n in negatives.get(note, "")] for note in small.note_ids]
    small.hard_negatives = [np.array(notes, dtype=np.int64) for notes in places]
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
    """Notes a and f as a whole, then by their image, then by their text: f has no image, the text hides a's."""
    rows = np.array([small.note_ids.index(n) for n in "af"])
    batch = small.note_batch(rows, ("multimodal", "image", "text"))
    assert batch.has_image.tolist() == [True, False, True, False, False, False]
    assert torch.equal(batch.input_ids[2], batch.input_ids[3])  # no text is left
    assert torch.equal(batch.input_ids[0], batch.input_ids[4])  # the template stays
    one = small.note_batch(rows)
    assert torch.equal(batch.input_ids[:2, : one.input_ids.shape[1]], one.input_ids)


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_related_in_either_direction_equals_a_loop(num_pairs: int, seed: int) -> None:
    pairs = [(str(a), str(b)) for a, b in some_pairs(num_pairs, 9, seed)]
    tokens = {str(i): FieldTokens(*(np.array([i], np.int32),) * 3) for i in range(9)}
    table = FeatureTable(np.zeros((0, 2, 4), np.float16), {})
    data = PairDataset(None, tokens, {}, table, pairs)  # type: ignore[arg-type]
    rows = np.arange(len(data.note_ids))
    known = data.labels(rows).known_positives["multimodal"]
    for i, a in enumerate(data.note_ids):
        for j, b in enumerate(data.note_ids):
            assert known[i, j].item() == (a == b or (a, b) in pairs or (b, a) in pairs)


def test_what_is_read_from_disk(world: World, tmp_path: Path) -> None:
    """64 + 12 notes, the features of their images row by row, zeros where there is none, padding to the longest."""
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
    of_tokens = InputReader(processor, replace(world.inputs, notes=tmp_path / "tokens"))
    again = load_pair_dataset(of_tokens, world.path("pairs"), tmp_path)  # and from the table made before
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
        with pytest.raises(ValueError, match=r"features-.*.npy is damaged .*: delete it and run again"):
            pair_dataset(world, processor, tmp_path)
