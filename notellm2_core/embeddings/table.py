"""Note embeddings in memory: unit vectors with their note ids, read from Parquet and checked. Imports no torch.

Shapes: N notes, d embedding width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from notellm2_core.embeddings.unit_vectors import require_same_model, require_unit_vectors
from notellm2_core.runtime.files import parquet_files
from notellm2_core.tables.formats import parquet_file, unreadable
from notellm2_core.tables.ids import read_ids

WEIGHTS_ID = b"weights"  # key of a shard's metadata: the model, as `EmbeddingKey.weights_id` names it


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors [N, d] in fp32; row i belongs to `note_ids[i]`.

    Raises ValueError naming the note if a vector is not finite or not of unit length.
    """

    note_ids: tuple[str, ...]
    vectors: np.ndarray
    folder: Path | None = None  # where they were read from, for error messages
    weights_id: str | None = None  # the model that made them; None: unknown

    def __post_init__(self) -> None:
        require_unit_vectors(self.vectors, self.note_ids, self.prefix)

    @property
    def prefix(self) -> str:
        """The beginning of error messages: "FOLDER: ", or "" without a folder."""
        return "" if self.folder is None else f"{self.folder}: "

    @cached_property
    def positions(self) -> dict[str, int]:
        """note_id -> row."""
        return {note_id: row for row, note_id in enumerate(self.note_ids)}

    def rows(self, note_ids: Sequence[str]) -> np.ndarray:
        """Rows [n] of these notes. Raises ValueError where a note has no embedding."""
        missing = [i for i in note_ids if i not in self.positions]
        if missing:
            raise ValueError(
                f"{self.prefix}{len(missing)} of {len(note_ids)} notes have no embedding (the first is "
                f"{missing[0]!r}); export the embeddings of the notes that the pairs and the pool name."
            )
        return np.fromiter((self.positions[i] for i in note_ids), dtype=np.int64, count=len(note_ids))


def read_embeddings(folder: Path, note_ids: Collection[str] | None = None) -> Embeddings:
    """The embeddings in `folder` (its *.parquet, or one file), in file and row order.

    `note_ids`: only these; None: all. Raises ValueError where there are none, a column is missing or of another type,
    widths or models differ, a vector is no unit vector, or a note occurs twice.
    """
    files = [folder] if folder.is_file() else parquet_files(folder)
    if not files:
        raise ValueError(
            f"{folder} holds no embeddings (no *.parquet): make them with python -m notellm2_core.inference.export."
        )
    ids: list[str] = []
    parts: list[np.ndarray] = []
    weights_id, first_known = None, files[0]
    for file in files:
        with parquet_file(file) as parquet:
            names, metadata = parquet.schema_arrow.names, parquet.schema_arrow.metadata or {}
            if missing := {"note_id", "embedding"}.difference(names):
                raise ValueError(f"{file} is not an embedding table: it has no column {min(missing)}.")
            try:
                table = parquet.read(["note_id", "embedding"])
            except (OSError, pa.ArrowException) as e:
                raise ValueError(unreadable(file, e)) from e
        file_ids = read_ids(file, "note_id", table["note_id"]).to_pylist()
        vectors = _vectors(file, file_ids, table["embedding"].combine_chunks())
        if not file_ids:  # its width, if it has one, says nothing
            continue
        if parts and vectors.shape[1] != parts[0].shape[1]:
            raise ValueError(f"{file} has width {vectors.shape[1]}, {files[0]} has {parts[0].shape[1]}: two releases?")
        if WEIGHTS_ID in metadata:
            its_weights_id = metadata[WEIGHTS_ID].decode()
            require_same_model(its_weights_id, weights_id, file, first_known)
            weights_id, first_known = its_weights_id, first_known if weights_id else file
        if note_ids is not None:
            keep = np.fromiter((i in note_ids for i in file_ids), dtype=bool, count=len(file_ids))
            file_ids, vectors = [i for i, k in zip(file_ids, keep, strict=True) if k], vectors[keep]
        ids.extend(file_ids)
        parts.append(vectors)
    if len(set(ids)) != len(ids):
        raise ValueError(f"{folder}: {len(ids) - len(set(ids))} notes occur twice; export into an empty folder.")
    return Embeddings(tuple(ids), np.concatenate(parts or [np.empty((0, 0), np.float32)]), folder, weights_id)


def _vectors(file: Path, note_ids: Sequence[str], column: pa.Array) -> np.ndarray:
    """The vectors [n, d] of the column `embedding`, in fp32.

    Raises ValueError unless it is lists of floats, none null, all of one length.
    """
    kind = column.type
    is_list = pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
    if not is_list or not pt.is_floating(kind.value_type):
        raise ValueError(f"{file} is not an embedding table: embedding has type {kind}, not lists of floats.")
    if column.null_count:
        row = column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise ValueError(f"{file}: note {note_ids[row]!r} has no embedding (null).")
    if pt.is_fixed_size_list(kind):
        width = kind.list_size
    else:
        widths = column.value_lengths().to_numpy()
        width = int(widths[0]) if len(widths) else 0
        if (other := np.flatnonzero(widths != width)).size:
            raise ValueError(
                f"{file}: the embedding of note {note_ids[other[0]]!r} has width {widths[other[0]]}, that of "
                f"{note_ids[0]!r} has {width}."
            )
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), width)


def mean_cosine(vectors: np.ndarray, num_pairs: int = 10_000, seed: int = 0) -> float:
    """Mean cosine of random pairs of different rows of unit vectors [N, d]. Near 1, the embeddings have collapsed.

    Raises ValueError for fewer than two rows.
    """
    if len(vectors) < 2:
        raise ValueError(f"the mean cosine needs at least two embeddings, got {len(vectors)}.")
    rng = np.random.default_rng(seed)
    left = rng.integers(0, len(vectors), num_pairs)
    right = (left + rng.integers(1, len(vectors), num_pairs)) % len(vectors)
    return float(np.einsum("nd,nd->n", vectors[left], vectors[right], dtype=np.float64).mean())


def truncate_dims(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """The first `dim` components of unit vectors [N, d], normalised again (Matryoshka) -> [N, dim]. None: unchanged.

    Raises ValueError unless 0 < dim <= d.
    """
    if dim is None or dim == vectors.shape[1]:
        return vectors
    if not 0 < dim < vectors.shape[1]:
        raise ValueError(f"dim = {dim} must be between 1 and the model's {vectors.shape[1]}.")
    first = vectors[:, :dim]
    return first / np.linalg.norm(first, axis=1, keepdims=True).clip(min=1e-12)


def read_note_ids(path: Path) -> list[str]:
    """The distinct note ids of a Parquet file or folder, in order: its column note_id, or query_id and target_id.

    Raises ValueError where it is missing or has neither.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; it must be Parquet with a note_id column, or with pairs.")
    try:
        names = set(pq.ParquetDataset(path).schema.names)
        columns = ["note_id"] if "note_id" in names else ["query_id", "target_id"]
        if not names.issuperset(columns):
            raise ValueError(f"{path} has no column note_id, and no query_id and target_id.")
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as e:
        raise ValueError(unreadable(path, e)) from e
    return list(dict.fromkeys(note_id for name in columns for note_id in read_ids(path, name, table[name]).to_pylist()))
