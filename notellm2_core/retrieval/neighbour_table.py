"""The nearest neighbours of every note of an index, made once: what a service looks up where the query is a note.

    rows.npy      [N, W] int32    rows of the nearest notes, the best first, without the note itself; -1: none
    scores.npy    [N, W] float32  their inner products; -inf: none
    vectors.npy   [N, d] float32  of the notes

A row is a note's place in the index (`Index.note_ids`). The arrays are mapped, not read: a process that looks up few
rows holds few.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.retrieval.index import Index, IndexedNotes
from notellm2_core.retrieval.tuning import Samples, tune
from notellm2_core.runtime.progress import ProgressBar

WIDTH = 128
TARGET_RECALL = 0.99
EXACT_NOTES = 50_000  # up to here, comparing all with all takes seconds
ROWS, SCORES, VECTORS = "rows.npy", "scores.npy", "vectors.npy"
_BLOCK = 1024  # queries at a time


@dataclass(frozen=True)
class NeighbourTable:
    """The mapped arrays of a folder."""

    rows: np.ndarray  # [N, W]
    scores: np.ndarray  # [N, W]
    vectors: np.ndarray  # [N, d]

    @classmethod
    def load(cls, folder: Path, index: Index | IndexedNotes) -> "NeighbourTable":
        """Raises ValueError if the arrays are not those of `index`."""
        # Plain arrays of the same pages: numpy takes rows out of them in half the time.
        arrays = [np.asarray(np.load(folder / name, mmap_mode="r")) for name in (ROWS, SCORES, VECTORS)]
        table = cls(*arrays)
        num, dim = len(index.note_ids), index.dim
        if table.rows.shape != table.scores.shape or len(table.rows) != num or table.vectors.shape != (num, dim):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(f"{folder} (arrays {shapes}) is not the table of an index of {num} notes of width {dim}.")
        return table


def write_neighbours_of(index: Path, embeddings: Path, out: Path) -> dict[str, float | int]:
    """`write_neighbours` of the folder of an index, and of the embeddings that it was built of."""
    loaded, table = Index.load(index), read_embeddings(embeddings)
    return write_neighbours(loaded, table.vectors[table.rows(list(loaded.note_ids))], out)


def write_neighbours(
    index: Index, vectors: np.ndarray, out: Path, width: int = WIDTH, exact_notes: int = EXACT_NOTES
) -> dict[str, float | int]:
    """Write the table of an index of `vectors` [N, d] into the folder `out`.

    Up to `exact_notes` notes it is exact; beyond, the index is searched with parameters that find TARGET_RECALL of the
    neighbours. Returns width, and recall in percent, measured against exact search. Raises ValueError for no notes.
    """
    num = len(index.note_ids)
    if not num:
        raise ValueError("an index without notes has no neighbours.")
    width = max(1, min(width, num - 1))
    params: str | None = "exhaustive"
    recall = 100.0
    if num > exact_notes:
        index, recall = _tuned(index, vectors, width)
        params = None
    out.mkdir(parents=True, exist_ok=True)
    rows = np.lib.format.open_memmap(out / ROWS, "w+", np.int32, (num, width))
    scores = np.lib.format.open_memmap(out / SCORES, "w+", np.float32, (num, width))
    with ProgressBar(total=num, desc="neighbours", unit="notes") as progress:
        for start in range(0, num, _BLOCK):
            own = np.arange(start, min(start + _BLOCK, num))
            rows[own], scores[own] = index.search_rows(vectors[own], width, own, params)
            progress.update(len(own))
    rows.flush()
    scores.flush()
    np.save(out / VECTORS, np.ascontiguousarray(vectors, dtype=np.float32))
    return {"width": width, "recall": round(recall, 3)}


def _tuned(index: Index, vectors: np.ndarray, width: int) -> tuple[Index, float]:
    """The index with parameters that find TARGET_RECALL of its notes' neighbours, and what they find in percent."""
    samples = Samples(index, vectors[index.points.first_rows])
    index = replace(index, tuned=tune(samples, width, TARGET_RECALL))
    return index, 100 * samples.at(width).recall(width, index.parameters(width))
