"""Reads notes with their images from a user's table, or from the lake's, without Spark. Imports no torch.

The result equals that of the pipeline (`spark_jobs/clean.py`): ids and topics are trimmed, texts lose their HTML,
missing text is empty, the last of several rows with one id counts, and a note without text and image is dropped.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from notellm2_core.config.source import NOTE_CONTRACT, NoteReadingSettings
from notellm2_core.notes.note import Note, NoteWithImage
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.tables.formats import Split
from notellm2_core.tables.forms import WHITE_SPACE
from notellm2_core.tables.source import NOTE_COLUMNS, open_notes
from notellm2_core.tables.table import HTML, MALFORMED, Table

_FIELDS = tuple(column.name for column in NOTE_COLUMNS)


@dataclass(frozen=True)
class _Row:
    """A note, its image's path, and its row in the table."""

    note: Note
    image_path: str | None
    split: Split
    position: int  # in the split


@dataclass(frozen=True)
class NoteTable:
    """Notes by id. Their texts are in memory; their images are read on demand."""

    images: Path  # the folder that image_path is relative to
    num_rows: int
    html_rows: int  # from whose texts HTML was cleaned
    dropped: Mapping[str, int]  # number of dropped rows, by reason
    _table: Table
    _rows: Mapping[str, _Row]

    @property
    def path(self) -> Path:
        """The table's file or folder, or its source."""
        return self._table.path

    @property
    def note_ids(self) -> list[str]:
        return list(self._rows)

    @property
    def texts(self) -> list[Note]:
        """The notes without their images."""
        return [r.note for r in self._rows.values()]

    @property
    def image_paths(self) -> dict[str, str]:
        """The image's path of each note that has one, by note id."""
        return {note_id: r.image_path for note_id, r in self._rows.items() if r.image_path}

    def notes(self, note_ids: Sequence[str]) -> list[NoteWithImage]:
        """The notes with their images: the bytes where the table has them, else the path."""
        rows = [self._rows[i] for i in note_ids]
        data = _read_bytes(self._table, rows)
        return [NoteWithImage(r.note, data.get(r.note.note_id) or r.image_path) for r in rows]

    def content_ids(self, note_ids: Sequence[str]) -> list[str]:
        """A fingerprint per note that changes whenever the note or its image's file does. No image is read."""
        return [
            fingerprint([
                r.note.title, r.note.topics, r.note.content, r.image_path,
                _stamp(self.images / r.image_path) if r.image_path
                else [*_stamp(r.split.file), r.split.first_row + r.position],
            ])
            for r in (self._rows[i] for i in note_ids)
        ]  # fmt: skip


def read_note_table(
    path: Path,
    images: Path | None = None,
    note_ids: Collection[str] | None = None,
    reading: NoteReadingSettings = NOTE_CONTRACT,
) -> NoteTable:
    """The notes of a source folder, or of the table of notes `path`: a file, or a folder of files.

    images: the folder that image_path is relative to; None: the folder of the notes. note_ids: only these; None: all.
    Raises ValueError where there is no table, a column is missing or has the wrong type, or no note is left.
    """
    table = open_notes(path, reading)
    rows: dict[str, _Row] = {}
    dropped: Counter[str] = Counter()
    texts: dict[str, _Texts] | None = {} if reading.notes is not None and reading.notes.repeated == "join" else None
    counted = [_read(table, split, rows, dropped, note_ids, texts) for split in table.splits()]
    num_rows, html_rows = (sum(counts[i] for counts in counted) for i in (0, 1))
    for note_id, its_texts in (texts or {}).items():
        rows[note_id] = replace(rows[note_id], note=its_texts.joined(note_id))
    without_text = [r for r in rows.values() if not has_text(r.note) and not r.image_path]
    data = _read_bytes(table, without_text)
    for row in without_text:
        if row.note.note_id not in data:
            del rows[row.note.note_id]
            dropped["empty_note"] += 1
    if not rows:
        raise ValueError(f"{table.path} holds no usable note ({num_rows} rows).")
    return NoteTable(images or (path if path.is_dir() else path.parent), num_rows, html_rows, dropped, table, rows)


class _Texts:
    """The distinct texts of the rows of one note, in their order."""

    def __init__(self) -> None:
        self.titles: dict[str, None] = {}
        self.topics: dict[str, None] = {}
        self.contents: dict[str, None] = {}

    def add(self, note: Note) -> None:
        self.titles[note.title] = None
        self.topics |= dict.fromkeys(note.topics)
        self.contents[note.content] = None

    def joined(self, note_id: str) -> Note:
        title, content = (" ".join(filter(None, texts)) for texts in (self.titles, self.contents))
        return Note(note_id, title, tuple(self.topics), content)


def _read(
    table: Table,
    split: Split,
    rows: dict[str, _Row],
    dropped: Counter[str],
    note_ids: Collection[str] | None,
    texts: dict[str, _Texts] | None,
) -> tuple[int, int]:
    """Adds the notes of one split to `rows`, and counts unusable rows in `dropped`.

    Returns the number of all rows, and of those from whose texts HTML was cleaned.

    `texts`: of the notes so far, where rows with one id are joined; None: the last of them counts.
    """
    position = html_rows = 0
    for batch in table.read(split, [*(name for name in _FIELDS if name != "image"), HTML]):
        html_rows += batch.column(HTML).true_count
        for row in batch.to_pylist():
            note_id = row["note_id"]
            if row[MALFORMED]:
                dropped["malformed_row"] += 1
            elif note_id is None:
                dropped["null_note_id"] += 1
            elif note_ids is None or note_id in note_ids:
                note = Note(note_id, row["title"] or "", tuple(row["topics"] or ()), row["content"] or "")
                if rows.pop(note_id, None) is not None and texts is None:
                    dropped["duplicate_note_id"] += 1
                if texts is not None:
                    texts.setdefault(note_id, _Texts()).add(note)
                rows[note_id] = _Row(note, (row["image_path"] or "").strip(WHITE_SPACE) or None, split, position)
            position += 1
    return position, html_rows


def _read_bytes(table: Table, rows: Sequence[_Row]) -> dict[str, bytes]:
    """note_id -> the encoded bytes in column `image`, for the rows that have them. Only their splits are read."""
    data: dict[str, bytes] = {}
    for split in dict.fromkeys(r.split for r in rows):
        note_at = {r.position: r.note.note_id for r in rows if r.split == split}
        first = 0
        for batch in table.read(split, ["image"]):
            positions = [p for p in range(first, first + len(batch)) if p in note_at]
            values = batch.column("image").take(pa.array([p - first for p in positions], pa.int64())).to_pylist()
            data |= {note_at[p]: v for p, v in zip(positions, values, strict=True) if v}
            first += len(batch)
    return data


def has_text(note: Note) -> bool:
    """Whether a title, topic or content has more than white space."""
    return bool("".join((note.title, note.content, *note.topics)).strip(WHITE_SPACE))


def _stamp(file: Path) -> list[Any]:
    """Name, size and modification time; the name alone where the file is missing."""
    try:
        stat = file.stat()
    except (OSError, ValueError):  # missing, or a name that no file can have: counted when it is read
        return [str(file)]
    return [str(file), stat.st_size, stat.st_mtime_ns]
