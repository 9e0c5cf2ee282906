"""Which settings name the user's files and columns, where they are not those of the contract."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from notellm2_core.check import guesses
from notellm2_core.check.findings import Findings
from notellm2_core.config.source import (
    EventReadingSettings,
    EventTableSettings,
    NoteReadingSettings,
    NoteTableSettings,
    SourceSettings,
)
from notellm2_core.notes.source_reader import NoteTable
from notellm2_core.tables.formats import column_names
from notellm2_core.tables.origins import Stored
from notellm2_core.tables.source import EVENTS, NOTES, event_tables, note_table
from notellm2_core.tables.table import Table

_FILES = 20  # of a source without a table, that are looked at
_IMAGES = 5  # whose paths have to exist for a guess


def advise_files(source: Path, name: str, settings: SourceSettings, findings: Findings) -> None:
    """The file of a source that may be the table `name`, which was not found, and its columns."""
    wanted = {NOTES: ("note_id", "title"), EVENTS: ("user_id", "note_id")}[name]
    columns = _columns_of_files(source)
    fitting = [file for file, names in columns.items() if all(guesses.column_for(w, names) for w in wanted)]
    if fitting:
        findings.change(f"source.{name}.files", fitting[0], f"it has {', '.join(columns[fitting[0]][:8])}")
        advise_columns(name, _tables_of(source, name, fitting[0], settings), settings, findings)
    elif columns:
        shown = "; ".join(f"{file}: {', '.join(names[:8])}" for file, names in [*columns.items()][:4])
        findings.remarks.append(f"The source has these tables: {shown}.")


def _tables_of(source: Path, name: str, file: str, settings: SourceSettings) -> list[Table]:
    """`file` as the table `name`."""
    if name == NOTES:
        named = settings.model_copy(update={name: NoteTableSettings(files=(file,))})
        return [note_table(source, NoteReadingSettings.of(named))]
    named = settings.model_copy(update={name: (EventTableSettings(files=(file,)),)})
    return event_tables(source, EventReadingSettings.of(named))


def _columns_of_files(source: Path) -> dict[str, list[str]]:
    columns = {}
    for file in sorted(file for file in source.iterdir() if file.is_file())[:_FILES]:
        try:
            columns[file.name] = column_names(file, file)
        except ValueError:  # no table
            continue
    return columns


def advise_columns(name: str, tables: list[Table], settings: SourceSettings, findings: Findings) -> None:
    """The columns of the contract that `tables` of notes or events lack, and which of theirs they may be."""
    names = {column: None for table in tables for file in table.files[:1] for column in table.names_in(file)}
    section = f"source.{name}"
    if len(names) == 1 and (delimiter := guesses.delimiter_in(next(iter(names)))):
        findings.change(f"{section}.delimiter", delimiter, f"the only column is called {next(iter(names))[:60]}")
        return
    if name == EVENTS and settings.events is not None and len(settings.events) > 1:
        return
    missing = [o.column for table in tables for o in table.origins if _is_missing(o, table)]
    used = {kind for table in tables for origin in table.origins for kind in origin.kinds}
    rest = [column for column in names if column not in used]
    for column in missing:
        found = guesses.column_for(column.name, rest)
        where = f"{section}.columns" if column.name == "note_id" else "source.columns"
        if found is not None:
            findings.change(f"{where}.{column.name}", found, f"{name} have no {column.name}")
            rest.remove(found)
        elif column.name == "event":
            findings.change("source.events.event", "view", "no column says what happened: every row is one event")
            findings.change("source.view_events", ["view"], "")
            findings.change("source.click_events", ["view"], "")
        elif column.required and name == NOTES and column.name != "note_id":
            findings.change(f"{where}.{column.name}", None, f"notes have no {column.name}")


def _is_missing(origin: Any, table: Table) -> bool:
    is_wanted = origin.column.required or origin.column.name == "image_path"
    is_ours = isinstance(origin, Stored) and origin.column.name not in table.groups
    return is_wanted and is_ours and origin.name not in table.stored_names


def advise_images(source: Path, notes: NoteTable, images: Mapping[str, Any], table: Table, findings: Findings) -> None:
    """Where the files of images may be, if the paths lead to none or there are no paths."""
    origin = next(o for o in table.origins if o.column.name == "image_path")
    id_origin = next(o for o in table.origins if o.column.name == "note_id")
    missing = images["examples"].get("not_found", [])
    if missing and isinstance(origin, Stored):
        if pattern := guesses.image_pattern(source, origin.name, missing):
            findings.change("source.columns.image_path", pattern, f"there is no file {missing[0]}")
    elif images["named"] == 0 and isinstance(id_origin, Stored):
        ids = notes.note_ids[:_IMAGES]
        if pattern := guesses.image_pattern(source, id_origin.name, ids):
            findings.change("source.columns.image_path", pattern, "no note names an image, but there are such files")
