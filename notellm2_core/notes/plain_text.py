"""A note as plain text: what the text baselines read, and what a note's length is counted on."""

from notellm2_core.notes.records import Note


def plain_text(note: Note) -> str:
    """Title, topics and content, a line each, untruncated; empty fields leave no line."""
    return "\n".join(part for part in (note.title, ", ".join(note.topics), note.content) if part)
