"""The nearest-neighbour index: FAISS by factory string, inner product on unit vectors. No torch.

An index is a folder: `index.faiss`, `ids.parquet` (position -> note_id) and `index.json`, which records the factory,
the format version and the checksums of the two. FAISS knows vectors by position only, and the table maps positions to
note ids, so `Index.load` refuses a folder whose checksums do not match.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.embeddings.table import Embeddings, read_embeddings
from notellm2_core.runtime.files import replaced_folder, sha256_of

FORMAT_VERSION = 1
_FILES = ("index.faiss", "ids.parquet", "index.json")
IDS = pa.schema(
    [pa.field("position", pa.int64(), nullable=False), pa.field("note_id", pa.string(), nullable=False)],
    metadata={"format_version": str(FORMAT_VERSION)},
)


@dataclass(frozen=True)
class Index:
    """A built index and the notes at its positions."""

    faiss_index: Any  # faiss.Index; its Python wrapper has no types
    note_ids: np.ndarray  # [N] object: position -> note_id
    factory: str

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest notes of unit vectors [Q, d]: note ids [Q, k] (object) and inner products [Q, k].

        If the index finds fewer than k, the rest is None and -inf. Raises ValueError for another width, or k below 1.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.faiss_index.d:
            raise ValueError(f"queries of shape {queries.shape} do not fit an index of width {self.faiss_index.d}.")
        if k < 1:
            raise ValueError(f"k = {k} must be 1 or more.")
        scores, positions = self.faiss_index.search(queries, k)
        is_missing = positions < 0
        note_ids = self.note_ids[positions]  # position -1 reads the last note, and is masked below
        note_ids[is_missing] = None
        scores[is_missing] = -np.inf
        return note_ids, scores

    @staticmethod
    def load(folder: Path) -> "Index":
        """Load an index. Raises ValueError if the folder is no index, is damaged, or has another format version."""
        metadata_file = folder / "index.json"
        if not metadata_file.is_file():
            raise ValueError(f"{folder} is no index (no index.json): run `notellm2 index build` with --out {folder}.")
        metadata = json.loads(metadata_file.read_text())
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has index format {metadata['format_version']}, this code reads {FORMAT_VERSION}: build the "
                "index again."
            )
        for name, checksum in metadata["sha256"].items():
            if not (folder / name).is_file() or sha256_of(folder / name) != checksum:
                raise ValueError(f"{folder / name} does not match its checksum: build the index again.")
        note_ids = np.array(pq.read_table(folder / "ids.parquet")["note_id"].to_pylist(), dtype=object)
        index = faiss.read_index(str(folder / "index.faiss"))
        if index.ntotal != len(note_ids):
            raise ValueError(f"{folder} has {index.ntotal} vectors for {len(note_ids)} notes: build the index again.")
        return Index(index, note_ids, metadata["factory"])


def empty_index(dim: int, factory: str) -> Any:
    """A FAISS index for vectors of width `dim`. Raises ValueError if `factory` is no valid factory string for it."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as e:
        raise ValueError(f"index.factory = {factory!r} is no FAISS factory string for width {dim}: {_reason(e)}") from e


def make_index(embeddings: Embeddings, factory: str, num_threads: int = 1) -> Index:
    """Train (if the factory needs it) and fill an index.

    One thread by default, for reproducible indexes: the graph of HNSW depends on the order in which threads insert.
    Raises ValueError naming index.factory if FAISS cannot build it from these vectors.
    """
    vectors = np.ascontiguousarray(embeddings.vectors, dtype=np.float32)
    num_notes, dim = vectors.shape
    index = empty_index(dim, factory)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
    except RuntimeError as e:
        raise ValueError(
            f"index.factory = {factory!r} cannot be built from {num_notes} vectors of width {dim}: {_reason(e)}. "
            "Use fewer clusters or codes, or Flat or HNSW32, which need no training."
        ) from e
    finally:
        faiss.omp_set_num_threads(threads)
    return Index(index, np.array(embeddings.note_ids, dtype=object), factory)


def build_index(embeddings_dir: Path, out: Path, factory: str, num_threads: int = 1) -> dict[str, Any]:
    """Build the index of an embedding folder and save it as the folder `out`. Returns the content of index.json.

    Raises ValueError if `out` holds anything but an index.
    """
    if out.exists() and not (out.is_dir() and {f.name for f in out.iterdir()} <= {*_FILES}):
        raise ValueError(f"{out} holds files that are no index; give --out a new folder.")
    embeddings = read_embeddings(embeddings_dir)
    index = make_index(embeddings, factory, num_threads)
    with replaced_folder(out) as draft:
        faiss.write_index(index.faiss_index, str(draft / "index.faiss"))
        positions = pa.array(range(len(embeddings.note_ids)), pa.int64())
        ids = pa.Table.from_arrays([positions, pa.array(embeddings.note_ids, pa.string())], schema=IDS)
        pq.write_table(ids, draft / "ids.parquet")
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "factory": factory,
            "metric": "inner_product",
            "dim": int(embeddings.vectors.shape[1]),
            "num_notes": len(embeddings.note_ids),
            "sha256": {name: sha256_of(draft / name) for name in _FILES[:2]},
        }
        (draft / "index.json").write_text(json.dumps(metadata, indent=1))
    return metadata


def ann_recall(index: Index, embeddings: Embeddings, k: int, num_queries: int = 1000, seed: int = 0) -> float:
    """ANN recall: the share, in percent, of the exact k nearest notes that the index finds, without the query itself.

    Measured on random notes of the index, each searching all others. A note that ties with the exact k-th counts.
    Raises ValueError for fewer than two notes.
    """
    num_notes = len(embeddings.note_ids)
    k = min(k, num_notes - 1)
    if k < 1:
        raise ValueError(f"the index recall needs at least two notes, got {num_notes}.")
    queries = np.random.default_rng(seed).permutation(num_notes)[:num_queries]
    neighbour_ids, _ = index.search(embeddings.vectors[queries], k + 1)
    vectors = embeddings.vectors.astype(np.float64)
    hits = 0
    for query, neighbours in zip(queries, neighbour_ids, strict=True):
        exact = (vectors @ vectors[query]).astype(np.float32)
        kth = np.partition(np.delete(exact, query), -k)[-k]
        own = embeddings.note_ids[query]
        others = [embeddings.positions[i] for i in neighbours if i is not None and i != own][:k]
        hits += int((exact[others] >= kth).sum())
    return 100 * hits / (k * len(queries))


def _reason(error: RuntimeError) -> str:
    """The message of a FAISS error, without the C++ function, line and condition."""
    return re.sub(r"^.*(\.cpp:\d+: |failed: )", "", " ".join(str(error).split())).rstrip(".")
