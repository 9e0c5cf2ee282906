"""The source contract: the tables of notes and events that a user brings.

A source is a folder with one table of notes and one of events: a file `notes.EXT` and `events.EXT` in one of
`formats.FORMATS`, or a folder `notes/` and `events/` of such files. Columns that are not in the contract are ignored.
"""

from collections.abc import Mapping
from pathlib import Path

from notellm2_core.tables.columns import Column, Kind
from notellm2_core.tables.formats import FORMATS
from notellm2_core.tables.table import Table, open_table

NOTES, EVENTS = "notes", "events"
NOTE_COLUMNS = (
    Column("note_id", Kind.ID, in_every_part=True),
    Column("title", Kind.TEXT),
    Column("topics", Kind.TEXTS),
    Column("content", Kind.TEXT),
    Column("image_path", Kind.TEXT, required=False),  # relative to the source folder
    Column("image", Kind.BYTES, required=False),  # the encoded bytes
)
EVENT_COLUMNS = (
    Column("user_id", Kind.ID, in_every_part=True),
    Column("note_id", Kind.ID, in_every_part=True),
    Column("timestamp", Kind.TIME, in_every_part=True),
    Column("event", Kind.ID, in_every_part=True),
)
_TABLE_SUFFIXES = (".parquet", ".pq", ".csv", ".tsv", ".jsonl", ".ndjson")
_COMPRESSIONS = ("", ".gz", ".bz2", ".zst")


def is_table(name: str, table: str) -> bool:
    """Whether a file or folder of this name in a source is the table of NOTES or EVENTS."""
    endings = {"", *(suffix + packed for suffix in _TABLE_SUFFIXES for packed in _COMPRESSIONS)}
    return name.startswith(table) and name[len(table) :].lower() in endings


def find_table(source: Path, table: str) -> Path:
    """The one table of NOTES or EVENTS in `source`. Raises ValueError where there is none, or more than one."""
    if not source.exists():
        raise ValueError(f"the source {source} does not exist; set source.path.")
    if not source.is_dir():
        raise ValueError(f"the source {source} is not a folder; set source.path.")
    found = sorted(path for path in source.iterdir() if is_table(path.name, table))
    if not found:
        raise ValueError(f"{source} holds no {table}: a file or folder {table} of {FORMATS}; set source.path.")
    if len(found) > 1:
        raise ValueError(f"{source} holds both {found[0].name} and {found[1].name}; leave one of them there.")
    return found[0]


def _table_at(path: Path, table: str) -> Path:
    """`path` if it is itself a table, else the one in the source folder `path`."""
    is_source = path.is_dir() and any(is_table(file.name, name) for file in path.iterdir() for name in (NOTES, EVENTS))
    is_folder_of_files = path.is_dir() and any(file.is_file() for file in path.rglob("*"))
    return path if path.is_file() or (is_folder_of_files and not is_source) else find_table(path, table)


def open_notes(path: Path, names: Mapping[str, str] | None = None) -> Table:
    """The notes of a source folder, or the table of notes `path`. Raises ValueError as `open_table`, `find_table`."""
    return open_table(_table_at(path, NOTES), NOTE_COLUMNS, names)


def open_events(path: Path, names: Mapping[str, str] | None = None) -> Table:
    """The events of a source folder, or the table of events `path`. Raises ValueError as `open_table`, `find_table`."""
    return open_table(_table_at(path, EVENTS), EVENT_COLUMNS, names)
