"""The text and the picture of a note, for people: from the log, or from the notes that a release was made of."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from notellm2_core.config.source import SourceSettings
from notellm2_core.notes.lake_reader import TEXT_COLUMNS
from notellm2_core.notes.note import Note
from notellm2_core.serving.log import Entry, NoteLog
from notellm2_core.serving.pictures import PictureProcess
from notellm2_core.vision import images

_NUM_THUMBNAILS = 1024  # in memory


class Cards:
    """Reads notes and pictures. Threads may share it."""

    def __init__(self, log: NoteLog, notes: Path | None, source: Path | None, pictures: PictureProcess) -> None:
        """notes: the table of the release's notes. source: the folder of their pictures. None: they are not here."""
        self._log, self._notes, self._source, self._pictures = log, notes, source, pictures
        self._thumbnail = lru_cache(_NUM_THUMBNAILS)(self._make_thumbnail)

    def note(self, note_id: str) -> tuple[Note, Entry | None] | None:
        """The note, and its entry in the log, if it has one; None: it is not here, or it was deleted."""
        if (entry := self._log.get(note_id)) is not None:
            return None if entry.deleted else (entry.note, entry)
        row = self._row(note_id, TEXT_COLUMNS)
        return None if row is None else (Note(note_id, row["title"], tuple(row["topics"]), row["content"]), None)

    def image(self, note_id: str) -> bytes | None:
        """Its picture as it was given, even if it cannot be used; None: it has none, or its file is gone."""
        entry = self._log.get(note_id)
        if entry is not None and entry.image_id is None:
            return None
        return self._encoded(note_id, None if entry is None else entry.image_id)

    def thumbnail(self, note_id: str) -> bytes | None:
        """Its picture as a small JPEG; None: it has none that can be used."""
        entry = self._log.get(note_id)
        if entry is not None and entry.image_id is None:
            return None
        return self._thumbnail(note_id, None if entry is None else entry.image_id)

    def _encoded(self, note_id: str, image_id: str | None) -> bytes | None:
        """The image of an entry of the log, or of the release's note."""
        if image_id is not None:
            return self._log.image(image_id)
        if self._source is None or (row := self._row(note_id, ("image_path", "image"))) is None:
            return None
        max_pixels = SourceSettings().max_image_pixels
        return images.fetch(self._source, row["image_path"], row["image"], max_pixels).data or None

    def _make_thumbnail(self, note_id: str, image_id: str | None) -> bytes | None:
        data = self._encoded(note_id, image_id)
        return None if data is None else self._pictures.thumbnail(data)

    def _row(self, note_id: str, columns: tuple[str, ...]) -> dict[str, Any] | None:
        """Of the release's notes. Their table is sorted, so that one group of its rows is read."""
        if self._notes is None or not self._notes.exists():
            return None
        rows = pq.read_table(self._notes, columns=list(columns), filters=[("note_id", "==", note_id)]).to_pylist()
        return rows[0] if rows else None
