"""A note: its text, with or without its image, and how it is read from a user's dict. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from notellm2_core.config.source import NOTE_CONTRACT
from notellm2_core.tables.html_text import clean_html
from notellm2_core.tables.source import note_forms
from notellm2_core.tables.topics import topics_of_text, trimmed_topics

ImageLike = str | Path | bytes | Image.Image  # a path, the encoded bytes, or an image that Pillow has opened
FIELDS = ("note_id", "title", "topics", "content", "image")
_FORMS = note_forms(NOTE_CONTRACT)


@dataclass(frozen=True)
class Note:
    """The text of one note: n_i = (t_i, tp_i, ct_i) of section 2.1, without its image."""

    note_id: str
    title: str
    topics: tuple[str, ...]
    content: str


@dataclass(frozen=True)
class NoteWithImage:
    """A note's text and image."""

    note: Note
    image: ImageLike | None = None


NoteLike = Mapping[str, Any] | Note | NoteWithImage


def as_note(value: NoteLike) -> NoteWithImage:
    """A NoteWithImage from a dict with any of the FIELDS, or from a Note without image. Missing fields are empty.

    The texts of a dict are read as the pipeline reads them by default: HTML is cleaned. A Note is used unchanged.
    Raises ValueError for a field that is unknown or of a wrong type.
    """
    if isinstance(value, NoteWithImage):
        return value
    if isinstance(value, Note):
        return NoteWithImage(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"a note is a dict with {', '.join(FIELDS)}, not {type(value).__name__} {str(value)[:80]!r}.")
    if unknown := sorted(str(key) for key in value if key not in FIELDS):
        raise ValueError(f"a note has no field {unknown[0]!r}; its fields are {', '.join(FIELDS)}.")
    texts = {name: value.get(name) or "" for name in ("note_id", "title", "content")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"the {name} of a note is text, not {type(text).__name__} {str(text)[:80]!r}.")
    image = value.get("image")
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if image is not None and not isinstance(image, ImageLike):
        raise ValueError(f"the image of a note is a path, bytes, a PIL image or None, not {type(image).__name__}.")
    topics = parse_topics(value.get("topics"))
    note = Note(texts["note_id"], clean_html(texts["title"]), topics, clean_html(texts["content"]))
    return NoteWithImage(note, None if image == "" else image)


def parse_topics(value: Iterable[Any] | str | None) -> tuple[str, ...]:
    """Topics from a list, or from one text (`topics_of_text`): trimmed, without empty ones, as the pipeline reads them.

    Raises ValueError where a topic is not text, or `value` is neither a list nor text.
    """
    if isinstance(value, str) or value is None:
        return tuple(topics_of_text(value, _FORMS) or ())
    if not isinstance(value, Iterable):
        raise ValueError(f"the topics of a note are a list or a text, not {type(value).__name__} {str(value)[:80]!r}.")
    topics = list(value)
    wrong = [t for t in topics if t is not None and not isinstance(t, str)]
    if wrong:
        raise ValueError(f"a topic is text, not {type(wrong[0]).__name__} {str(wrong[0])[:80]!r}.")
    return tuple(trimmed_topics(topics, _FORMS.clean_html))


def plain_text(note: Note) -> str:
    """Title, topics and content, one line each, untruncated; an empty field has no line."""
    return "\n".join(part for part in (note.title, ", ".join(note.topics), note.content) if part)
