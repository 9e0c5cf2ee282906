"""`notellm2 embed`: a trained model and a table of notes in, shards of unit vectors out. Needs no configuration.

The shards are written into a hidden folder beside OUT, which replaces OUT when it is complete. OUT is therefore either
complete or missing, and a killed run resumes with the shards that it had not finished.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.config.settings import ExportSettings
from notellm2_core.embeddings.shards import EARLIER_FOLDER, EmbeddingKey, plan_shards, write_shards
from notellm2_core.inference.batch_embedder import VECTORS_VERSION, WINDOW_BATCHES
from notellm2_core.inference.embedder import BATCH_NOTES, Embedder
from notellm2_core.model.hub import model_folder
from notellm2_core.model.weights import weight_files, weights_id
from notellm2_core.notes.processor import InputKind
from notellm2_core.notes.source_reader import NoteTable
from notellm2_core.runtime.files import is_draft, link_or_copy, parquet_files, swap_in
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.image_formats import optional_formats
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.vision.image_status import STATUSES

_SHARD = re.compile(r"part-\d{5,}\.parquet")
_MARK = "notellm2-embed-"  # prefix of the fingerprint in a shard that this command wrote


def embed_notes(
    model: str | Path,
    table: NoteTable,
    out: Path,
    inputs: InputKind = "multimodal",
    dim: int | None = None,
    batch_notes: int = BATCH_NOTES,
) -> dict[str, Any]:
    """Embed the notes of `table` into shards of schema.embeddings, sorted by note id.

    Returns counts: notes, reused (vectors taken from an earlier run), dropped notes by reason, images by status and
    notes_per_second (both of the notes embedded now). Raises ValueError if the model or the notes cannot be used, or
    `out` holds anything but a result of this command.
    """
    folder = model_folder(model)
    work = out.with_name(f".{out.name}.partial")
    for source in (table.path, table.images, folder):
        _require_own(out, source)
    _require_own(work, table.path)
    embedder = Embedder.from_pretrained(folder)
    embedder.require_options(inputs, batch_notes, dim)  # before anything is written
    weights, encoder_id = weight_files(folder), embedder.encoder.encoder_id
    fused = ["fused"] if embedder.is_fused else []
    options = [*fused, *optional_formats(), inputs, dim, batch_notes]
    version = [VECTORS_VERSION, weights, encoder_id, str(embedder.dtype), *options]
    work.mkdir(parents=True, exist_ok=True)
    for shard in parquet_files(out):
        if not (work / shard.name).exists():
            link_or_copy(shard, work / shard.name)

    window = WINDOW_BATCHES * batch_notes  # limits the encoded images in memory; the batches are those of a single call

    def embed(ids: Sequence[str]) -> np.ndarray:
        chunks = (table.notes(ids[i : i + window]) for i in range(0, len(ids), window))
        vectors = [embedder.embed(c, inputs, batch_notes, dim, folder=table.images, progress=progress) for c in chunks]
        return np.concatenate(vectors)

    with ProgressBar(total=len(table.note_ids), desc=f"embed {inputs}", unit="notes") as progress:
        start = time.monotonic()
        model = weights_id(weights, encoder_id)
        key = EmbeddingKey(_MARK + fingerprint(version), table.content_ids, model)
        plan = plan_shards(work, table.note_ids, key, ExportSettings().shard_notes)
        num_reused = write_shards(plan, embed, progress=progress)
        seconds = max(time.monotonic() - start, 1e-6)
    swap_in(work, out)
    return {
        "notes": len(table.note_ids),
        "reused": num_reused,
        "dropped": dict(table.dropped),
        "images": {status: embedder.image_statuses[status] for status in STATUSES},
        "notes_per_second": round((len(table.note_ids) - num_reused) / seconds, 1),
        "dim": dim or embedder.model.config.projection_dim,
        "device": str(embedder.device),
        "precision": str(embedder.dtype).removeprefix("torch."),
    }


def _require_own(out: Path, source: Path) -> None:
    """Raises ValueError if `out` is anything but a folder of this command's shards, or holds the input `source`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} holds {source}, an input of this command; name another folder.")
    foreign = sorted(f.name for f in out.iterdir() if not _is_own(f)) if out.exists() else []
    if foreign:
        raise ValueError(f"--out {out} holds {foreign[0]}, which this command did not write; name another folder.")


def _is_own(file: Path) -> bool:
    if file.name == EARLIER_FOLDER or is_draft(file):  # left by a killed run
        return True
    if not _SHARD.fullmatch(file.name) or not file.is_file():
        return False
    try:
        metadata = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return metadata.get(b"fingerprint", b"").decode().startswith(_MARK)
