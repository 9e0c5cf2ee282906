"""The rows of JSON Lines: one object a line; a missing key is null, and a line that holds no object is no row."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from notellm2_core.tables.columns import Kind, topics_of_text
from notellm2_core.tables.csv_rows import LINE, no_rows

_BATCH_LINES = 50_000
_NAMED_LINES = 1000
_VALUES: dict[Kind, tuple[type, ...]] = {
    Kind.ID: (str, int),
    Kind.TEXT: (str,),
    Kind.TEXTS: (str, list),
    Kind.TIME: (str, int, float),
    Kind.BYTES: (),
}


def json_names(stream: pa.NativeFile) -> list[str]:
    """The keys of the first 1,000 lines, in their order: a writer may leave out what is null."""
    names: dict[str, None] = {}
    for _, row in islice(_lines(stream), _NAMED_LINES):
        names |= dict.fromkeys(row) if isinstance(row, dict) else {}
    return list(names)


def json_rows(stream: pa.NativeFile, kinds: Mapping[str, Kind]) -> Iterator[pa.RecordBatch]:
    """The columns of all rows, by their names in the file, and LINE.

    Raises ValueError for a value that a column of its kind cannot have, naming its line.
    """
    lines = _lines(stream)
    while chunk := list(islice(lines, _BATCH_LINES)):
        rows = [(number, row) for number, row in chunk if isinstance(row, dict)]
        columns = {name: _column(name, kind, rows) for name, kind in kinds.items()}
        yield pa.RecordBatch.from_pydict({**columns, LINE: pa.nulls(len(rows), pa.string())})
        if bad := [row for _, row in chunk if isinstance(row, str)]:
            yield no_rows(bad, list(kinds))


def _lines(stream: pa.NativeFile) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of each line that is not empty, and its object; the line itself where it holds none."""
    for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield number, row if isinstance(row, dict) else line.decode(errors="replace").rstrip("\r\n")


def _column(name: str, kind: Kind, rows: Sequence[tuple[int, dict[str, Any]]]) -> pa.Array:
    """One column of JSON values: lists as lists of text, numbers as numbers, any mixture as text."""
    values = [row.get(name) for _, row in rows]
    for (number, _), value in zip(rows, values, strict=True):
        if not _is_allowed(value, _VALUES[kind]):
            raise ValueError(f"the column {name} has {json.dumps(value)[:80]} in line {number}, not {kind.value}.")
    if all(value is None for value in values):
        return pa.nulls(len(values))
    if kind is Kind.TEXTS:
        return pa.array([_texts(value) for value in values], pa.list_(pa.string()))
    types = {type(value) for value in values if value is not None}
    if types == {float} or types == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if types == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _is_allowed(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, list):
        return list in types and all(_is_allowed(item, (str, int)) for item in value)
    return value is None or (isinstance(value, types) and not isinstance(value, bool))


def _texts(value: str | list[Any] | None) -> Sequence[str | None] | None:
    if isinstance(value, list):
        return [None if item is None else str(item) for item in value]
    return topics_of_text(value)
