"""A user's table: a file, or a folder of parts, read through one description of its columns.

Parts are united by name and type: each part is read with its own columns, in any order, and with its own types. Columns
that nobody asks for are never looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.tables.columns import Column, Kind, plain_column, read_column, read_text, valid_utf8
from notellm2_core.tables.csv_rows import LINE
from notellm2_core.tables.formats import (
    Split,
    column_names,
    column_types,
    is_parquet,
    read_split,
    splits,
    table_files,
)

MALFORMED = "_malformed"  # whether the row cannot be read: a line that is none, or bytes that are not UTF-8
ROW = "_row"  # the unchanged row in JSON, for the quarantine
_ESCAPED = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


@dataclass(frozen=True)
class Table:
    """A checked table. `names`: our name of a column -> its name in the files, where they differ."""

    path: Path
    columns: tuple[Column, ...]
    files: tuple[Path, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def splits(self, files: Sequence[Path] | None = None) -> list[Split]:
        """What tasks read side by side, in the order of the rows. `files`: only these; None: all."""
        return [split for file in (self.files if files is None else files) for split in splits(file)]

    def read(self, split: Split, only: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of `split` in file order: every column in its canonical type, MALFORMED and ROW.

        `only`: these columns, without ROW. A column that the file lacks is null. Raises ValueError naming the file,
        and the column whose type carries no such values.
        """
        columns = [column for column in self.columns if only is None or column.name in only]
        stored = {self.stored_name(column): column for column in columns}
        try:
            for batch in read_split(split, {name: column.kind for name, column in stored.items()}, self.path):
                yield self._canonical(batch, columns, with_row=only is None)
        except ValueError as e:
            raise ValueError(str(e) if str(split.file) in str(e) else f"{split.file}: {e}") from e

    def stored_name(self, column: Column) -> str:
        """The name of `column` in the files."""
        return self.names.get(column.name, column.name)

    def _canonical(self, batch: pa.RecordBatch, columns: Sequence[Column], with_row: bool) -> pa.RecordBatch:
        malformed = batch.column(LINE).is_valid()
        values, shown = {}, {}
        for column in columns:
            name = self.stored_name(column)
            values[column.name] = pa.nulls(len(batch), column.canonical)
            if name in batch.schema.names:
                stored, broken = valid_utf8(plain_column(batch.column(name)))
                values[column.name] = _named(name, stored, column.kind)
                malformed = malformed if broken is None else pc.or_(malformed, broken)
                if column.kind is not Kind.BYTES:
                    shown[name] = stored
        if pc.any(malformed).as_py():
            values = {name: pc.if_else(malformed, pa.scalar(None, v.type), v) for name, v in values.items()}
        values[MALFORMED] = malformed
        if with_row:
            values[ROW] = rows_as_json(shown, batch.column(LINE))
        return pa.RecordBatch.from_pydict(values)


def open_table(path: Path, columns: Sequence[Column], names: Mapping[str, str] | None = None) -> Table:
    """The table `path`, a file or a folder, after a look at the columns of every part. Empty parts are left out.

    Raises ValueError naming the file and the column where a required one is missing or has a wrong type.
    """
    files = table_files(path)
    if not files:
        raise ValueError(f"{path} holds no files.")
    present = {file: its_names for file in files if (its_names := column_names(file, path))}
    if not present:
        raise ValueError(f"{path} is empty.")
    table = Table(path, tuple(columns), tuple(present), names or {})
    for column in columns:
        name = table.stored_name(column)
        if twice := next((file for file, its_names in present.items() if its_names.count(name) > 1), None):
            raise ValueError(f"{twice} has the column {name} twice: which of them counts?")
        without = [file for file, its_names in present.items() if name not in its_names]
        if without and (column.in_every_part or (column.required and len(without) == len(table.files))):
            raise ValueError(f"{without[0]} lacks the column {name}; it has {', '.join(present[without[0]])}.")
    for file in filter(is_parquet, table.files):
        types = dict(column_types(file))
        for column in columns:
            if (name := table.stored_name(column)) in types:
                empty = pa.schema([(name, types[name])]).empty_table()[name].combine_chunks()
                try:
                    _named(name, plain_column(empty), column.kind)
                except ValueError as e:
                    raise ValueError(f"{file}: {e}") from e
    return table


def _named(name: str, column: pa.Array, kind: Kind) -> pa.Array:
    try:
        return read_column(column, kind)
    except ValueError as e:
        raise ValueError(f"the column {name} {e}.") from e


def rows_as_json(columns: Mapping[str, pa.Array], lines: pa.Array) -> pa.Array:
    """The rows of these plain columns as JSON objects: numbers as numbers, all else as text.

    `lines`: a line that is no row becomes {"line": ...}.
    """
    pieces: list[Any] = []
    for name, column in columns.items():
        text = read_text(column)
        value = text if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) else _quoted(text)
        key = _quoted(pa.array([name]))[0].as_py()
        pieces += [f"{',' if pieces else '{'}{key}:", pc.fill_null(value, "null")]
    rows = pc.binary_join_element_wise(*pieces, "}", "") if pieces else pa.repeat("{}", len(lines))
    return pc.if_else(lines.is_valid(), pc.binary_join_element_wise('{"line":', _quoted(lines), "}", ""), rows)


def _quoted(text: pa.Array) -> pa.Array:
    """The texts as JSON strings; null stays null."""
    for character, escaped in _ESCAPED.items():
        text = pc.replace_substring(text, character, escaped)
    text = pc.replace_substring_regex(text, r"[\x00-\x1f]", "\ufffd")
    return pc.binary_join_element_wise('"', text, '"', "")
