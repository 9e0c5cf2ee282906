"""Golden queries: notes whose neighbours are written down when an index is made, and asked for wherever it is opened.

golden.json   [{"note_id": ..., "neighbours": [note ids, the best first]}, ...]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notellm2_core.retrieval.index import Index

NUM_QUERIES, NUM_NEIGHBOURS = 20, 10


def golden_queries(index: Index, note_ids: Sequence[str], vectors: np.ndarray) -> list[dict[str, Any]]:
    """What the index answers to these notes, with the vectors [n, d]."""
    found, _ = index.search(vectors, NUM_NEIGHBOURS, leave_out=note_ids)
    return [
        {"note_id": note_id, "neighbours": [n for n in neighbours if n is not None]}
        for note_id, neighbours in zip(note_ids, found, strict=True)
    ]


def require_golden_answers(golden: Path, index: Index, vectors: np.ndarray) -> None:
    """Raises ValueError where a query is not answered with its neighbours, in any order. vectors: of all notes."""
    for query in json.loads(golden.read_text()):
        note_id, expected = query["note_id"], set(query["neighbours"])
        if (row := index.rows.get(note_id)) is None:
            raise ValueError(f"the index lacks the golden note {note_id!r}")
        found, _ = index.search(vectors[row][None], max(1, len(expected)), leave_out=[note_id])
        if expected != {n for n in found[0] if n is not None}:
            raise ValueError(f"the golden note {note_id!r} has other neighbours than when the index was made")
