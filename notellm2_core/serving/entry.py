"""What is written to the log, what the log holds, and what a write makes of a note's newest entry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256

import numpy as np

from notellm2_core.embeddings.unit_vectors import require_unit_vectors
from notellm2_core.notes.note import Note

MAX_ID_CHARACTERS = 128
MAX_VERSION = 2**63 - 1


class VersionConflict(ValueError):
    """The newest entry of the note has other content under the version of a write."""


@dataclass(frozen=True)
class Write:
    """A note to be written, or to be deleted: then only its id counts.

    Raises ValueError for an id that does not have 1 to 128 characters, for a text with NUL or a lone surrogate, for a
    version below 0 or above 2**63 - 1, and for a vector that is not of unit length.
    """

    note: Note
    image: bytes | None = None  # encoded; None: the note has none
    deleted: bool = False
    version: int | None = None  # None: one more than the newest
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)  # weights_id of a model -> [d], if embedded already
    image_id: str | None = field(init=False)  # SHA-256 of `image` in hexadecimal digits

    def __post_init__(self) -> None:
        note = self.note
        if not 1 <= len(note.note_id) <= MAX_ID_CHARACTERS:
            raise ValueError(
                f"a note id has 1 to {MAX_ID_CHARACTERS} characters; {note.note_id[:80]!r} has {len(note.note_id)}."
            )
        for text in (note.note_id, note.title, *note.topics, note.content, *self.vectors):
            if "\0" in text or not _is_unicode(text):
                raise ValueError(f"a text of note {note.note_id!r} has a NUL or a lone surrogate: {text[:80]!r}.")
        if self.version is not None and not 0 <= self.version <= MAX_VERSION:
            raise ValueError(f"a version is 0 to 2**63 - 1; that of note {note.note_id!r} is {self.version}.")
        for vector in self.vectors.values():
            require_unit_vector(vector, note.note_id)
        image = None if self.deleted else self.image
        object.__setattr__(self, "image_id", None if image is None else sha256(image).hexdigest())

    @property
    def content(self) -> tuple[Note, bool, str | None]:
        """What the log holds of it: the note, whether it is deleted, and the id of its image."""
        note = Note(self.note.note_id, "", (), "") if self.deleted else self.note
        return note, self.deleted, self.image_id


@dataclass(frozen=True)
class Receipt:
    """What a write came to."""

    seq: int  # the number of the note's newest entry, after this write
    version: int  # of that entry
    applied: bool  # whether this write made that entry; if not, the entry has the same content or a newer version


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    seq: int  # 1, 2, ...
    note: Note  # of a deletion, only the id
    deleted: bool
    version: int
    image_id: str | None  # SHA-256 of the encoded image in hexadecimal digits
    time: datetime  # UTC; for people: a clock may run backwards

    @property
    def content(self) -> tuple[Note, bool, str | None]:
        """As `Write.content`: what is equal if nothing has changed."""
        return self.note, self.deleted, self.image_id


def newest_after(write: Write, newest: Entry | None, seq: int, time: datetime) -> Entry:
    """The note's newest entry after `write`: a new one with the number `seq`, or `newest` if the write is not applied.

    Raises VersionConflict if `newest` has the write's version with other content.
    """
    note, deleted, image_id = write.content
    version = write.version
    if version is None:
        if newest is not None and newest.content == write.content:
            return newest
        version = 1 if newest is None else newest.version + 1
        if version > MAX_VERSION:
            raise VersionConflict(f"note {note.note_id!r} has the highest version there is, {MAX_VERSION}.")
    elif newest is not None and version < newest.version:
        return newest
    elif newest is not None and version == newest.version:
        if newest.content == write.content:
            return newest
        raise VersionConflict(
            f"note {note.note_id!r} has other content in version {version}: a change needs a new version."
        )
    return Entry(seq, note, deleted, version, image_id, time)


def require_unit_vector(vector: np.ndarray, note_id: str) -> None:
    """Raises ValueError naming the note if `vector` is not a finite vector [d] of unit length."""
    if vector.ndim != 1:
        raise ValueError(f"the vector of note {note_id!r} is an array of {vector.ndim} dimensions, not of one.")
    require_unit_vectors(vector[None], [note_id])


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates, which no encoding of Unicode has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
