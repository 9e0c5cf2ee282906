"""The scores of all blocks of histories, as a dictionary."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

Scores = dict[tuple[int, int], tuple[float, int]]  # (query, target) -> (score, users)


def scores_of(
    chunks: Iterable[tuple[int, pa.RecordBatch]], schema: pa.Schema, num_blocks: int, score: Callable[[pa.Table], Any]
) -> Scores:
    """`score` of each block's `chunks`. Each pair comes once, in order, in the block of its query."""
    blocks = defaultdict(list)
    for block, chunk in chunks:
        blocks[block].append(chunk)
    scores: Scores = {}
    for block, its_chunks in blocks.items():
        last = (-1, -1)
        for pairs in score(pa.Table.from_batches(its_chunks, schema)):
            for query, target, value, users in zip(*(c.tolist() for c in pairs), strict=True):
                assert query % num_blocks == block and last < (query, target)
                last = (query, target)
                scores[last] = (value, users)
    return scores
