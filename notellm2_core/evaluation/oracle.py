"""The recall that perfect knowledge of text, of the image, or of both can reach, if the source has `oracle.parquet`.

Its columns are note_id, text_key and image_key (strings; null if the text or the image carries no signal). A note's
score is the number of keys that it shares with the query. Equal scores tie, so the expected recall under random tie
order is exactly what text alone, the image alone, or both can explain.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

COLUMNS = ("note_id", "text_key", "image_key")
KEYS = {"text": ("text_key",), "image": ("image_key",), "multimodal": ("text_key", "image_key")}


class Oracle:
    """The keys of every note."""

    def __init__(self, path: Path) -> None:
        """Read oracle.parquet. Raises ValueError naming missing columns."""
        missing = [c for c in COLUMNS if c not in pq.read_schema(path).names]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}; an oracle has {list(COLUMNS)}.")
        table = pq.read_table(path, columns=list(COLUMNS)).to_pydict()
        self._keys = {
            column: {i: key for i, key in zip(table["note_id"], table[column], strict=True) if key is not None}
            for column in KEYS["multimodal"]
        }

    def rows(self, inputs: str, pool_ids: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray]:
        """The scores (query ids -> [Q, M]) of an oracle that knows these inputs (text | image | multimodal)."""
        key_index, pool = {}, {}  # by column: note_id -> the number of its key; [M] the numbers of the pool's keys
        for column in KEYS[inputs]:
            index_of = {key: n for n, key in enumerate(sorted(set(self._keys[column].values())))}
            key_index[column] = {note_id: index_of[key] for note_id, key in self._keys[column].items()}
            pool[column] = np.array([key_index[column].get(i, -1) for i in pool_ids], dtype=np.int64)

        def rows(query_ids: Sequence[str]) -> np.ndarray:
            scores = np.zeros((len(query_ids), len(pool_ids)), dtype=np.float32)
            for column in KEYS[inputs]:
                query = np.array([key_index[column].get(i, -2) for i in query_ids], dtype=np.int64)  # -2: matches none
                scores += query[:, None] == pool[column][None, :]
            return scores

        return rows
