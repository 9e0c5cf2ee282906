"""A user's table: a file, or a folder of parts, read through one description of its columns.

Parts are united by name and type: each part is read with its own columns, in any order, and with its own types. Columns
that nobody asks for are never looked at.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from notellm2_core.config.source import CONDITION
from notellm2_core.tables.columns import Column, Kind, plain_column, read_column, read_text, rows_with_html, valid_utf8
from notellm2_core.tables.csv_rows import LINE, RFC_4180, CsvLayout
from notellm2_core.tables.events_in_rows import exploded, extracted
from notellm2_core.tables.formats import (
    Reading,
    Split,
    column_names,
    column_types,
    is_parquet,
    read_split,
    splits,
    table_files,
)
from notellm2_core.tables.forms import USUAL_FORMS, Forms
from notellm2_core.tables.origins import Origin, Stored, stored_kinds
from notellm2_core.tables.times import NUMBER

MALFORMED = "_malformed"  # whether the row cannot be read: a line that is none, or bytes that are not UTF-8
ROW = "_row"  # the unchanged row in JSON, for the quarantine
HTML = "_html"  # whether HTML was found in a text of the row, and cleaned
_ESCAPED = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


@dataclass(frozen=True)
class Table:
    """A checked table.

    `extract`: columns of text that hold several rows, each with a regular expression whose groups are our columns.
    `where`: conditions on columns of the files; rows that miss one are no part of the table.
    """

    path: Path
    origins: tuple[Origin, ...]
    files: tuple[Path, ...]
    layout: CsvLayout = RFC_4180
    forms: Forms = USUAL_FORMS
    extract: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[Column]:
        """The columns of the contract, in its order."""
        return [origin.column for origin in self.origins]

    def names_in(self, file: Path) -> list[str]:
        """The columns of one of its files. Raises ValueError where it is damaged."""
        return column_names(file, self.path, self.layout)

    @cached_property
    def stored_names(self) -> set[str]:
        """The columns that at least one of its files has. Raises ValueError where one is damaged."""
        return {name for file in self.files for name in self.names_in(file)}

    def splits(self, files: Sequence[Path] | None = None) -> list[Split]:
        """What tasks read side by side, in the order of the rows. `files`: only these; None: all."""
        return [split for file in (self.files if files is None else files) for split in splits(file)]

    def read(self, split: Split, only: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of `split` in file order: every column in its canonical type, MALFORMED, ROW and HTML.

        `only`: of the columns, ROW and HTML, these. A column that the file lacks is null. Raises ValueError naming the
        file, and the column whose type carries no such values.
        """
        origins = [origin for origin in self.origins if only is None or origin.column.name in only]
        try:
            for batch in read_split(split, self._reading(origins), self.path):
                yield self._canonical(batch, origins, (ROW, HTML) if only is None else only)
        except ValueError as e:
            raise ValueError(str(e) if str(split.file) in str(e) else f"{split.file}: {e}") from e

    def check_types(self, file: Path) -> None:
        """Raises ValueError naming the Parquet file and the column whose type carries no such values."""
        types, reading = dict(column_types(file)), self._reading(self.origins)
        for name in [name for name in reading.kinds if name in types]:
            column = plain_column(pa.schema([(name, types[name])]).empty_table()[name].combine_chunks())
            if name in reading.lists and pt.is_list(column.type):
                column = plain_column(column.flatten())
            for kind in reading.kinds[name]:
                _named(name, column, kind, self.forms)

    @cached_property
    def groups(self) -> set[str]:
        """The columns that `extract` makes."""
        return {group for pattern in self.extract.values() for group in re.compile(pattern).groupindex}

    def _reading(self, origins: Sequence[Origin]) -> Reading:
        stored = stored_kinds([origin for origin in origins if origin.column.name not in self.groups])
        lists = {name for origin in origins if origin.column.may_be_list for name in origin.kinds}
        others = dict.fromkeys(self.extract, (Kind.TEXT,)) | dict.fromkeys(self.where, (Kind.NAME,))
        return Reading({**others, **stored}, lists, self.layout, self.forms)

    def _canonical(self, batch: pa.RecordBatch, origins: Sequence[Origin], marks: Sequence[str]) -> pa.RecordBatch:
        lines = batch.column(LINE)
        malformed, columns = lines.is_valid(), {}
        for name in batch.schema.names:
            if name != LINE:
                columns[name], broken = valid_utf8(plain_column(batch.column(name)))
                malformed = malformed if broken is None else pc.or_(malformed, broken)
        if self.where:
            counts = pc.or_(malformed, self._holds(columns, len(lines)))
            malformed, lines = malformed.filter(counts), lines.filter(counts)
            columns = {name: column.filter(counts) for name, column in columns.items()}
        for name, pattern in self.extract.items():
            texts = columns.pop(name)
            groups, has_none = extracted(texts, pattern)
            columns |= groups
            malformed, lines = pc.or_(malformed, has_none), pc.if_else(has_none, texts, lines)
        may_be_lists = {*self.groups, *self._reading(origins).lists}
        if lists := [name for name, column in columns.items() if name in may_be_lists and pt.is_list(column.type)]:
            columns, malformed, lines = exploded(columns, lists, malformed, lines)

        def read(name: str, kind: Kind) -> pa.Array:
            if name not in columns:
                return read_column(pa.nulls(len(lines)), kind)
            return _named(name, columns[name], kind, self.forms)

        values = {origin.column.name: origin.values(read, len(lines)) for origin in origins}
        if pc.any(malformed).as_py():
            values = {name: pc.if_else(malformed, pa.scalar(None, v.type), v) for name, v in values.items()}
        values[MALFORMED] = malformed
        if ROW in marks:
            bytes_of = {name for origin in origins if origin.column.kind is Kind.BYTES for name in origin.kinds}
            values[ROW] = rows_as_json({name: c for name, c in columns.items() if name not in bytes_of}, lines)
        if HTML in marks:
            values[HTML] = self._has_html(columns, len(lines))
        return pa.RecordBatch.from_pydict(values)

    def _has_html(self, columns: Mapping[str, pa.Array], num_rows: int) -> pa.Array:
        """Whether each row has a text from which HTML is cleaned."""
        found = pa.repeat(False, num_rows)
        if self.forms.clean_html:
            texts = [origin for origin in self.origins if origin.column.kind in (Kind.TEXT, Kind.TEXTS)]
            for name in {name for origin in texts for name in origin.kinds if name in columns}:
                found = pc.or_(found, rows_with_html(columns[name]))
        return found

    def _holds(self, columns: Mapping[str, pa.Array], num_rows: int) -> pa.Array:
        """Whether each row meets every condition. A null meets none."""
        holds = pa.repeat(True, num_rows)
        for name, condition in self.where.items():
            values = columns.get(name, pa.nulls(num_rows))
            holds = pc.and_(holds, meets(values, condition))
        return holds


def open_table(path: Path, columns: Sequence[Column]) -> Table:
    """The table `path`, a file or a folder, with columns of these names. Raises ValueError as `check_table`."""
    return check_table(Table(path, tuple(Stored(column, column.name) for column in columns), tuple(table_files(path))))


def check_table(table: Table, setting: str | None = None) -> Table:
    """The table without its empty parts, after a look at the columns of every part.

    `setting`: the one that names columns, for error messages; None: there is none.
    Raises ValueError naming the file and the column where a required one is missing or has a wrong type.
    """
    if not table.files:
        raise ValueError(f"{table.path} holds no files.")
    present = {file: names for file in table.files if (names := table.names_in(file))}
    if not present:
        raise ValueError(f"{table.path} is empty.")
    for origin in table.origins:
        if origin.column.name not in table.groups:
            for name in origin.kinds:
                none = "" if origin.column.in_every_part else ", null if there is none"
                advice = f" {setting}.{origin.column.name} names your column{none}." if setting else ""
                _require(name, origin.column, present, advice)
    for its_setting, named in (("extract", table.extract), ("where", table.where)):
        for name in named:
            column = Column(name, Kind.TEXT, in_every_part=True)
            _require(name, column, present, f" The setting {its_setting} names it.")
    table = replace(table, files=tuple(present))
    for file in filter(is_parquet, table.files):
        try:
            table.check_types(file)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e
    return table


def _require(name: str, column: Column, present: Mapping[Path, Sequence[str]], advice: str) -> None:
    """Raises ValueError if files lack the column `name`, which `column` is read from, or have it twice."""
    if twice := next((file for file, names in present.items() if names.count(name) > 1), None):
        raise ValueError(f"{twice} has the column {name} twice: which of them counts?")
    without = [file for file, names in present.items() if name not in names]
    is_everywhere_missing = len(without) == len(present) and (column.required or name != column.name)
    if without and (column.in_every_part or is_everywhere_missing):
        names = ", ".join(present[without[0]])
        raise ValueError(f"{without[0]} lacks the column {name}; it has {names}.{advice}")


def _named(name: str, column: pa.Array, kind: Kind, forms: Forms) -> pa.Array:
    try:
        return read_column(column, kind, forms)
    except ValueError as e:
        raise ValueError(f"the column {name} {e}.") from e


def meets(values: pa.Array, condition: str) -> pa.Array:
    """Whether each of `values`, a plain column, meets a condition such as ">= 4"; a null, or no number, does not.

    With a number on its right, the values are numbers; with any other text, they are text.
    """
    operator, right = re.findall(CONDITION, condition)[0]
    compare = {"==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater,
               ">=": pc.greater_equal}[operator]  # fmt: skip
    if re.fullmatch(NUMBER, right.strip()):
        return pc.fill_null(compare(read_column(values, Kind.NUMBER), float(right)), False)
    return pc.fill_null(compare(read_column(values, Kind.NAME), right.strip()), False)


def rows_as_json(columns: Mapping[str, pa.Array], lines: pa.Array) -> pa.Array:
    """The rows of these plain columns as JSON objects: numbers as numbers, all else as text.

    `lines`: a line that is no row becomes {"line": ...}.
    """
    pieces: list[Any] = []
    for name, column in columns.items():
        text = read_text(column)
        value = text if pa.types.is_integer(column.type) else _quoted(text)
        if pa.types.is_floating(column.type):  # JSON has no number for NaN
            value = pc.if_else(pc.is_finite(column), text, value)
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
