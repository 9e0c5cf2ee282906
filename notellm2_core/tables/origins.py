"""Where the values of a column come from: a column of the files, several of them, a pattern, or a setting."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.config.source import PATTERN_FIELD
from notellm2_core.tables.columns import CANONICAL, Column, Kind

Read = Callable[[str, Kind], pa.Array]  # the values of a column of the files, null where the file lacks it
Entry = str | tuple[str, ...] | None  # of `source.columns`


@dataclass(frozen=True)
class Origin(ABC):
    """Where the values of `column` come from."""

    column: Column

    @property
    @abstractmethod
    def kinds(self) -> Mapping[str, Kind]:
        """The columns of the files that are read, each with what it has to hold."""

    @abstractmethod
    def __str__(self) -> str:
        """Where the values come from, for people to read."""

    @abstractmethod
    def values(self, read: Read, num_rows: int) -> pa.Array:
        """The values [num_rows], in the column's canonical type."""


@dataclass(frozen=True)
class Stored(Origin):
    """One column of the files."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {self.name: self.column.kind}

    def values(self, read: Read, num_rows: int) -> pa.Array:
        return read(self.name, self.column.kind)


@dataclass(frozen=True)
class Joined(Origin):
    """Several columns: one list of all their texts, or one text with a space between them."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.names)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return dict.fromkeys(self.names, self._kind)

    @property
    def _kind(self) -> Kind:
        return self.column.kind if self.column.kind is Kind.TEXTS else Kind.PIECES

    def values(self, read: Read, num_rows: int) -> pa.Array:
        columns = [read(name, self._kind).to_pylist() for name in self.names]
        rows = [[text for texts in row for text in texts or ()] for row in zip(*columns, strict=True)]
        if self.column.kind is Kind.TEXTS:
            return pa.array(rows, self.column.canonical)
        return pa.array([" ".join(row) or None for row in rows], self.column.canonical)


@dataclass(frozen=True)
class Pattern(Origin):
    """A text with the values of columns in it, such as images/{item_id:.3}/{item_id}.jpg; null if one of them is."""

    pattern: str

    def __str__(self) -> str:
        return self.pattern

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {field[1]: Kind.ID for field in PATTERN_FIELD.finditer(self.pattern)}

    def values(self, read: Read, num_rows: int) -> pa.Array:
        pieces: list[pa.Array | str] = []
        end = 0
        for field in PATTERN_FIELD.finditer(self.pattern):
            value = read(field[1], Kind.ID)
            value = value if field[2] is None else pc.utf8_slice_codeunits(value, 0, int(field[2]))
            pieces += [self.pattern[end : field.start()], value]
            end = field.end()
        return pc.binary_join_element_wise(*pieces, self.pattern[end:], "")


@dataclass(frozen=True)
class Constant(Origin):
    """The same value in all rows; None: there is no such column."""

    value: str | None

    def __str__(self) -> str:
        return "none" if self.value is None else f"always {self.value}"

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {}

    def values(self, read: Read, num_rows: int) -> pa.Array:
        return pa.repeat(pa.scalar(self.value, CANONICAL[self.column.kind]), num_rows)


def origin(column: Column, columns: Mapping[str, Entry]) -> Origin:
    """Where `column` comes from, by the setting `source.columns`."""
    entry = columns.get(column.name, column.name)
    if entry is None:
        return Constant(column, None)
    if not isinstance(entry, str):
        return Joined(column, tuple(entry))
    if column.name == "image_path" and PATTERN_FIELD.search(entry):
        return Pattern(column, entry)
    return Stored(column, entry)


def stored_kinds(origins: Sequence[Origin]) -> dict[str, tuple[Kind, ...]]:
    """The columns of the files that `origins` read, each with what it has to hold, for every use of it."""
    kinds: dict[str, tuple[Kind, ...]] = {}
    for each in origins:
        for name, kind in each.kinds.items():
            kinds[name] = tuple(dict.fromkeys((*kinds.get(name, ()), kind)))
    return kinds
