"""Hard negatives: a training note's nearest notes that are neither related to it nor its duplicates. No torch.

    python -m notellm2_core.retrieval.hard_negatives --embeddings DIR --pairs DIR --out DIR [--note-split DIR]
        [--first-rank N] [--last-rank N] [--factory STRING]

writes OUT/part-00000.parquet (schema.HARD_NEGATIVES, sorted by note_id and rank) and OUT/counts.json.

Queries and candidates are the notes of the training pairs alone: held-out notes must not influence training.

N: notes of the training pairs, d: embedding width, B: queries of a block, K: their candidates, R: ranks in the window.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.config.options import add_options
from notellm2_core.config.settings import IndexSettings
from notellm2_core.config.training import HardNegativeSettings
from notellm2_core.embeddings.table import Embeddings, read_embeddings
from notellm2_core.retrieval.known_pairs import KnownPairs, read_columns, read_known_pairs
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import write_atomically, written_whole
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.schema import COUNTS_FILE, HARD_NEGATIVES

BLOCK_QUERIES = 4096  # searched at a time
_MAX_NUMBERS = 1 << 22  # of candidates' vectors in memory at once: 32 MB in fp64


def mine(
    embeddings: Path, pairs: Path, out: Path, note_split: Path | None, first_rank: int, last_rank: int, factory: str
) -> dict[str, Any]:
    """Write the hard negatives of the pairs `pairs`/{train,validation} into `out`. Returns the contents of counts.json.

    The negatives of a note are its neighbours with first_rank <= rank <= last_rank, except known positives,
    near-duplicates (by `note_split`; None: unknown) and notes that are related through a near-duplicate. Ties are
    broken by note id. If more notes tie at the end of the window than the index returns, the index decides which;
    the choice is deterministic.

    Raises ValueError for an empty window, no training pairs, a note without an embedding or a row in `note_split`, or a
    factory that cannot be built from so few notes.
    """
    from notellm2_core.retrieval.build import make_index  # training reads hard negatives without FAISS
    from notellm2_core.retrieval.tuning import ann_recall

    if not 1 <= first_rank <= last_rank:
        raise ValueError(f"the ranks {first_rank} to {last_rank} are no window: it needs 1 <= first_rank <= last_rank.")
    known_pairs = read_known_pairs(pairs, note_split)
    note_ids = known_pairs.note_ids[: known_pairs.num_train]
    last_rank = min(last_rank, len(note_ids) - 1)
    if first_rank > last_rank:
        raise ValueError(f"first_rank = {first_rank}, but a note has {last_rank} others in {pairs / 'train'}.")
    ids = note_ids.to_pylist()
    table = read_embeddings(embeddings, set(ids))
    table = Embeddings(tuple(ids), table.vectors[table.rows(ids)])
    num_candidates = min(2 * (last_rank + 1), len(ids))  # notes may tie at the end of the window
    index = make_index(table, IndexSettings(factory=factory, search_k=num_candidates))

    totals = _Totals()
    with (
        written_whole(out / "part-00000.parquet") as draft,
        pq.ParquetWriter(draft, HARD_NEGATIVES) as writer,
        ProgressBar(total=len(ids), unit="note") as progress,
    ):
        for start in range(0, len(ids), BLOCK_QUERIES):
            queries = np.arange(start, min(start + BLOCK_QUERIES, len(ids)))
            candidates, _ = index.search_rows(table.vectors[queries], num_candidates)  # [B, K]
            rows, cosines = nearest_first(table.vectors, queries, candidates)
            window = slice(first_rank - 1, last_rank)
            block = _Neighbours.of(known_pairs, queries, rows[:, window], cosines[:, window])
            query, column = np.nonzero(block.is_negative)
            negatives = [pa.array(queries[query]), pa.array(block.rows[query, column])]
            ranks = pa.array(first_rank + column, pa.int32())
            columns = [*(note_ids.take(numbers) for numbers in negatives), ranks]
            writer.write_table(pa.Table.from_arrays(columns, schema=HARD_NEGATIVES))
            totals.add(block)
            progress.update(len(queries))
    index_recall = ann_recall(
        index, table.vectors, last_rank, num_queries=200
    )  # percent of the exact last_rank nearest
    counts = totals.counts(first_rank, last_rank) | {"index_recall": index_recall}
    write_atomically(out / COUNTS_FILE, json.dumps(counts, indent=1) + "\n")
    return counts


@dataclass(frozen=True)
class _Neighbours:
    """The notes at the ranks of the window, for a block of queries, and the masks of those that are no negatives."""

    rows: np.ndarray  # [B, R]
    cosines: np.ndarray  # [B, R], -inf if a query has fewer neighbours
    is_positive: np.ndarray  # [B, R] bool: known positives
    is_near: np.ndarray  # [B, R] bool: other notes that are near-duplicates of the query, or related through one

    @classmethod
    def of(cls, known_pairs: KnownPairs, queries: np.ndarray, rows: np.ndarray, cosines: np.ndarray) -> "_Neighbours":
        exists = np.isfinite(cosines)
        is_positive = exists & known_pairs.is_positive(queries, rows)
        is_near = exists & ~is_positive & known_pairs.is_near(queries, rows)
        return cls(rows, cosines, is_positive, is_near)

    @property
    def exists(self) -> np.ndarray:
        """[B, R] bool."""
        return np.isfinite(self.cosines)

    @property
    def is_negative(self) -> np.ndarray:
        """[B, R] bool: the neighbours that exist, except known positives and near-duplicates."""
        negative: np.ndarray = self.exists & ~self.is_positive & ~self.is_near
        return negative


class _Totals:
    """The sums over all blocks, for counts.json."""

    def __init__(self) -> None:
        self._negatives: list[np.ndarray] = []  # per query, in one array for each block
        self._num_positives = self._num_near = 0
        self._edges = np.zeros((2, 2))  # at the first and the last rank: the sum of the cosines, and their number

    def add(self, block: _Neighbours) -> None:
        self._negatives.append(block.is_negative.sum(axis=1))
        self._num_positives += int(block.is_positive.sum())
        self._num_near += int(block.is_near.sum())
        cosines, exists = block.cosines[:, [0, -1]], block.exists[:, [0, -1]]
        self._edges += [np.where(exists, cosines, 0).sum(axis=0), exists.sum(axis=0)]

    def counts(self, first_rank: int, last_rank: int) -> dict[str, Any]:
        num_negatives = np.concatenate(self._negatives)
        at_first, at_last = (float(total / num) if num else None for total, num in self._edges.T)
        return {
            "notes": len(num_negatives),
            "negatives": int(num_negatives.sum()),
            "negatives_per_note": float(num_negatives.mean()),
            "notes_without_negatives": int((num_negatives == 0).sum()),
            "excluded_known_positives": self._num_positives,
            "excluded_near_duplicates": self._num_near,  # also near-duplicates of known positives
            "first_rank": first_rank,
            "last_rank": last_rank,  # limited to the number of notes
            "mean_cosine_at_first_rank": at_first,  # of negatives and excluded notes
            "mean_cosine_at_last_rank": at_last,
        }


def nearest_first(vectors: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the candidates [B, K] of the `queries` [B] (rows of `vectors` [N, d]; -1: none) by cosine, ties by row.

    Returns rows and cosines (fp32), both [B, K]; the query itself and -1 come last, with the cosine -inf. The index's
    own scores may be those of compressed vectors; these cosines are summed in fp64, so that equal vectors tie exactly.
    """
    cosines = np.empty(candidates.shape, dtype=np.float32)
    step = max(1, _MAX_NUMBERS // (candidates.shape[1] * vectors.shape[1]))
    for i in range(0, len(queries), step):
        neighbours = vectors[candidates[i : i + step]].astype(np.float64)  # [b, K, d]; -1 reads the last, masked below
        cosines[i : i + step] = np.einsum("bkd,bd->bk", neighbours, vectors[queries[i : i + step]].astype(np.float64))
    cosines[(candidates < 0) | (candidates == queries[:, None])] = -np.inf
    order = np.lexsort((candidates, -cosines))
    return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def read_hard_negatives(folder: Path, note_ids: Sequence[str]) -> list[np.ndarray]:
    """For each of `note_ids`, the indices in `note_ids` of its negatives, by rank: int64, empty if it has none.

    Raises ValueError if the folder holds no negatives, or names a note that is not in `note_ids`.
    """
    table = read_columns(folder, HARD_NEGATIVES.names, dictionary=HARD_NEGATIVES.names[:2])
    if table is None or not len(table):
        raise ValueError(f"{folder} holds no hard negatives: run python -m notellm2_core.retrieval.hard_negatives.")
    value_set = pa.array(list(note_ids), pa.string())
    indices = []
    for name in HARD_NEGATIVES.names[:2]:
        column = table[name].unify_dictionaries()
        index = pc.index_in(column.chunk(0).dictionary, value_set=value_set)
        if index.null_count:
            unknown = column.chunk(0).dictionary.filter(pc.is_null(index))
            raise ValueError(
                f"{folder} names {len(unknown)} notes that the training pairs lack (the first is "
                f"{unknown[0].as_py()!r}): mine again from these pairs."
            )
        codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
        indices.append(index.to_numpy().astype(np.int64)[codes])
    note, negative = indices
    order = np.lexsort((table["rank"].to_numpy(), note))
    return np.split(negative[order], np.cumsum(np.bincount(note, minlength=len(note_ids)))[:-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Mine hard negatives for the training pairs.")
    parser.add_argument("--embeddings", type=Path, required=True, help="folder of the notes' embeddings")
    parser.add_argument("--pairs", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument(
        "--note-split", type=Path, help="folder of the dataset note_split, for its near-duplicate groups"
    )
    add_options(parser, HardNegativeSettings, "first_rank", "last_rank", "factory")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with user_errors():
        if args.note_split is None:
            print("warning: near-duplicates are unknown without --note-split: some may be mined.", file=sys.stderr)
        mine(args.embeddings, args.pairs, args.out, args.note_split, args.first_rank, args.last_rank, args.factory)


if __name__ == "__main__":
    main()
