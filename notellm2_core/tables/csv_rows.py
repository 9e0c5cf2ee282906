"""The rows of a CSV or TSV: all values are text, columns go by the names in the header.

A field in quotes may contain delimiters and line breaks (RFC 4180). A line with too many or too few fields is no row.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

LINE = "_line"  # the line of a text file that is no row; null: a row
BLOCK_BYTES = 8 << 20  # the longest row
_HEADER_BYTES = 1 << 20
_FIRST_ROWS = 100


@dataclass(frozen=True)
class CsvLayout:
    """How CSV files are laid out, where they differ from RFC 4180."""

    delimiter: str | None = None  # None: by the file's name
    header: tuple[str, ...] | None = None  # the columns of files without a header line
    quote: str | None = '"'  # None: no field is quoted
    escape: str | None = None  # the character before a quote in a quoted field; None: quotes are doubled
    null_values: tuple[str, ...] = ()  # fields that hold no value, besides empty ones and \N


RFC_4180 = CsvLayout()


def csv_names(stream: pa.NativeFile, layout: CsvLayout) -> list[str]:
    """The names of the columns; [] for an empty file.

    Raises ValueError where the first rows all have another number of fields than the header.
    """
    start = stream.read(_HEADER_BYTES)
    text = io.StringIO(start.decode("utf-8-sig", errors="replace"), newline="")
    delimiter = layout.delimiter or ","
    reader = csv.reader(
        text, delimiter=delimiter, escapechar=layout.escape, doublequote=layout.escape is None,
        quotechar=layout.quote, quoting=csv.QUOTE_NONE if layout.quote is None else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    try:
        rows = [row for row in islice(reader, _FIRST_ROWS) if row]
    except csv.Error:  # a field of over 128 kB: the header alone
        text.seek(0)
        rows = [next(reader)]
    if not rows:
        return []
    names, rows = (rows[0], rows[1:]) if layout.header is None else (list(layout.header), rows)
    if len(start) == _HEADER_BYTES:
        rows = rows[:-1]  # which may be cut
    sizes = {len(row) for row in rows}
    if len(rows) > 1 and len(names) not in sizes:
        escaped = " Backslashes before quotes are read with the setting escape." if '\\"' in text.getvalue() else ""
        raise ValueError(
            f"the header has {len(names)} columns, and the first row has {len(rows[0])}: "
            f"{delimiter.join(names)[:200]} / {delimiter.join(rows[0])[:200]}.{escaped}"
        )
    return names


def csv_rows(stream: pa.NativeFile, layout: CsvLayout, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns `names` of all rows as text, and LINE.

    Empty fields, `\\N` and the layout's null values are null. A repeated header is no row.
    """
    bad_lines: list[str] = []

    def collect(row: pacsv.InvalidRow) -> str:
        bad_lines.extend(str(row.text).splitlines() or [""])  # an open quote swallows lines: each of them counts
        return "skip"

    reader = pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=layout.header),
        parse_options=pacsv.ParseOptions(
            delimiter=layout.delimiter or ",", newlines_in_values=layout.quote is not None,
            invalid_row_handler=collect, quote_char=layout.quote or False,
            escape_char=layout.escape or False, double_quote=layout.escape is None,
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(names), column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True,
            null_values=["", r"\N", *layout.null_values], check_utf8=False,
        ),
    )  # fmt: skip
    for batch in reader:
        if names and pc.any(is_header := _is_header(batch)).as_py():
            bad_lines += [(layout.delimiter or ",").join(names)] * pc.sum(is_header).as_py()
            batch = batch.filter(pc.invert(is_header))
        yield batch.append_column(LINE, pa.nulls(len(batch), pa.string()))
        if bad_lines:
            yield no_rows(bad_lines, names)
            bad_lines.clear()
    if bad_lines:
        yield no_rows(bad_lines, names)


def _is_header(batch: pa.RecordBatch) -> pa.Array:
    """Whether each row has the names of the columns as its values, as between files that were put together."""
    is_name = [pc.fill_null(pc.equal(batch.column(name), name), False) for name in batch.schema.names]
    return reduce(pc.and_, is_name)


def no_rows(lines: Sequence[str], names: Sequence[str]) -> pa.RecordBatch:
    """Nulls for lines that are no rows, and the lines."""
    nulls = {name: pa.nulls(len(lines)) for name in names}  # of no type: the column may be one of bytes
    return pa.RecordBatch.from_pydict({**nulls, LINE: pa.array(lines, pa.string())})
