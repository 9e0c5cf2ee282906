"""The rows of JSON Lines: one object a line; a missing key is null, and a line that holds no object is no row."""

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from notellm2_core.tables.columns import Kind, read_column
from notellm2_core.tables.csv_rows import LINE, no_rows
from notellm2_core.tables.forms import Forms

_BATCH_LINES = 50_000
_NAMED_LINES = 1000
_DECODER = json.JSONDecoder()
_VALUES: dict[Kind, tuple[type, ...]] = {
    Kind.ID: (str, int),
    Kind.NAME: (str, int, float, bool),
    Kind.TEXT: (str,),
    Kind.TEXTS: (str, list),
    Kind.PIECES: (str, int, list),
    Kind.TIME: (str, int, float),
    Kind.NUMBER: (str, int, float, bool),
    Kind.PATH: (str, int),
    Kind.BYTES: (),
}


def json_names(stream: pa.NativeFile) -> list[str]:
    """The keys of the first 1,000 lines, in their order: a writer may leave out what is null."""
    names: dict[str, None] = {}
    for _, row in islice(_lines(stream), _NAMED_LINES):
        names |= dict.fromkeys(row) if isinstance(row, dict) else {}
    return list(names)


def json_rows(
    stream: pa.NativeFile, kinds: Mapping[str, Sequence[Kind]], lists: Collection[str], forms: Forms
) -> Iterator[pa.RecordBatch]:
    """The columns of all rows, by their names in the file, and LINE.

    `lists`: columns that may hold lists of their kinds' values. Raises ValueError for a value that a column of its
    kinds cannot have, naming its line.
    """
    lines, is_last = _lines(stream), False
    while not is_last:
        numbers: list[int] = []  # of the lines with an object
        bad: list[str] = []
        values: dict[str, list[Any]] = {name: [] for name in kinds}
        for number, row in islice(lines, _BATCH_LINES):  # no object is kept: the garbage collector would look at each
            if isinstance(row, str):
                bad.append(row)
                continue
            numbers.append(number)
            for name, column in values.items():
                column.append(row.get(name))
        columns = {name: _column(name, k, name in lists, values[name], numbers, forms) for name, k in kinds.items()}
        if numbers:
            yield pa.RecordBatch.from_pydict({**columns, LINE: pa.nulls(len(numbers), pa.string())})
        if bad:
            yield no_rows(bad, list(kinds))
        is_last = not numbers and not bad


def _lines(stream: pa.NativeFile) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of each line that is not empty, and its object; the line itself where it holds none."""
    for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
        if not (line := line.strip()):
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogatepass").strip()
            row, end = _DECODER.raw_decode(text)
            is_object = isinstance(row, dict) and end == len(text)
        except ValueError:
            is_object = False
        yield number, row if is_object else line.decode(errors="replace")


def _column(
    name: str, kinds: Sequence[Kind], may_be_list: bool, values: Sequence[Any], numbers: Sequence[int], forms: Forms
) -> pa.Array:
    """One column of JSON values, from lines of these `numbers`: a list where one of them is, numbers as numbers, any
    mixture as text.
    """
    types = set(map(type, values))
    for kind in kinds:
        allowed = {*_VALUES[kind], *((list,) if may_be_list else ()), type(None)}
        if types <= allowed and list not in types:
            continue  # all of them, without a look at each
        for number, value in zip(numbers, values, strict=True):
            if not _is_allowed(value, tuple(allowed - {type(None)})):
                raise ValueError(f"the column {name} has {json.dumps(value)[:80]} in line {number}, not {kind.value}.")
    if list in types:
        as_list = next((kind for kind in kinds if kind in (Kind.TEXTS, Kind.PIECES)), None)
        lists = [_as_list(value, as_list, forms) for value in values]
        items = _scalars([item for row in lists for item in row or ()])
        as_text = pt.is_string(items.type)
        texts = [row and [i if i is None or not as_text else _text(i) for i in row] for row in lists]
        return pa.array(texts, pa.list_(items.type))
    return _scalars(values)


def _scalars(values: Sequence[Any]) -> pa.Array:
    types = set(map(type, values)) - {type(None)}
    if not types:
        return pa.nulls(len(values))
    if types == {str}:
        return pa.array(values, pa.string())
    if types == {bool}:
        return pa.array(values, pa.bool_())
    if types == {float} or types == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if types == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _is_allowed(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, list):
        items = tuple(kind for kind in types if kind is not list)
        return list in types and all(_is_allowed(item, (*items, int)) for item in value)
    return value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool)))


def _as_list(value: Any, kind: Kind | None, forms: Forms) -> list[Any] | None:
    """A list, or one value as a list: topics that are one text are separated."""
    if value is None or isinstance(value, list):
        return value
    if kind is not None and isinstance(value, str):
        texts: list[Any] | None = read_column(pa.array([value]), kind, forms)[0].as_py()
        return texts
    return [value]
