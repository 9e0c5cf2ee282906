"""The log of notes: the truth of the online phase.

Every write of a note is an entry with the next number, `seq`. A later entry of the same note supersedes the earlier
ones; an entry never changes. Whoever embeds or serves notes follows the log by `tail`, and can be rebuilt from it.

Entries are numbered 1, 2, ... and become visible in this order, also where several processes write. Who has read up to
a number has missed nothing below it.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np
from sqlalchemy import Connection, Engine, bindparam, delete, exists, func, insert, or_, select

from notellm2_core.serving.database import LogFull, LogUnavailable, connect, migrate, reading, writing
from notellm2_core.serving.entry import Entry, Receipt, VersionConflict, Write, require_unit_vector
from notellm2_core.serving.rows import (
    BLOCK,
    IS_NEWEST,
    add_vectors,
    append,
    blocks,
    entry_of,
    last_seq,
    require_length,
    vector_lengths,
)
from notellm2_core.serving.tables import ENTRIES, IMAGES, MARKS, MODELS, VECTORS

__all__ = [
    "Entry",
    "LogFull",
    "LogUnavailable",
    "NoteLog",
    "Receipt",
    "VersionConflict",
    "Write",
]

_NO_END = 2**63 - 1
_TAIL = select(ENTRIES).where(ENTRIES.c.seq > bindparam("after")).order_by(ENTRIES.c.seq).limit(bindparam("limit"))
_NEWEST_OF = (
    select(ENTRIES).where(ENTRIES.c.seq.in_(bindparam("seqs", expanding=True)), IS_NEWEST).order_by(ENTRIES.c.seq)
)
_FIRST_AFTER = select(ENTRIES).where(ENTRIES.c.seq > bindparam("after"), IS_NEWEST).order_by(ENTRIES.c.seq).limit(1)
_OF_NOTE = select(ENTRIES).where(ENTRIES.c.note_id == bindparam("note_id"), IS_NEWEST)


class NoteLog:
    """A log in a database. Threads may share it.

    Every method raises LogUnavailable where the database does not answer, and those that write raise LogFull where its
    disk is full.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Self:
        """The log at `sqlite:///FILE` or `postgresql://HOST/DATABASE`. Its tables are made, or brought up to date.

        Raises ValueError for another URL, and for a log of a newer version of this code.
        """
        engine = connect(url)
        try:
            migrate(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    def close(self) -> None:
        """Close the connections that no call is using."""
        self._engine.dispose()

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction of the database that writes: the only one at its time. It is on the disk after the block."""
        return writing(self._engine)

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection of the database that reads what is committed."""
        return reading(self._engine)

    def append(self, writes: Sequence[Write]) -> list[Receipt]:
        """Write all notes or none, in this order. They are on the disk when this returns.

        A write is not applied if the note's newest entry has a higher version, or has the same content under the same
        version (None: under any). A write after a deletion brings the note back. Raises ValueError for a version that
        the newest entry has with other content, and for a vector of another length than its model's others.
        """
        receipts = []
        with writing(self._engine) as connection:
            for result in append(connection, writes):
                if isinstance(result, ValueError):
                    raise result
                receipts.append(result)
        return receipts

    def append_each(self, writes: Sequence[Write]) -> list[Receipt | ValueError]:
        """Like `append`, but a write that raises a ValueError there fails alone: the error is its result."""
        with writing(self._engine) as connection:
            return append(connection, writes)

    def tail(self, after: int, limit: int = 1000) -> list[Entry]:
        """The first `limit` entries above number `after`, in order. Only forgotten ones are missing."""
        return self._entries(_TAIL, after=after, limit=limit)

    def newest(self, seqs: Sequence[int]) -> list[Entry]:
        """The entries of these numbers, in order, that are still the newest of their notes."""
        return [entry for block in blocks(sorted(seqs)) for entry in self._entries(_NEWEST_OF, seqs=block)]

    def living(self, upto: int) -> list[tuple[int, str]]:
        """The notes whose newest entry is no deletion and has a number up to `upto`: the numbers, and the ids."""
        query = select(ENTRIES.c.seq, ENTRIES.c.note_id).where(IS_NEWEST, ~ENTRIES.c.deleted, ENTRIES.c.seq <= upto)
        with reading(self._engine) as connection:
            return [(row.seq, row.note_id) for row in connection.execute(query.order_by(ENTRIES.c.seq))]

    def first_after(self, seq: int) -> Entry | None:
        """The first entry above this number that is still the newest of its note; None: there is none."""
        entries = self._entries(_FIRST_AFTER, after=seq)
        return entries[0] if entries else None

    def last_seq(self) -> int:
        """The number of the last entry; 0: there is none."""
        with reading(self._engine) as connection:
            return last_seq(connection)

    def get(self, note_id: str) -> Entry | None:
        """The newest entry of a note, which may be a deletion; None: the log has none."""
        entries = self._entries(_OF_NOTE, note_id=note_id)
        return entries[0] if entries else None

    def image(self, image_id: str) -> bytes | None:
        """The encoded image with this id; None: no entry has it."""
        with reading(self._engine) as connection:
            data: bytes | None = connection.scalar(select(IMAGES.c.data).where(IMAGES.c.image_id == image_id))
            return data

    def put_vectors(self, weights_id: str, vectors: Mapping[int, np.ndarray]) -> None:
        """Add a model's vectors, by the numbers of the entries that it has embedded.

        A vector that is there already stays, and that of a forgotten entry is left out. Raises ValueError for a vector
        that is not of unit length, or of another length than its model's others.
        """
        for seq, vector in vectors.items():
            require_unit_vector(vector, f"of entry {seq}")
        with writing(self._engine) as connection:
            lengths = vector_lengths(connection)
            for vector in vectors.values():
                require_length(weights_id, vector, lengths)
                lengths[weights_id] = len(vector)
            for seqs in blocks(vectors):
                there = connection.scalars(select(ENTRIES.c.seq).where(ENTRIES.c.seq.in_(seqs)))
                add_vectors(connection, {(weights_id, seq): vectors[seq] for seq in there})

    def vectors(self, weights_id: str, after: int, upto: int | None = None) -> tuple[list[int], np.ndarray]:
        """A model's vectors of the notes as entry `upto` left them; None: as they are now. Deleted notes have none.

        Returns the numbers of the notes' newest entries, those above `after`, in order, and their vectors [n, d].
        Entries that are not embedded yet, or forgotten, are missing.
        """
        upto = _NO_END if upto is None else upto
        is_theirs = or_(IS_NEWEST, ENTRIES.c.next_seq > upto)
        query = (
            select(VECTORS.c.seq, VECTORS.c.vector)
            .join(ENTRIES, ENTRIES.c.seq == VECTORS.c.seq)
            .where(VECTORS.c.weights_id == weights_id, VECTORS.c.seq > after, VECTORS.c.seq <= upto)
            .where(is_theirs, ~ENTRIES.c.deleted)
            .order_by(VECTORS.c.seq)
        )
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        numbers = np.frombuffer(b"".join(row.vector for row in rows), "<f4")
        return [row.seq for row in rows], numbers.reshape(len(rows), -1 if rows else 0)

    def vectors_of(self, weights_id: str, seqs: Sequence[int]) -> dict[int, np.ndarray]:
        """A model's vectors [d] of these entries, by their numbers, as far as it has embedded them."""
        query = select(VECTORS.c.seq, VECTORS.c.vector).where(VECTORS.c.weights_id == weights_id)
        found: dict[int, np.ndarray] = {}
        with reading(self._engine) as connection:
            for block in blocks(seqs):
                rows = connection.execute(query.where(VECTORS.c.seq.in_(block)))
                found |= {row.seq: np.frombuffer(row.vector, "<f4") for row in rows}
        return found

    def mark(self, seq: int) -> str:
        """A new name for the place after entry `seq`. No other log has it, nor a copy of this one that is older."""
        mark = secrets.token_hex(8)
        with writing(self._engine) as connection:
            number = connection.scalar(select(func.count()).select_from(MARKS)) or 0
            connection.execute(insert(MARKS).values(number=number + 1, mark=mark, seq=seq))
        return mark

    def marked(self, marks: Sequence[str]) -> list[tuple[str, int]]:
        """Those of `marks` that this log has, and their places, in the order in which they were set."""
        query = select(MARKS.c.mark, MARKS.c.seq).where(MARKS.c.mark.in_(marks)).order_by(MARKS.c.number)
        with reading(self._engine) as connection:
            return [(row.mark, row.seq) for row in connection.execute(query)]

    def forget(self, upto: int) -> int:
        """Remove the superseded entries up to number `upto`, their vectors, and the images that no entry has any more.

        Returns how many entries it removed. Its transactions are short, so that writers wait little.
        """
        is_superseded = ~IS_NEWEST & (ENTRIES.c.seq <= upto)
        has_image = exists().where(ENTRIES.c.image_id == IMAGES.c.image_id)
        of_any_model = VECTORS.c.weights_id.in_(select(MODELS.c.weights_id))
        query = select(ENTRIES.c.seq, ENTRIES.c.image_id).where(is_superseded).order_by(ENTRIES.c.seq).limit(BLOCK)
        forgotten, last = 0, 0
        while True:
            with writing(self._engine) as connection:
                rows = connection.execute(query.where(ENTRIES.c.seq > last)).all()
                if not rows:
                    return forgotten
                seqs, image_ids = [row.seq for row in rows], {row.image_id for row in rows if row.image_id}
                connection.execute(delete(ENTRIES).where(ENTRIES.c.seq.in_(seqs)))
                connection.execute(delete(VECTORS).where(of_any_model, VECTORS.c.seq.in_(seqs)))
                connection.execute(delete(IMAGES).where(IMAGES.c.image_id.in_(image_ids), ~has_image))
            forgotten, last = forgotten + len(rows), seqs[-1]

    def _entries(self, query: Any, **values: Any) -> list[Entry]:
        with reading(self._engine) as connection:
            return [entry_of(row) for row in connection.execute(query, values)]
