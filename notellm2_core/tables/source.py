"""The source contract: the tables of notes and events that a user brings.

A source is a folder with one table of notes and one of events: a file `notes.EXT` and `events.EXT` in one of
`formats.FORMATS`, or a folder `notes/` and `events/` of such files. Columns that are not in the contract are ignored.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from notellm2_core.config.source import (
    EVENT_CONTRACT,
    NOTE_CONTRACT,
    EventReadingSettings,
    EventTableSettings,
    NoteReadingSettings,
    NoteTableSettings,
    ReadingSettings,
    TableSettings,
)
from notellm2_core.tables.columns import FETCH, Column, Kind
from notellm2_core.tables.csv_rows import CsvLayout
from notellm2_core.tables.formats import FORMATS, table_files
from notellm2_core.tables.forms import USUAL_FORMS, Forms
from notellm2_core.tables.origins import Constant, Entry, Origin, origin
from notellm2_core.tables.table import Table, check_table

NOTES, EVENTS = "notes", "events"
NOTE_COLUMNS = (
    Column("note_id", Kind.ID, in_every_part=True),
    Column("title", Kind.TEXT),
    Column("topics", Kind.TEXTS),
    Column("content", Kind.TEXT),
    Column("image_path", Kind.PATH, required=False),  # relative to the source folder
    Column("image", Kind.BYTES, required=False),  # the encoded bytes
)
EVENT_COLUMNS = (
    Column("user_id", Kind.ID, in_every_part=True),
    Column("note_id", Kind.ID, in_every_part=True, may_be_list=True),
    Column("timestamp", Kind.TIME, in_every_part=True, may_be_list=True),
    Column("event", Kind.NAME, in_every_part=True, may_be_list=True),
)
WEIGHT = Column("weight", Kind.NUMBER, in_every_part=True, may_be_list=True)  # where source.columns names it
_IMAGE_ADDRESS = re.compile(r"(?i)(image|img|pic|photo|cover|thumb).*ur[li]|ur[li].*(image|img|pic|photo|cover|thumb)")
_TABLE_SUFFIXES = (".parquet", ".pq", ".csv", ".tsv", ".jsonl", ".ndjson")
_COMPRESSIONS = ("", ".gz", ".bz2", ".zst")
_ENDINGS = frozenset(("", *(suffix + packed for suffix in _TABLE_SUFFIXES for packed in _COMPRESSIONS)))


def is_table(name: str, table: str) -> bool:
    """Whether a file or folder of this name in a source is the table of NOTES or EVENTS."""
    return name.startswith(table) and name[len(table) :].lower() in _ENDINGS


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
        raise ValueError(
            f"{source} holds both {found[0].name} and {found[1].name}: name the one that counts in "
            f"source.{table}.files."
        )
    return found[0]


def _matches(source: Path, tables: Sequence[TableSettings], name: str) -> Iterator[list[Path]]:
    """The files and folders of each of `tables` in a source folder. Raises ValueError where there are none."""
    for table in tables:
        if table.files is None:
            yield [find_table(source, name)]
            continue
        found: dict[Path, None] = {}
        for pattern in table.files:
            matches = sorted(source.glob(pattern))
            if not matches:
                raise ValueError(f"{source} holds no {pattern}, which source.{name}.files names.")
            found |= dict.fromkeys(matches)
        yield list(found)


def used_by(notes: NoteReadingSettings, events: EventReadingSettings, file: str) -> tuple[bool, bool]:
    """Whether the notes, and whether the events, depend on `file`, relative to the source.

    Events depend on their tables' files; notes on all files that are not of the events alone, among them the images.
    """
    of_events, of_notes = (
        any(_is_of(PurePath(file), table, name) for table in tables)
        for tables, name in ((_event_tables(events), EVENTS), (_note_tables(notes), NOTES))
    )
    return of_notes or not of_events, of_events


def _is_of(file: PurePath, table: TableSettings, name: str) -> bool:
    if table.files is None:
        return is_table(file.parts[0], name)
    above = [PurePath(*file.parts[:depth]) for depth in range(1, len(file.parts) + 1)]
    return any(_matches_whole(path, PurePath(pattern)) for pattern in table.files for path in above)


def _matches_whole(path: PurePath, pattern: PurePath) -> bool:
    return len(path.parts) == len(pattern.parts) and path.match(str(pattern))


def _note_tables(reading: NoteReadingSettings) -> tuple[NoteTableSettings, ...]:
    return (reading.notes or NoteTableSettings(),)


def _event_tables(reading: EventReadingSettings) -> tuple[EventTableSettings, ...]:
    return reading.events or (EventTableSettings(),)


def _table_at(path: Path, table: TableSettings, name: str) -> list[Path]:
    """`path` if it is itself a table, else the files and folders of `table` in the source folder `path`."""
    is_source = path.is_dir() and any(is_table(file.name, each) for file in path.iterdir() for each in (NOTES, EVENTS))
    is_folder_of_files = path.is_dir() and any(file.is_file() for file in path.rglob("*"))
    if path.is_file() or (table.files is None and is_folder_of_files and not is_source):
        return [path]
    return next(_matches(path, [table], name))


def open_notes(path: Path, reading: NoteReadingSettings = NOTE_CONTRACT) -> Table:
    """The notes of a source folder, or the table of notes `path`.

    Raises ValueError naming the file and the column where a required one is missing or has a wrong type, and where
    images are named by address alone.
    """
    table = check_table(note_table(path, reading), setting="source.columns")
    if not {"image", "image_path"} & {*_entries(reading, _note_tables(reading)[0])}:
        _require_images(table)
    return table


def note_table(path: Path, reading: NoteReadingSettings = NOTE_CONTRACT) -> Table:
    """`open_notes` before its columns are checked. Raises ValueError where there is no such table."""
    settings = _note_tables(reading)[0]
    entries = _entries(reading, settings)
    return _table(path, settings, NOTES, [origin(column, entries) for column in NOTE_COLUMNS], note_forms(reading))


def note_forms(reading: NoteReadingSettings) -> Forms:
    """How the texts of notes are written."""
    return Forms(reading.topic_delimiter or USUAL_FORMS.topic_delimiter, reading.clean_html)


def _require_images(table: Table) -> None:
    """Raises ValueError where the notes have no image, but a column with the addresses of images."""
    addresses = sorted(name for name in table.stored_names if _IMAGE_ADDRESS.search(name))
    if addresses and not {"image", "image_path"} & table.stored_names:
        raise ValueError(
            f"{table.path} has the column {addresses[0]} and neither image_path nor image: {FETCH}. Without images, "
            "set source.columns.image_path to null."
        )


def open_events(path: Path, reading: EventReadingSettings = EVENT_CONTRACT) -> list[Table]:
    """The tables of events of a source folder, or the table of events `path`. Raises ValueError as `open_notes`."""
    return [check_table(table, setting="source.columns") for table in event_tables(path, reading)]


def event_tables(path: Path, reading: EventReadingSettings = EVENT_CONTRACT) -> list[Table]:
    """`open_events` before their columns are checked. Raises ValueError where there is no such table."""
    columns = (*EVENT_COLUMNS, WEIGHT) if reading.has_weights else EVENT_COLUMNS
    forms = Forms(timestamp_format=reading.timestamp_format, time_zone=reading.time_zone)
    tables = []
    for settings in _event_tables(reading):
        entries = _entries(reading, settings)
        origins = [origin(column, entries) for column in columns]
        if settings.event is not None:
            origins = [Constant(o.column, settings.event) if o.column.name == "event" else o for o in origins]
        tables.append(_table(path, settings, EVENTS, origins, forms))
    return tables


def _entries(reading: ReadingSettings, table: TableSettings) -> dict[str, Entry]:
    """The names of columns that hold for one table, by our names."""
    entries: dict[str, Entry] = {}
    for columns in (reading.columns, table.columns):
        entries |= {str(name): entry for name, entry in (columns or {}).items()}
    return entries


def _table(path: Path, settings: TableSettings, name: str, origins: Sequence[Origin], forms: Forms) -> Table:
    layout = CsvLayout(settings.delimiter, settings.header, settings.quote, settings.escape, settings.null_values or ())
    paths = _table_at(path, settings, name)
    files = tuple(file for each in paths for file in table_files(each, layout))
    extract = settings.extract if isinstance(settings, EventTableSettings) else None
    root = paths[0] if settings.files is None else path
    return Table(root, tuple(origins), files, layout, forms, extract or {}, settings.where or {})
