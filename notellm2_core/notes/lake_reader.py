"""Reads the texts of notes from the notes dataset of the lake. Imports no torch."""

from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.notes.note import Note
from notellm2_core.runtime.files import parquet_files
from notellm2_core.schema import NOTES

TEXT_COLUMNS = ("note_id", "title", "topics", "content")


def read_notes(path: Path, note_ids: Collection[str] | None = None) -> dict[str, Note]:
    """The notes of the Parquet files in the folder `path` (columns of schema.NOTES), by id, in the files' order.

    `note_ids`: only these; None: all. Raises ValueError where the folder holds no Parquet, a column is missing, an id
    occurs twice, or one of `note_ids` is missing.
    """
    notes: dict[str, Note] = {}
    for note in iter_notes(path, note_ids):
        if note.note_id in notes:
            raise ValueError(f"note {note.note_id!r} occurs twice in {path}; ids must be unique.")
        notes[note.note_id] = note
    missing_ids = set() if note_ids is None else set(note_ids) - notes.keys()
    if missing_ids:
        raise ValueError(f"{len(missing_ids)} notes are not in {path}, among them {min(missing_ids)!r}.")
    return notes


def iter_notes(path: Path, note_ids: Collection[str] | None = None) -> Iterator[Note]:
    """`read_notes` as an iterator, which does not check for duplicate and missing ids.

    Only the text columns are read, so images in the table cost nothing. Raises ValueError where the folder holds no
    Parquet, or a column is missing.
    """
    selected_ids = None if note_ids is None else pa.array(sorted(set(note_ids)), pa.string())
    for file in _files(path):
        with pq.ParquetFile(file) as parquet:
            missing = [name for name in TEXT_COLUMNS if name not in parquet.schema_arrow.names]
            if missing:
                raise ValueError(f"{file} has no column {missing[0]!r}; notes need {', '.join(TEXT_COLUMNS)}.")
            for batch in parquet.iter_batches(columns=list(TEXT_COLUMNS)):
                table = pa.table(batch).select(TEXT_COLUMNS).cast(pa.schema([NOTES.field(n) for n in TEXT_COLUMNS]))
                if selected_ids is not None:
                    table = table.filter(pc.is_in(table["note_id"], value_set=selected_ids))
                for note_id, title, topics, content in zip(*(c.to_pylist() for c in table.columns), strict=True):
                    yield Note(note_id, title, tuple(topics), content)


def num_notes(path: Path) -> int:
    """Number of notes in the folder, from the files' metadata."""
    return sum(pq.read_metadata(file).num_rows for file in _files(path))


def _files(path: Path) -> list[Path]:
    files = parquet_files(path)
    if not files:
        raise ValueError(f"{path} holds no Parquet file; give the folder of the notes dataset.")
    return files
