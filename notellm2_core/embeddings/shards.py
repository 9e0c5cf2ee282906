"""Writes note embeddings as a folder of Parquet shards, and reuses the vectors of earlier shards. Imports no torch.

A shard is written whole or not at all. Shapes: N notes, d embedding width.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core import schema
from notellm2_core.embeddings.table import WEIGHTS_ID
from notellm2_core.embeddings.unit_vectors import OF_A_MODEL, require_unit_vectors
from notellm2_core.runtime.files import link_or_copy, new_folder, parquet_files, written_whole
from notellm2_core.runtime.progress import ProgressBar

EARLIER_FOLDER = ".former"  # in an export's folder: the shards of earlier exports, until this one is complete
_REUSED = "reused"


def write_shard(path: Path, note_ids: Sequence[str], vectors: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Write the `vectors` [N, d] of one shard (schema.embeddings), whole or not at all.

    Raises ValueError where a vector is not finite or not of unit length.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    require_unit_vectors(vectors, note_ids, reason=OF_A_MODEL)
    dim = vectors.shape[1]
    columns = [
        pa.array(list(note_ids), pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
    ]
    table = pa.Table.from_arrays(columns, schema=schema.embeddings(dim).with_metadata(dict(metadata)))
    with written_whole(path) as draft:
        pq.write_table(table, draft)


@dataclass(frozen=True)
class EmbeddingKey:
    """What the vectors of an export depend on."""

    model_id: str  # identifies everything that is the same for all notes: the model, the kind of input, the precision
    content_ids: Callable[[Sequence[str]], Sequence[str]]  # maps note ids to keys that change whenever a content does
    weights_id: str | None = None  # identifies the model alone: vectors can be compared where it is the same

    @property
    def origin(self) -> dict[str, str]:
        """The metadata of a shard that says which model made it."""
        model = {} if self.weights_id is None else {WEIGHTS_ID.decode(): self.weights_id}
        return {"made_by": self.model_id, **model}


@dataclass(frozen=True)
class Shard:
    """One file of an export, written or not."""

    path: Path
    note_ids: list[str]
    fingerprint: str  # covers its notes, their contents and the model

    @property
    def is_written(self) -> bool:
        """Whether the file exists, with these vectors."""
        return _metadata(self.path).get("fingerprint") == self.fingerprint


@dataclass(frozen=True)
class ShardPlan:
    """All files of an export into one folder."""

    folder: Path
    key: EmbeddingKey
    shards: list[Shard]


def plan_shards(folder: Path, note_ids: Sequence[str], key: EmbeddingKey, shard_notes: int) -> ShardPlan:
    """The notes in id order, `shard_notes` per file part-00000.parquet. Raises ValueError where there is no note."""
    ids = sorted(set(note_ids))
    if not ids:
        raise ValueError(f"there are no notes to embed into {folder}.")
    shards = []
    for number, start in enumerate(range(0, len(ids), shard_notes)):
        part = ids[start : start + shard_notes]
        shards.append(Shard(folder / f"part-{number:05d}.parquet", part, _fingerprint(key, part)))
    return ShardPlan(folder, key, shards)


def write_shards(
    plan: ShardPlan,
    embed: Callable[[Sequence[str]], np.ndarray],
    rank: int = 0,
    num_ranks: int = 1,
    progress: ProgressBar | None = None,
    reuse: Sequence[Path] = (),
) -> int:
    """Write every num_ranks-th shard of the plan. Returns the number of reused vectors.

    Vectors are reused where an earlier shard (in the plan's folder or in `reuse`) was made by the same model from the
    same content; only the other notes are embedded. A killed run therefore resumes, and a changed table costs only its
    changed notes. Reused vectors can differ from fresh ones by rounding, because batches differ. Shards of another
    model, other notes or another plan are replaced or removed. The same vectors are reused after a kill, and on any
    number of ranks.

    `embed`: note ids -> vectors [n, d]; it advances `progress` itself. Reused vectors advance it without counting in
    its notes per second.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    earlier = _set_aside(plan)
    own = plan.shards[rank::num_ranks]
    missing = [shard for shard in own if not shard.is_written]
    num_skipped = sum(len(shard.note_ids) for shard in own) - sum(len(shard.note_ids) for shard in missing)
    content_ids = [plan.key.content_ids(shard.note_ids) for shard in missing]
    vectors = reusable_vectors([earlier, *reuse], plan.key.model_id, {i for ids in content_ids for i in ids})
    if rank == 0:
        for path in {*parquet_files(plan.folder)} - {shard.path for shard in plan.shards}:
            path.unlink()
    _skip(progress, num_skipped)
    for shard, ids in zip(missing, content_ids, strict=True):
        num_reused = _write_missing(shard, ids, vectors, embed, plan.key.origin)
        _skip(progress, num_reused)
        num_skipped += num_reused
    if all(shard.is_written for shard in plan.shards):
        for folder in (earlier, *plan.folder.glob(f".{EARLIER_FOLDER}.*")):  # and drafts of it, from any host
            shutil.rmtree(folder, ignore_errors=True)
    return num_skipped


def _set_aside(plan: ShardPlan) -> Path:
    """Link the shards of earlier exports into a hidden folder before any is written, so all ranks and resumed runs
    reuse the same ones. Returns the folder.
    """
    earlier, written = plan.folder / EARLIER_FOLDER, {shard.path for shard in plan.shards if shard.is_written}
    others = [path for path in parquet_files(plan.folder) if path not in written]
    if others and not earlier.exists():
        try:
            with new_folder(earlier) as draft:
                for path in others:
                    link_or_copy(path, draft / path.name)
        except OSError:  # another rank was faster, and may have replaced shards already
            if not earlier.exists():
                raise
    return earlier


def reusable_vectors(folders: Sequence[Path], model_id: str, content_ids: set[str]) -> dict[str, np.ndarray]:
    """content id -> vector [d], from shards in `folders` made by `model_id`."""
    vectors: dict[str, np.ndarray] = {}
    for path in (path for folder in folders for path in parquet_files(folder)):
        try:
            with pq.ParquetFile(path) as file:
                metadata = _text(file.schema_arrow.metadata)
                ids = metadata.get("of", "").split("\n")
                if metadata.get("made_by") != model_id or content_ids.isdisjoint(ids):
                    continue
                column = file.read(["embedding"])["embedding"].combine_chunks()
        except (OSError, pa.ArrowException):  # damaged: its vectors are computed again
            continue
        rows = column.flatten().to_numpy().reshape(len(column), -1)
        vectors |= {content_id: rows[i] for i, content_id in enumerate(ids) if content_id in content_ids}
    return vectors


def _write_missing(
    shard: Shard,
    content_ids: Sequence[str],
    reusable: Mapping[str, np.ndarray],
    embed: Callable[[Sequence[str]], np.ndarray],
    origin: Mapping[str, str],
) -> int:
    """Write `shard`, embedding the notes without a `reusable` vector. Returns the number of reused vectors."""
    new_rows = [row for row, content_id in enumerate(content_ids) if content_id not in reusable]
    num_reused = len(content_ids) - len(new_rows)
    if new_rows:
        fresh = embed([shard.note_ids[row] for row in new_rows])
    else:
        fresh = np.empty((0, len(reusable[content_ids[0]])), np.float32)
    vectors = np.empty((len(content_ids), fresh.shape[1]), dtype=np.float32)
    vectors[new_rows] = fresh
    for row, content_id in enumerate(content_ids):
        if content_id in reusable:
            vectors[row] = reusable[content_id]
    contents = {"of": "\n".join(content_ids), _REUSED: str(num_reused)}
    write_shard(shard.path, shard.note_ids, vectors, {"fingerprint": shard.fingerprint, **origin, **contents})
    return num_reused


def num_reused(folder: Path) -> int:
    """The number of vectors in `folder` that were reused when its shards were written."""
    return sum(int(_metadata(path).get(_REUSED, 0)) for path in parquet_files(folder))


def _fingerprint(key: EmbeddingKey, note_ids: Sequence[str]) -> str:
    """The fingerprint of a shard with these notes."""
    digest = hashlib.sha256("\n".join([*key.content_ids(note_ids), *note_ids]).encode("utf-8", "surrogatepass"))
    return f"{key.model_id}-{digest.hexdigest()[:16]}"


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a shard; {} where it is missing or damaged."""
    try:
        return _text(pq.read_schema(path).metadata)
    except (OSError, pa.ArrowException):
        return {}


def _text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (metadata or {}).items()}


def _skip(progress: ProgressBar | None, num_notes: int) -> None:
    if progress is not None and not progress.disable:
        progress.initial += num_notes
        progress.update(num_notes)
