"""The tables of the log, as the last step of `migrations` leaves them."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

VERSION_TABLE = "log_schema"  # Alembic's: the last step that was run
_IS_NEWEST = text("next_seq IS NULL")

METADATA = MetaData()

ENTRIES = Table(
    "log_entries",
    METADATA,
    Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=False),
    Column("note_id", String(128), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("title", Text, nullable=False),
    Column("topics", JSON, nullable=False),  # a list of texts
    Column("content", Text, nullable=False),
    Column("image_id", String(64)),
    Column("time", DateTime, nullable=False),  # UTC
    Column("next_seq", BigInteger),  # the note's next entry, which supersedes this one; NULL: this is the newest
    Index("log_newest", "note_id", unique=True, sqlite_where=_IS_NEWEST, postgresql_where=_IS_NEWEST),
    Index("log_image_uses", "image_id"),
)

IMAGES = Table(
    "log_images",
    METADATA,
    Column("image_id", String(64), primary_key=True),  # SHA-256 of `data` in hexadecimal digits
    Column("data", LargeBinary, nullable=False),  # the encoded image, as it was sent
)

MODELS = Table(
    "log_models",
    METADATA,
    Column("weights_id", Text, primary_key=True),
    Column("length", Integer, nullable=False),  # how many numbers its vectors have
)

VECTORS = Table(
    "log_vectors",
    METADATA,
    Column("weights_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),  # of the entry that was embedded
    Column("vector", LargeBinary, nullable=False),  # float32, little-endian
    sqlite_with_rowid=False,  # the vectors of a model lie together, in the order of the log
)

MARKS = Table(
    "log_marks",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),  # 1, 2, ...
    Column("mark", String(16), nullable=False, unique=True),  # random, in hexadecimal digits
    Column("seq", BigInteger, nullable=False),  # the last entry when it was set
)

EVENTS = Table(
    "log_events",
    METADATA,
    Column("number", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("user_id", String(128), nullable=False),
    Column("note_id", String(128), nullable=False),
    Column("event", String(128), nullable=False),
    Column("timestamp", DateTime, nullable=False),  # UTC
    Column("answer", String(64)),  # the answer that showed the note
    Column("release", String(128)),  # the release that found the note
    Column("batch", String(16)),  # the file that it is written to; NULL: it waits for one
    Index("log_event_batches", "batch"),
)

EVENT_IDS = Table(
    "log_event_ids",
    METADATA,
    Column("event_id", String(64), primary_key=True),
    Column("time", DateTime, nullable=False),  # UTC, when the event was taken
    Index("log_event_id_times", "time"),
)
