"""The text and the picture of a note, for people: from the log, or from the notes that a release was made of."""

import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from notellm2_core.config.source import SourceSettings
from notellm2_core.evaluation.evaluate import image_reader
from notellm2_core.notes.lake_reader import read_notes
from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import decoded
from notellm2_core.serving.log import Entry, NoteLog

THUMBNAIL_SIDE = 320  # pixels
_NUM_THUMBNAILS = 1024  # in memory


class Cards:
    """Reads notes and pictures. Threads may share it."""

    def __init__(self, log: NoteLog, notes: Path | None, source: Path | None) -> None:
        """notes: the table of the release's notes. source: the folder of their pictures. None: they are not here."""
        self._log, self._notes = log, notes
        max_pixels = SourceSettings().max_image_pixels
        self._picture = None if notes is None or source is None else image_reader(notes, source, max_pixels)
        self._thumbnail = lru_cache(_NUM_THUMBNAILS)(self._make_thumbnail)

    def note(self, note_id: str) -> tuple[Note, Entry | None] | None:
        """The note, and its entry in the log, if it has one; None: it is not here, or it was deleted."""
        if (entry := self._log.get(note_id)) is not None:
            return None if entry.deleted else (entry.note, entry)
        note = None if self._notes is None else read_notes(self._notes, {note_id}).get(note_id)
        return None if note is None else (note, None)

    def thumbnail(self, note_id: str) -> bytes | None:
        """Its picture as a small JPEG; None: it has none that can be used."""
        entry = self._log.get(note_id)
        return self._thumbnail(note_id, 0 if entry is None else entry.seq)

    def _make_thumbnail(self, note_id: str, seq: int) -> bytes | None:
        picture: Image.Image | None = None
        if seq:
            entry = self._log.get(note_id)
            data = None if entry is None or entry.image_id is None else self._log.image(entry.image_id)
            picture = None if data is None else decoded(data)[1]
        elif self._picture is not None and self.note(note_id) is not None:
            picture = self._picture(note_id)
        if picture is None:
            return None
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=85)
        return out.getvalue()
