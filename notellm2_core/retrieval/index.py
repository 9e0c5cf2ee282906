"""The nearest-neighbour index: FAISS by factory string, inner product on unit vectors. No torch.

An index is a folder: `index.faiss`, `ids.parquet` (note_id -> position) and `index.json`, which records the factory,
the format version, the model, the search parameters with their recall, and the checksums of the two files. FAISS knows
vectors by position only, so `Index.load` refuses a folder whose checksums do not match.

N: notes, P: distinct vectors (positions), Q: queries, d: width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.embeddings.table import Embeddings
from notellm2_core.embeddings.unit_vectors import require_same_model, require_unit_vectors
from notellm2_core.retrieval.parameters import Parameters, Searcher, parse_parameters, scaled_parameters, searcher
from notellm2_core.retrieval.points import Points
from notellm2_core.runtime.files import sha256_of

FORMAT_VERSION = 2
FILES = ("index.faiss", "ids.parquet", "index.json")
IDS = pa.schema(  # in the order of the embeddings; notes with equal vectors share a position
    [pa.field("position", pa.int64(), nullable=False), pa.field("note_id", pa.string(), nullable=False)],
    metadata={"format_version": str(FORMAT_VERSION)},
)


@dataclass(frozen=True)
class TunedSearch:
    """Search parameters for up to k notes."""

    k: int
    parameters: Parameters | None  # None: compare with all
    recall: float  # percent of the exact k nearest notes, as measured when the index was built


@dataclass(frozen=True)
class Index:
    """A built index and the notes at its positions."""

    faiss_index: Any  # faiss.Index; its Python wrapper has no types
    note_ids: np.ndarray  # [N] object
    points: Points
    factory: str
    tuned: tuple[TunedSearch, ...] = ()  # by k
    weights_id: str | None = None  # the model that made the vectors; None: unknown
    name: str = "the index"  # for error messages

    def search(
        self, queries: np.ndarray, k: int, params: str | None = None, leave_out: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest notes of unit vectors [Q, d]: note ids [Q, k] (object) and inner products [Q, k].

        params: FAISS's search parameters, such as "efSearch=200", or "exhaustive"; None: those that the build found for
        this k. leave_out: a note id per query, the query itself; ids that the index lacks leave out nothing. Equal
        scores are in the order of the table that the index was built from. Only where the index has fewer than k other
        notes, the rest is None and -inf. Raises ValueError for another width, vectors that are not unit, k below 1, or
        parameters that the index does not have.
        """
        own = None
        if leave_out is not None:
            own = np.fromiter((self.rows.get(i, -1) for i in leave_out), dtype=np.int64, count=len(leave_out))
        require_unit_vectors(np.atleast_2d(queries), leave_out, "queries: ")
        rows, scores = self.search_rows(queries, k, own, params)
        note_ids = self.note_ids[rows]  # row -1 reads the last note, and is masked below
        note_ids[rows < 0] = None
        return note_ids, scores

    def neighbours(self, queries: Embeddings, k: int, params: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest notes of each of `queries`, without itself. Raises ValueError where another model made them."""
        require_same_model(queries.weights_id, self.weights_id, queries.folder or "the query", self.name)
        return self.search(queries.vectors, k, params, queries.note_ids)

    def search_rows(
        self, queries: np.ndarray, k: int, own: np.ndarray | None = None, params: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` by rows: `own` [Q] and the result [Q, k] number the embeddings that the index was built from.

        -1: none. Queries of which the parameters find fewer than k notes are compared with all.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.faiss_index.d:
            raise ValueError(f"queries of shape {queries.shape} do not fit an index of width {self.faiss_index.d}.")
        if k < 1:
            raise ValueError(f"k = {k} must be 1 or more.")
        search = self._searcher(k, params)
        num_points = min(k + (own is not None), self.faiss_index.ntotal)
        scores, points = search(queries, num_points)
        if points[:, -1].min(initial=0) < 0:
            num_wanted = np.minimum(k, len(self.note_ids) - (own is not None and own >= 0))
            lacking = self.points.counts(points, own).sum(axis=1) < num_wanted
            scores[lacking], points[lacking] = searcher(self.faiss_index, None)(queries[lacking], num_points)
        return self.points.expand(points, scores, k, own)

    def parameters(self, k: int) -> Parameters | None:
        """The search parameters for k notes: those of the next larger tuned k; None: compare with all."""
        search = next((search for search in self.tuned if search.k >= k), None)
        if search is None or search.parameters is None:
            return None
        return scaled_parameters(search.parameters, search.k, k)

    def _searcher(self, k: int, params: str | None) -> Searcher:
        """The search for k notes. It is made once, which takes as long as a short search."""
        if (k, params) not in self._searchers:
            parameters = self.parameters(k) if params is None else parse_parameters(params, self.faiss_index)
            self._searchers[k, params] = searcher(self.faiss_index, parameters)
        return self._searchers[k, params]

    @cached_property
    def _searchers(self) -> dict[tuple[int, str | None], Searcher]:
        return {}

    @cached_property
    def rows(self) -> dict[str, int]:
        """note_id -> row."""
        return {note_id: row for row, note_id in enumerate(self.note_ids)}

    @property
    def dim(self) -> int:
        """The width of its vectors."""
        return int(self.faiss_index.d)

    @staticmethod
    def load(folder: Path) -> "Index":
        """Load an index. Raises ValueError if the folder is no index, is damaged, or has another format version."""
        metadata = _checked_metadata(folder, FILES[:2])
        ids = pq.read_table(folder / "ids.parquet")
        points = Points(ids["position"].to_numpy())
        index = faiss.read_index(str(folder / "index.faiss"))
        if index.ntotal != len(points.sizes):
            raise ValueError(
                f"{folder} has {index.ntotal} vectors for {len(points.sizes)} positions: build the index again."
            )
        tuned = tuple(
            TunedSearch(search["k"], parse_parameters(search["params"], index), search["recall"])
            for search in metadata["search"]
        )
        note_ids = np.array(ids["note_id"].to_pylist(), dtype=object)
        return Index(index, note_ids, points, metadata["factory"], tuned, metadata["weights_id"], str(folder))


@dataclass(frozen=True)
class IndexedNotes:
    """The notes of an index without its vectors, for those who search them elsewhere."""

    note_ids: np.ndarray  # [N] object
    dim: int
    weights_id: str | None

    @staticmethod
    def load(folder: Path) -> "IndexedNotes":
        """Raises ValueError as `Index.load`; index.faiss is not read."""
        metadata = _checked_metadata(folder, FILES[1:2])
        note_ids = pq.read_table(folder / "ids.parquet", columns=["note_id"])["note_id"].to_pylist()
        return IndexedNotes(np.array(note_ids, dtype=object), metadata["dim"], metadata["weights_id"])


def _checked_metadata(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """The content of index.json. Raises ValueError where one of `files` does not match its checksum."""
    metadata_file = folder / "index.json"
    if not metadata_file.is_file():
        raise ValueError(f"{folder} is no index (no index.json): run `notellm2 index build` with --out {folder}.")
    metadata: dict[str, Any] = json.loads(metadata_file.read_text())
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has index format {metadata['format_version']}, this code reads {FORMAT_VERSION}: build the "
            "index again."
        )
    for name in files:
        if not (folder / name).is_file() or sha256_of(folder / name) != metadata["sha256"][name]:
            raise ValueError(f"{folder / name} does not match its checksum: build the index again.")
    return metadata
