"""What a live index should answer, by comparing all notes in plain Python."""

from collections.abc import Mapping

import numpy as np


def brute_force(
    notes: Mapping[str, np.ndarray], history: Mapping[str, float], k: int, how: str, exclude: set[str]
) -> tuple[list[tuple[str, float]], dict[str, set[str]]]:
    """The best k with their scores, and who found them."""
    candidates = [note_id for note_id in notes if note_id not in exclude and note_id not in history]
    gains: dict[str, list[float]] = {}
    found_by: dict[str, set[str]] = {}
    for note_id, weight in history.items():
        if note_id not in notes:
            continue
        scores = {c: float(notes[note_id] @ notes[c]) for c in candidates}
        for rank, c in enumerate(sorted(scores, key=lambda c: -scores[c])[:k]):
            gains.setdefault(c, []).append(weight / (61 + rank) if how == "rrf" else weight * scores[c])
            found_by.setdefault(c, set()).add(note_id)
    values = {c: max(parts) if how == "max" else sum(parts) for c, parts in gains.items()}
    return sorted(values.items(), key=lambda item: (-item[1], item[0]))[:k], found_by
