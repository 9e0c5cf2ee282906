"""The slices of the test pairs: short, long and cold notes as query or as target (sections 4.1 and C of the paper).

A note's length is the number of tokens of its whole plain text. text.length_tokenizer names the tokenizer, which makes
the slices of all models equal; by default it is the model's own.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from notellm2_core.evaluation.recall import Pairs
from notellm2_core.notes.note import Note, plain_text

SLICES = ("all", "short_query", "short_target", "long_query", "long_target", "cold_query", "cold_target")
BATCH_NOTES = 1000


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The fast tokenizer of a folder (its tokenizer.json) or of a hub name.

    Raises ValueError if the folder has none or the hub does not provide it.
    """
    folder = Path(name)
    if folder.is_dir():
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} holds no tokenizer.json: give text.length_tokenizer a folder that does.")
        return Tokenizer.from_file(str(file))
    try:
        return Tokenizer.from_pretrained(str(name))
    except Exception as e:  # the hub client's exceptions have no common base
        raise ValueError(f"text.length_tokenizer = {name} is neither a folder nor reachable on the hub ({e}).") from e


def token_lengths(notes: Mapping[str, Note], tokenizer: Tokenizer) -> dict[str, int]:
    """The number of tokens of each note's plain text, without special tokens and truncation."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = list(notes)
    lengths: dict[str, int] = {}
    for start in range(0, len(ids), BATCH_NOTES):
        batch = ids[start : start + BATCH_NOTES]
        encoded = tokenizer.encode_batch_fast([plain_text(notes[i]) for i in batch], add_special_tokens=False)
        lengths.update((note_id, len(e.ids)) for note_id, e in zip(batch, encoded, strict=True))
    return lengths


def slice_masks(
    pairs: Pairs, lengths: Mapping[str, int], short: int, long: int, cold: Collection[str] = frozenset()
) -> dict[str, np.ndarray]:
    """Boolean masks [P] over the pairs, by slice name. Short: fewer than `short` tokens; long: more than `long`.

    cold: notes without an interaction in the training days, of which a model knows only the content. Raises ValueError
    if `lengths` lacks a note of the pairs.
    """
    missing = {i for i in (*pairs.query_ids, *pairs.target_ids) if i not in lengths}
    if missing:
        raise ValueError(f"{len(missing)} notes of the pairs have no text to measure (the first is {min(missing)!r}).")
    query = np.array([lengths[i] for i in pairs.query_ids], dtype=np.int64)
    target = np.array([lengths[i] for i in pairs.target_ids], dtype=np.int64)
    cold_query, cold_target = (np.array([i in cold for i in ids], bool) for ids in (pairs.query_ids, pairs.target_ids))
    masks = (
        np.ones(len(pairs), dtype=bool), query < short, target < short, query > long, target > long,
        cold_query, cold_target,
    )  # fmt: skip
    return dict(zip(SLICES, masks, strict=True))
