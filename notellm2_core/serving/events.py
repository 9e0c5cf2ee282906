"""What users saw and did: kept in the log's database at once, and in files of the source contract from time to time.

    FOLDER/served-BATCH.parquet   user_id, note_id, timestamp, event, answer, release

The next weekly run reads these files as part of its log. An event is in exactly one file: a batch is named in the
database before its file is written, and removed from there afterwards. Whoever is killed in between, writes the same
file again.
"""

import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import delete, func, insert, select, update

from notellm2_core.runtime.files import written_whole
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.tables import EVENTS

FILE_SECONDS = 600.0  # between two files
_FILE_EVENTS = 20_000  # of a file: others who write wait while it is named, and while it is removed
SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("release", pa.string()),
    ]
)
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A user saw a note, or did something with it. answer, release: what showed it; None: not an answer of ours."""

    user_id: str
    note_id: str
    event: str
    timestamp: datetime  # UTC, without a time zone
    answer: str | None = None
    release: str | None = None


def keep_events(log: NoteLog, events: Sequence[Event]) -> None:
    """Write events to the database. They are on the disk when this returns."""
    with log.writing() as connection:
        connection.execute(insert(EVENTS), [asdict(event) for event in events])


def num_waiting(log: NoteLog) -> int:
    """Events that are in the database, and not yet, as far as it knows, in a file."""
    with log.reading() as connection:
        return connection.scalar(select(func.count()).select_from(EVENTS)) or 0


def write_event_files(log: NoteLog, folder: Path) -> int:
    """Write what the database has to files in `folder`, and remove it there. Returns how many events were written.

    Whoever writes the events of one log writes them to the same folder: a batch that somebody else has left is written
    again.
    """
    num_written = 0
    while batches := _named_batches(log):
        num_written += sum(_write_file(log, folder, batch) for batch in batches)
    return num_written


def _named_batches(log: NoteLog) -> list[str]:
    """The batches that are not removed yet, with a new one of those that wait."""
    waiting = select(EVENTS.c.number).where(EVENTS.c.batch.is_(None)).order_by(EVENTS.c.number).limit(_FILE_EVENTS)
    with log.writing() as connection:
        connection.execute(update(EVENTS).where(EVENTS.c.number.in_(waiting)).values(batch=secrets.token_hex(8)))
        return sorted(connection.scalars(select(EVENTS.c.batch).where(EVENTS.c.batch.is_not(None)).distinct()))


def _write_file(log: NoteLog, folder: Path, batch: str) -> int:
    is_theirs = EVENTS.c.batch == batch
    columns = [EVENTS.c[name] for name in SCHEMA.names]
    with log.reading() as connection:
        rows = connection.execute(select(*columns).where(is_theirs).order_by(EVENTS.c.number)).all()
    if not rows:  # another process was quicker
        return 0
    table = pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)],
        schema=SCHEMA,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / f"served-{batch}.parquet") as draft:
        pq.write_table(table, draft)
    with log.writing() as connection:
        connection.execute(delete(EVENTS).where(is_theirs))
    return len(rows)


class EventWriter:
    """A thread that writes the files."""

    def __init__(self, log: NoteLog, folder: Path, seconds: float = FILE_SECONDS) -> None:
        self._log, self._folder, self._seconds = log, folder, seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="write events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what there is, and end the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            is_closing = self._closing.wait(self._seconds)
            try:
                write_event_files(self._log, self._folder)
            except Exception as e:  # a full disk, or a database that is away: the events wait there
                _LOGGER.error("events cannot be written to %s now, and wait: %s", self._folder, e)
