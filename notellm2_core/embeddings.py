"""Note embeddings on disk and in memory: a shard is written whole, a folder is read back checked. No torch.

N: notes, d: embedding width.
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from notellm2_core import schema
from notellm2_core.runtime.files import link_or_copy, new_folder, parquet_files, written_whole

FORMER = ".former"  # a folder with earlier shards, until an export is complete
_REUSED = "reused"


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors [N, d] (fp32) and the notes they belong to, row by row."""

    note_ids: tuple[str, ...]
    vectors: np.ndarray

    @cached_property
    def positions(self) -> dict[str, int]:
        """note_id -> row."""
        return {note_id: row for row, note_id in enumerate(self.note_ids)}

    def rows(self, note_ids: Sequence[str]) -> np.ndarray:
        """Rows [n] of these notes. Raises ValueError with the number of notes that have no embedding."""
        missing = [i for i in note_ids if i not in self.positions]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(note_ids)} notes have no embedding (the first is {missing[0]!r}): "
                "export the embeddings of the notes that the pairs and the pool name."
            )
        return np.fromiter((self.positions[i] for i in note_ids), dtype=np.int64, count=len(note_ids))


def write_shard(path: Path, note_ids: Sequence[str], vectors: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Write one Parquet shard (schema.embeddings), whole or not at all.

    Raises ValueError where a vector is not finite or not of unit length.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = ~(np.abs(lengths - 1) < 1e-3)  # also true for NaN
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{int(wrong.sum())} embeddings are not unit vectors (note {note_ids[first]!r} has length "
            f"{lengths[first]}): the model gives NaN or zero there; check its training loss."
        )
    dim = vectors.shape[1]
    columns = [
        pa.array(list(note_ids), pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
    ]
    table = pa.Table.from_arrays(columns, schema=schema.embeddings(dim).with_metadata(dict(metadata)))
    with written_whole(path) as draft:
        pq.write_table(table, draft)


@dataclass(frozen=True)
class Made:
    """What the vectors of an export depend on."""

    by: str  # the model, the kind of input, the precision: whatever is the same for all notes
    of: Callable[[Sequence[str]], Sequence[str]]  # the content of each of these notes, equal only where it is the same


def write_shards(
    out: Path,
    note_ids: Sequence[str],
    embed: Callable[[Sequence[str]], np.ndarray],
    made: Made,
    shard_notes: int,
    rank: int = 0,
    num_ranks: int = 1,
    progress: "tqdm[Any] | None" = None,
    reuse: Sequence[Path] = (),
) -> int:
    """Embed the notes in id order, `shard_notes` per file part-00000.parquet; rank r does every num_ranks-th shard.

    A note is embedded where no shard that a former table left in `out`, nor one in the folders `reuse`, has its content
    by the same model. So a run that was killed goes on where it stopped, and of a table that has changed only the
    changed notes are embedded (its vectors then are those of a new export but for the rounding that their batches
    bring). Shards of another model, other notes or another plan are written again or removed, never mixed in. Which
    vectors are taken over depends on no kill and on no other rank.
    `progress` is moved over notes that are not embedded, without counting them in its speed; `embed` moves it itself.
    Returns how many notes of this rank's shards were not embedded.
    """
    ids = sorted(set(note_ids))
    if not ids:
        raise ValueError(f"there are no notes to embed into {out}.")
    out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(ids), shard_notes)
    plan = {out / f"part-{n:05d}.parquet": ids[i : i + shard_notes] for n, i in enumerate(starts)}
    mine = dict(list(plan.items())[rank::num_ranks])
    names = {path: _name(made, of) for path, of in plan.items()}

    def is_done(path: Path) -> bool:
        return path in plan and _metadata(path).get("fingerprint") == names[path]

    former = _kept_aside(out, is_done)
    stale = {path: of for path, of in mine.items() if not is_done(path)}
    kept = sum(map(len, mine.values())) - sum(map(len, stale.values()))
    wanted = {content for of in stale.values() for content in made.of(of)}
    known = _known([former, *reuse], made.by, wanted)
    if rank == 0:
        for path in parquet_files(out):
            if path not in plan:
                path.unlink()
    _skip(progress, kept)
    for path, of in stale.items():
        contents = made.of(of)
        new = [i for i, content in enumerate(contents) if content not in known]
        found = embed([of[i] for i in new]) if new else np.empty((0, len(next(iter(known.values())))), np.float32)
        vectors = np.empty((len(of), found.shape[1]), dtype=np.float32)
        vectors[new] = found
        for i in set(range(len(of))).difference(new):
            vectors[i] = known[contents[i]]
        num_known = len(of) - len(new)
        facts = {"made_by": made.by, "of": "\n".join(contents), _REUSED: str(num_known)}
        write_shard(path, of, vectors, {"fingerprint": names[path], **facts})
        kept += num_known
        _skip(progress, num_known)
    if all(map(is_done, plan)):
        for aside in (former, *out.glob(f".{FORMER}.*")):  # and drafts of it, from any host
            shutil.rmtree(aside, ignore_errors=True)
    return kept


def _kept_aside(out: Path, is_done: Callable[[Path], bool]) -> Path:
    """A hidden folder with the shards in `out` that are not of this export, from before any of it was written: all
    ranks, and the run after one that was killed, take vectors over from the same.
    """
    former = out / FORMER
    left = [path for path in parquet_files(out) if not is_done(path)]
    if left and not former.exists():
        try:
            with new_folder(former) as draft:
                for path in left:
                    link_or_copy(path, draft / path.name)
        except OSError:  # another rank was quicker, and may have replaced some already
            if not former.exists():
                raise
    return former


def num_reused(folder: Path) -> int:
    """How many of the vectors in `folder` were taken over when its shards were written."""
    return sum(int(_metadata(path).get(_REUSED, 0)) for path in parquet_files(folder))


def _name(made: Made, note_ids: Sequence[str]) -> str:
    """Of a shard: what it is made by, and of."""
    digest = hashlib.sha256("\n".join([*made.of(note_ids), *note_ids]).encode("utf-8", "surrogatepass"))
    return f"{made.by}-{digest.hexdigest()[:16]}"


def _metadata(path: Path) -> dict[str, str]:
    """{} where there is no shard, or a damaged one."""
    try:
        return _text(pq.read_schema(path).metadata)
    except (OSError, pa.ArrowException):
        return {}


def _text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (metadata or {}).items()}


def _known(folders: Sequence[Path], by: str, wanted: set[str]) -> dict[str, np.ndarray]:
    """The vectors of the contents `wanted` that shards in `folders` hold, made by the same."""
    known: dict[str, np.ndarray] = {}
    for path in (path for folder in folders for path in parquet_files(folder)):
        try:
            with pq.ParquetFile(path) as file:
                metadata = _text(file.schema_arrow.metadata)
                contents = metadata.get("of", "").split("\n")
                if metadata.get("made_by") != by or wanted.isdisjoint(contents):
                    continue
                column = file.read(["embedding"])["embedding"].combine_chunks()
        except (OSError, pa.ArrowException):  # as good as not there
            continue
        vectors = column.flatten().to_numpy().reshape(len(column), -1)
        known |= {content: vectors[i] for i, content in enumerate(contents) if content in wanted}
    return known


def _skip(progress: "tqdm[Any] | None", num_notes: int) -> None:
    if progress is not None and not progress.disable:
        progress.initial += num_notes
        progress.update(num_notes)


def read_embeddings(folder: Path, note_ids: Collection[str] | None = None) -> Embeddings:
    """The embeddings of `folder` (its *.parquet, or one file), in file and row order; of `note_ids` only where given.

    Raises ValueError where there are none, columns or widths differ from schema.embeddings, or a note comes twice.
    """
    files = [folder] if folder.is_file() else parquet_files(folder)
    if not files:
        raise ValueError(
            f"{folder} holds no embeddings (no *.parquet): make them with python -m notellm2_core.retrieval.export."
        )
    ids: list[str] = []
    parts: list[np.ndarray] = []
    for file in files:
        table = pq.read_table(file)
        found = table.schema.field("embedding").type if "embedding" in table.column_names else pa.null()
        if "note_id" not in table.column_names or not isinstance(found, pa.FixedSizeListType):
            raise ValueError(f"{file} is not an embedding table: it needs note_id and a fixed-size list embedding.")
        column = table["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        vectors = vectors.reshape(-1, found.list_size)
        if parts and vectors.shape[1] != parts[0].shape[1]:
            raise ValueError(f"{file} has width {vectors.shape[1]}, {files[0]} has {parts[0].shape[1]}: two releases?")
        names = table["note_id"].to_pylist()
        if note_ids is not None:
            keep = np.fromiter((n in note_ids for n in names), dtype=bool, count=len(names))
            names, vectors = [n for n, k in zip(names, keep, strict=True) if k], vectors[keep]
        ids.extend(names)
        parts.append(vectors)
    if len(set(ids)) != len(ids):
        raise ValueError(f"{folder}: {len(ids) - len(set(ids))} notes come twice; export into an empty folder.")
    return Embeddings(tuple(ids), np.concatenate(parts))


def mean_cosine(vectors: np.ndarray, num_pairs: int = 10_000, seed: int = 0) -> float:
    """Mean cosine of random pairs of different rows of unit vectors [N, d]: near 1 means that they have collapsed."""
    if len(vectors) < 2:
        raise ValueError(f"the mean cosine needs two embeddings at least, got {len(vectors)}.")
    rng = np.random.default_rng(seed)
    left = rng.integers(0, len(vectors), num_pairs)
    right = (left + rng.integers(1, len(vectors), num_pairs)) % len(vectors)
    return float(np.einsum("nd,nd->n", vectors[left], vectors[right], dtype=np.float64).mean())


def shortened(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """The first `dim` numbers of unit vectors [N, d], made unit again (Matryoshka); None: as they are.

    Raises ValueError where there are not so many.
    """
    if dim is None or dim == vectors.shape[1]:
        return vectors
    if not 0 < dim < vectors.shape[1]:
        raise ValueError(f"dim = {dim} must be between 1 and the model's {vectors.shape[1]}.")
    first = vectors[:, :dim]
    return first / np.linalg.norm(first, axis=1, keepdims=True).clip(min=1e-12)


def read_note_ids(path: Path) -> list[str]:
    """The notes that a Parquet file or folder names, by a column note_id or as pairs, in order, each once.

    Raises ValueError where it does neither.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; it must be Parquet with a note_id column, or with pairs.")
    names = set(pq.ParquetDataset(path).schema.names)
    columns = ["note_id"] if "note_id" in names else ["query_id", "target_id"]
    if not names.issuperset(columns):
        raise ValueError(f"{path} has no column note_id, and no query_id and target_id.")
    table = pq.read_table(path, columns=columns)
    return list(dict.fromkeys(note_id for column in table.columns for note_id in column.to_pylist()))
