"""The rows of the log's tables: what writes add to them, each table once for all writes, and how they are read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, bindparam, func, insert, select, text, update

from notellm2_core.notes.note import Note
from notellm2_core.serving.entry import Entry, Receipt, Write, newest_after
from notellm2_core.serving.tables import ENTRIES, IMAGES, MODELS, VECTORS

T = TypeVar("T")
IS_NEWEST = ENTRIES.c.next_seq.is_(None)
BLOCK = 1000  # values of one statement: databases limit its parameters

# Made once: making a statement costs SQLAlchemy more than the database takes to run it.
_LAST_SEQ = select(func.max(ENTRIES.c.seq))
_NEWEST = select(ENTRIES).where(ENTRIES.c.note_id.in_(bindparam("ids", expanding=True)), IS_NEWEST)
_SUPERSEDE = update(ENTRIES).where(ENTRIES.c.seq == bindparam("_seq")).values(next_seq=bindparam("_next_seq"))
_ADD_ENTRIES = insert(ENTRIES)
_IMAGES_THERE = select(IMAGES.c.image_id).where(IMAGES.c.image_id.in_(bindparam("ids", expanding=True)))
_ADD_IMAGES = insert(IMAGES)
_MODELS = select(MODELS)
_ADD_MODELS = insert(MODELS)
_ADD_VECTORS = text(
    f"INSERT INTO {VECTORS} (weights_id, seq, vector) VALUES (:weights_id, :seq, :vector) ON CONFLICT DO NOTHING"
)


def append(connection: Connection, writes: Sequence[Write]) -> list[Receipt | ValueError]:
    """What each write came to. Those with a ValueError have added nothing."""
    return [result for block in blocks(writes) for result in _append_block(connection, block)]


def _append_block(connection: Connection, writes: Sequence[Write]) -> list[Receipt | ValueError]:
    time, last = datetime.now(UTC), last_seq(connection)
    ids = {write.note.note_id for write in writes}
    newest = {row.note_id: entry_of(row) for row in connection.execute(_NEWEST, {"ids": [*ids]})}
    lengths = vector_lengths(connection)
    results: list[Receipt | ValueError] = []
    entries: list[Entry] = []
    images: dict[str, bytes] = {}
    vectors: dict[tuple[str, int], np.ndarray] = {}
    next_seqs: dict[int, int] = {}  # number of a superseded entry -> of the one after it
    for write in writes:
        before = newest.get(write.note.note_id)
        try:
            for weights_id, vector in write.vectors.items():
                require_length(weights_id, vector, lengths)
            entry = newest_after(write, before, last + len(entries) + 1, time)
        except ValueError as e:
            results.append(e)
            continue
        if entry is not before:
            newest[entry.note.note_id] = entry
            entries.append(entry)
            if before is not None:
                next_seqs[before.seq] = entry.seq
            if entry.image_id is not None and write.image is not None:
                images[entry.image_id] = write.image
        if entry.content == write.content and not entry.deleted:
            for weights_id, vector in write.vectors.items():
                vectors.setdefault((weights_id, entry.seq), vector)
                lengths[weights_id] = len(vector)
        results.append(Receipt(entry.seq, entry.version, applied=entry is not before))
    _add_images(connection, images)
    _add_entries(connection, entries, next_seqs, last)
    add_vectors(connection, vectors)
    return results


def _add_entries(connection: Connection, entries: Sequence[Entry], next_seqs: Mapping[int, int], last: int) -> None:
    """Add entries, the first of which has the number `last` + 1, and supersede those before it."""
    older = [{"_seq": seq, "_next_seq": next_seq} for seq, next_seq in next_seqs.items() if seq <= last]
    if older:  # first: no note has two newest entries at any time
        connection.execute(_SUPERSEDE, older)
    if entries:
        connection.execute(_ADD_ENTRIES, [_row_of(entry, next_seqs.get(entry.seq)) for entry in entries])


def _add_images(connection: Connection, images: Mapping[str, bytes]) -> None:
    """Add the images that are missing: each is stored once, and sent to the database once."""
    there = set(connection.scalars(_IMAGES_THERE, {"ids": [*images]})) if images else set()
    if missing := [{"image_id": image_id, "data": data} for image_id, data in images.items() if image_id not in there]:
        connection.execute(_ADD_IMAGES, missing)


def add_vectors(connection: Connection, vectors: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Add vectors, by model and number of the entry. Those that are there already stay."""
    if not vectors:
        return
    lengths = {weights_id: len(vector) for (weights_id, _), vector in vectors.items()}
    if unknown := lengths.keys() - vector_lengths(connection).keys():
        connection.execute(_ADD_MODELS, [{"weights_id": name, "length": lengths[name]} for name in sorted(unknown)])
    rows = [
        {"weights_id": weights_id, "seq": seq, "vector": vector.astype("<f4").tobytes()}
        for (weights_id, seq), vector in vectors.items()
    ]
    connection.execute(_ADD_VECTORS, rows)


def require_length(weights_id: str, vector: np.ndarray, lengths: Mapping[str, int]) -> None:
    """Raises ValueError if `vector` does not have the length of the model's others, where there are some."""
    if len(vector) != lengths.get(weights_id, len(vector)):
        raise ValueError(
            f"the vectors of model {weights_id} have {lengths[weights_id]} numbers; one of {len(vector)} is not its."
        )


def vector_lengths(connection: Connection) -> dict[str, int]:
    """How many numbers a vector has, of each model that has embedded something."""
    return {row.weights_id: row.length for row in connection.execute(_MODELS)}


def last_seq(connection: Connection) -> int:
    """The number of the last entry; 0: there is none."""
    seq: int | None = connection.scalar(_LAST_SEQ)
    return seq or 0


def entry_of(row: Any) -> Entry:
    """The entry in a row of its table."""
    note = Note(row.note_id, row.title, tuple(row.topics), row.content)
    return Entry(row.seq, note, row.deleted, row.version, row.image_id, row.time.replace(tzinfo=UTC))


def _row_of(entry: Entry, next_seq: int | None) -> dict[str, Any]:
    note = entry.note
    return {
        "seq": entry.seq,
        "note_id": note.note_id,
        "version": entry.version,
        "deleted": entry.deleted,
        "title": note.title,
        "topics": [*note.topics],
        "content": note.content,
        "image_id": entry.image_id,
        "time": entry.time.replace(tzinfo=None),
        "next_seq": next_seq,
    }


def blocks(items: Iterable[T]) -> Iterator[list[T]]:
    """`items` in lists of BLOCK, the last one shorter."""
    rest = iter(items)
    while block := [*islice(rest, BLOCK)]:
        yield block
