"""Slices of the test pairs by the notes' token counts."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from notellm2_core.evaluation.pairs import Pairs
from notellm2_core.evaluation.slices import load_tokenizer, slice_masks, token_lengths
from notellm2_core.notes.note import Note


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are words, with a truncation that the lengths must ignore."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)
    return tokenizer


def test_lengths_count_the_whole_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Title 2 + topics "a, b" 2 + content 3 words = 7 tokens; an empty note has 0."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    notes = {"x": Note("x", "two words", ("a", "b"), "one two three"), "y": Note("y", "", (), "")}
    assert token_lengths(notes, load_tokenizer(tmp_path)) == {"x": 7, "y": 0}


def test_short_is_below_and_long_is_above() -> None:
    """Bounds are exclusive: 50 tokens are not short, 165 are not long."""
    lengths = {"a": 49, "b": 50, "c": 165, "d": 166}
    masks = slice_masks(Pairs(("a", "b", "c", "d"), ("d", "c", "b", "a")), lengths, short=50, long=165, cold={"a"})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "all": [True] * 4,
        "short_query": [True, False, False, False],
        "short_target": [False, False, False, True],
        "long_query": [False, False, False, True],
        "long_target": [True, False, False, False],
        "cold_query": [True, False, False, False],
        "cold_target": [False, False, False, True],
    }


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 notes of the pairs have no text"):
        slice_masks(Pairs(("a",), ("b",)), {"a": 3}, 50, 165)
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
