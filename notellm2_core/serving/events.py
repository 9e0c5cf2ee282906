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
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, delete, func, insert, select, update

from notellm2_core.runtime.files import written_whole
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.rows import blocks
from notellm2_core.serving.tables import EVENT_IDS, EVENTS

FILE_SECONDS = 600.0  # between two files
ID_DAYS = 30  # that the id of an event is known: whoever sends one again does it sooner
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
    """A user saw a note, or did something with it. answer, release: what showed it; None: not an answer of ours.
    event_id: the sender's; None: the event counts as often as it is sent.
    """

    user_id: str
    note_id: str
    event: str
    timestamp: datetime  # UTC, without a time zone
    answer: str | None = None
    release: str | None = None
    event_id: str | None = None


def keep_events(log: NoteLog, events: Sequence[Event]) -> int:
    """Write events to the database, but those whose ids were taken in the last ID_DAYS days. They are on the disk when
    this returns. Returns how many of them were there already.
    """
    by_id: dict[str | int, Event] = {}
    for number, event in enumerate(events):
        by_id.setdefault(event.event_id or number, event)
    with log.writing() as connection:
        known = _known_ids(connection, [event_id for event_id in by_id if isinstance(event_id, str)])
        new = [event for event in by_id.values() if event.event_id not in known]
        rows = [asdict(event) for event in new]
        ids = [event_id for row in rows if (event_id := row.pop("event_id")) is not None]
        if rows:
            connection.execute(insert(EVENTS), rows)
        if ids:
            connection.execute(insert(EVENT_IDS), [{"event_id": event_id, "time": _now()} for event_id in ids])
    return len(events) - len(new)


def _known_ids(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that were taken before."""
    of_block = (select(EVENT_IDS.c.event_id).where(EVENT_IDS.c.event_id.in_(block)) for block in blocks(ids))
    return {event_id for statement in of_block for event_id in connection.scalars(statement)}


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _forget_ids(log: NoteLog) -> None:
    with log.writing() as connection:
        connection.execute(delete(EVENT_IDS).where(EVENT_IDS.c.time < _now() - timedelta(days=ID_DAYS)))


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
    _forget_ids(log)
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
