"""Several events in one row: lists, and texts that a regular expression takes apart."""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.tables.columns import plain_column, read_text, valid_utf8

Columns = dict[str, pa.Array]


def extracted(texts: pa.Array, pattern: str) -> tuple[Columns, pa.Array]:
    """The named groups of `pattern` as columns: a list with an item for each match; and which texts have no match.

    The lists of null and blank texts are null.
    """
    expression = re.compile(pattern)
    groups: dict[str, list[list[str | None] | None]] = {name: [] for name in expression.groupindex}
    has_none = []
    for text in texts.to_pylist():
        matches = [match.groupdict() for match in expression.finditer(text or "")]
        is_blank = not (text and text.strip())
        has_none.append(not matches and not is_blank)
        for name, rows in groups.items():
            rows.append(None if is_blank else [match[name] for match in matches])
    lists = {name: pa.array(rows, pa.list_(pa.string())) for name, rows in groups.items()}
    return lists, pa.array(has_none, pa.bool_())


def exploded(
    columns: Columns, lists: Sequence[str], malformed: pa.Array, lines: pa.Array
) -> tuple[Columns, pa.Array, pa.Array]:
    """A row for each item of the columns `lists`; the other columns, `malformed` and `lines` are repeated.

    An empty list gives no row, a null one a row with null. Lists of one row that differ in length make it malformed;
    so does a row that is malformed already: it stays one row, with its lists as text.
    """
    lengths = [pc.fill_null(pc.list_value_length(columns[name]), 1) for name in lists]
    for length in lengths[1:]:
        malformed = pc.or_(malformed, pc.not_equal(lengths[0], length))
    whole, split = malformed, pc.invert(malformed)
    rows = pa.array(range(len(lines)), pa.int64())
    items: Columns = {}
    parents = rows.filter(split)
    for name in lists:
        column = columns[name].filter(split)
        if column.null_count:
            column = pc.coalesce(column, pa.scalar([None], column.type))
        parents = rows.filter(split).take(pc.list_parent_indices(column))
        items[name], _ = valid_utf8(plain_column(pc.list_flatten(column)))
    order = pa.concat_arrays([parents, rows.filter(whole)])
    result = {}
    for name, column in columns.items():
        if name not in items:
            result[name] = column.take(order)
        elif len(parents) == len(order):
            result[name] = items[name]
        else:
            result[name] = pa.concat_arrays([read_text(items[name]), read_text(column.filter(whole))])
    return result, malformed.take(order), lines.take(order)
