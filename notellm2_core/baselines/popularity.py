"""The two floors of every table: a random ranking, and a ranking by clicks alone."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from notellm2_core.schema import TARGET_CLICKS

ScoreRows = Callable[[Sequence[str]], np.ndarray]  # query ids -> scores [Q, M]


def read_clicks(path: Path) -> dict[str, int]:
    """Users who clicked each note, from Parquet with schema.TARGET_CLICKS. Raises ValueError for other columns."""
    names = pq.ParquetDataset(path).schema.names
    if not set(TARGET_CLICKS.names) <= set(names):
        raise ValueError(f"{path} needs the columns {TARGET_CLICKS.names}, it has {sorted(names)}.")
    table = pq.read_table(path, columns=TARGET_CLICKS.names)
    return dict(zip(table["note_id"].to_pylist(), table["num_users"].to_pylist(), strict=True))


def popularity_rows(clicks: Mapping[str, int], pool_ids: Sequence[str]) -> ScoreRows:
    """Scores [Q, M]: for every query the clicks of the pool notes, 0 for a note without clicks."""
    counts = np.array([clicks.get(i, 0) for i in pool_ids], dtype=np.float64)
    return lambda query_ids: np.broadcast_to(counts, (len(query_ids), len(counts)))


def random_rows(pool_ids: Sequence[str], seed: int) -> ScoreRows:
    """Scores [Q, M]: random numbers that depend only on the seed and the query."""

    def rows(query_ids: Sequence[str]) -> np.ndarray:
        digests = [hashlib.sha256(q.encode()).digest() for q in query_ids]
        return np.stack(
            [np.random.default_rng([seed, int.from_bytes(d[:8], "big")]).random(len(pool_ids)) for d in digests]
        )

    return rows
