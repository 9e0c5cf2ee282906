"""Reads notes with their images from a user's Parquet, or from the lake's, without Spark. Imports no torch.

The result equals that of the pipeline (`spark_jobs/clean.py`): ids and topics are trimmed, missing text is empty, the
last of several rows with one id counts, and a note without text and image is dropped.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.notes.note import WHITE_SPACE, Note, NoteWithImage, parse_topics
from notellm2_core.runtime.files import parquet_files, read_errors
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.schema import SOURCE_IMAGE_COLUMNS, SOURCE_NOTE_COLUMNS

SOURCE_NOTES = "notes.parquet"


@dataclass(frozen=True)
class _Row:
    """A note, its image's path, and its row in a file."""

    note: Note
    image_path: str | None
    file: Path
    position: int


@dataclass(frozen=True)
class NoteTable:
    """Notes by id. Their texts are in memory; their images are read on demand."""

    images: Path  # the folder that image_path is relative to
    dropped: Mapping[str, int]  # number of dropped rows, by reason
    _rows: Mapping[str, _Row]

    @property
    def note_ids(self) -> list[str]:
        return list(self._rows)

    def notes(self, note_ids: Sequence[str]) -> list[NoteWithImage]:
        """The notes with their images: the bytes where the table has them, else the path."""
        rows = [self._rows[i] for i in note_ids]
        data = _read_bytes(rows)
        return [NoteWithImage(r.note, data.get(r.note.note_id) or r.image_path) for r in rows]

    def content_ids(self, note_ids: Sequence[str]) -> list[str]:
        """A fingerprint per note that changes whenever the note or its image's file does. No image is read."""
        return [
            fingerprint([
                r.note.title, r.note.topics, r.note.content, r.image_path,
                _stamp(self.images / r.image_path) if r.image_path else [*_stamp(r.file), r.position],
            ])
            for r in (self._rows[i] for i in note_ids)
        ]  # fmt: skip


def read_note_table(path: Path, images: Path | None = None, note_ids: Collection[str] | None = None) -> NoteTable:
    """The notes of a source folder (its notes.parquet), of a Parquet file, or of a folder of Parquet files.

    images: the folder that image_path is relative to; None: the folder of the notes. note_ids: only these; None: all.
    Raises ValueError where there is no Parquet, a column is missing, or no note is left.
    """
    rows: dict[str, _Row] = {}
    dropped: Counter[str] = Counter()
    for file in _files(path):
        with read_errors(file), pq.ParquetFile(file) as parquet:
            _read(parquet, file, rows, dropped, note_ids)
    without_text = [r for r in rows.values() if not _has_text(r.note) and not r.image_path]
    data = _read_bytes(without_text)
    for row in without_text:
        if row.note.note_id not in data:
            del rows[row.note.note_id]
            dropped["empty_note"] += 1
    if not rows:
        raise ValueError(f"{path} holds no usable note ({dropped.total()} rows).")
    return NoteTable(images or (path if path.is_dir() else path.parent), dropped, rows)


def _files(path: Path) -> list[Path]:
    if path.is_dir() and (path / SOURCE_NOTES).exists():
        path = path / SOURCE_NOTES
    files = [path] if path.is_file() else parquet_files(path)
    if not files:
        raise ValueError(f"{path} holds no notes: give a folder with {SOURCE_NOTES}, or Parquet with the notes.")
    return files


def _read(
    parquet: pq.ParquetFile, file: Path, rows: dict[str, _Row], dropped: Counter[str], note_ids: Collection[str] | None
) -> None:
    """Adds the notes of one file to `rows`, and counts unusable rows in `dropped`."""
    names = parquet.schema_arrow.names
    if missing := [name for name in SOURCE_NOTE_COLUMNS if name not in names]:
        raise ValueError(f"no column {missing[0]}; notes need {', '.join(SOURCE_NOTE_COLUMNS)}")
    path_column = SOURCE_IMAGE_COLUMNS[0]
    position = 0
    for batch in parquet.iter_batches(columns=[n for n in (*SOURCE_NOTE_COLUMNS, path_column) if n in names]):
        columns = {name: _text(batch.column(name)) for name in batch.schema.names if name != "topics"}
        paths = columns.get(path_column) or [None] * len(batch)
        topic_lists = batch.column("topics").to_pylist()
        for raw_id, title, content, topics, image_path in zip(
            columns["note_id"], columns["title"], columns["content"], topic_lists, paths, strict=True
        ):
            note_id = (raw_id or "").strip(WHITE_SPACE)
            if not note_id:
                dropped["null_note_id"] += 1
            elif note_ids is None or note_id in note_ids:
                if rows.pop(note_id, None) is not None:
                    dropped["duplicate_note_id"] += 1
                note = Note(note_id, title or "", parse_topics(topics), content or "")
                rows[note_id] = _Row(note, (image_path or "").strip(WHITE_SPACE) or None, file, position)
            position += 1


def _read_bytes(rows: Sequence[_Row]) -> dict[str, bytes]:
    """note_id -> the encoded bytes in column `image`, for the rows that have them. Only their row groups are read."""
    data: dict[str, bytes] = {}
    column = SOURCE_IMAGE_COLUMNS[1]
    for file in dict.fromkeys(r.file for r in rows):
        note_at = {r.position: r.note.note_id for r in rows if r.file == file}
        with read_errors(file), pq.ParquetFile(file) as parquet:
            if column not in parquet.schema_arrow.names:
                continue
            first = 0
            for group in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(group).num_rows
                positions = sorted(p for p in note_at if first <= p < last)
                if positions:
                    values = parquet.read_row_group(group, [column])[column].take([p - first for p in positions])
                    data |= {note_at[p]: v for p, v in zip(positions, values.to_pylist(), strict=True) if v}
                first = last
    return data


def _text(column: pa.Array) -> list[str | None]:
    """The column as text: ids may be integers."""
    return list(pc.cast(column, pa.string()).to_pylist())


def _has_text(note: Note) -> bool:
    return bool("".join((note.title, note.content, *note.topics)).strip(WHITE_SPACE))


def _stamp(file: Path) -> list[Any]:
    """Name, size and modification time; the name alone where the file is missing."""
    try:
        stat = file.stat()
    except (OSError, ValueError):  # missing, or a name that no file can have: counted when it is read
        return [str(file)]
    return [str(file), stat.st_size, stat.st_mtime_ns]
