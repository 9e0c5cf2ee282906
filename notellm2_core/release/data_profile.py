"""The profile of the notes and of the texts of related pairs, which is compared with that of the releases before."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.baselines.bm25 import words
from notellm2_core.notes.lake_reader import iter_notes, num_notes, read_notes
from notellm2_core.notes.note import plain_text
from notellm2_core.schema import NOTE_IMAGES_FILE

NUM_CHARACTERS = 100  # the most frequent ones, whose shares are kept
_NUM_TEXTS = 100_000  # texts that are looked at, at most
_NUM_PAIRS = 2_000  # pairs that are looked at, at most
# U+FFFD and C1 controls; and UTF-8 that was read as Latin-1 or Windows-1252: a first byte with as many next ones as it
# announces. Of two bytes alone, "é’" would be one, which is correct French.
_NEXT = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_WRONGLY_DECODED = re.compile(
    f"[\ufffd\x80-\x9f]|[\u00c2-\u00df]{_NEXT}|[\u00e0-\u00ef]{_NEXT}{{2}}|[\u00f0-\u00f4]{_NEXT}{{3}}"
)


def notes_profile(notes: Path, vision_features: Path) -> dict[str, Any]:
    """The profile of the table NOTES and of the dataset vision_features.

    num_notes; text_length (mean characters); characters, the NUM_CHARACTERS most frequent as [character, share];
    wrongly_decoded, the share of texts with signs of it; image_share of the notes; repeated_images, the share of the
    images that belong to several notes. At most _NUM_TEXTS texts count, spread evenly.
    """
    total = num_notes(notes)
    characters: Counter[str] = Counter()
    num_texts = num_wrong = 0
    for note in islice(iter_notes(notes), 0, None, -(-total // _NUM_TEXTS)):
        text = plain_text(note)
        characters.update(text.lower())
        num_wrong += _WRONGLY_DECODED.search(text) is not None
        num_texts += 1
    num_characters = characters.total()
    images = pq.read_table(vision_features / NOTE_IMAGES_FILE, columns=["image_id"])["image_id"].drop_null()
    counts = pc.value_counts(images.combine_chunks()).field("counts").to_numpy() if len(images) else np.zeros(0, int)
    return {
        "num_notes": total,
        "text_length": num_characters / num_texts,
        "characters": [[c, n / num_characters] for c, n in characters.most_common(NUM_CHARACTERS)],
        "wrongly_decoded": num_wrong / num_texts,
        "image_share": len(images) / total,
        "repeated_images": float(counts[counts > 1].sum() / len(images)) if len(images) else 0.0,
    }


def related_texts(notes: Path, train: Path, test: Path) -> dict[str, dict[str, float]]:
    """For the pairs of `train` and of `test` (RELATED_PAIRS): num_pairs, similarity, error.

    similarity: how much more alike the texts of related notes are than those of others, as the mean Jaccard similarity
    of their words less that of the same queries with targets of other pairs. error: its standard error.
    """
    tables = {"train": _sample(train), "test": _sample(test)}
    ids = {note_id for pairs in tables.values() for pair in pairs for note_id in pair}
    vocabularies = {note_id: frozenset(words(plain_text(n))) for note_id, n in read_notes(notes, ids).items()}
    return {name: _similarity(pairs, vocabularies) for name, pairs in tables.items()}


def _sample(folder: Path) -> list[tuple[str, str]]:
    """At most _NUM_PAIRS pairs of a folder, spread evenly."""
    table = pq.read_table(folder, columns=["query_id", "target_id"])
    step = max(1, -(-len(table) // _NUM_PAIRS))
    return list(zip(*(column.to_pylist()[::step] for column in table.columns), strict=True))


def _similarity(pairs: Sequence[tuple[str, str]], vocabularies: Mapping[str, frozenset[str]]) -> dict[str, float]:
    half = len(pairs) // 2  # rows are sorted by query, so the pairs half a table away have other queries
    if not half:
        return {"num_pairs": len(pairs), "similarity": 0.0, "error": 0.0}
    others = [*pairs[half:], *pairs[:half]]
    gains = [
        _jaccard(vocabularies[query], vocabularies[target]) - _jaccard(vocabularies[query], vocabularies[other])
        for (query, target), (_, other) in zip(pairs, others, strict=True)
    ]
    error = float(np.std(gains) / np.sqrt(len(gains)))
    return {"num_pairs": len(pairs), "similarity": float(np.mean(gains)), "error": error}


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0
