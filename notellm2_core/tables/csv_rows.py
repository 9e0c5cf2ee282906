"""The rows of a CSV or TSV: all values are text, columns go by the names in the header.

A field in quotes may contain delimiters and line breaks (RFC 4180). A line with too many or too few fields is no row.
"""

import csv
import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv as pacsv

LINE = "_line"  # the line of a text file that is no row; null: a row
BLOCK_BYTES = 8 << 20  # the longest row
_HEADER_BYTES = 1 << 20


def csv_names(stream: pa.NativeFile, delimiter: str) -> list[str]:
    """The names in the header; [] for an empty file."""
    start = stream.read(_HEADER_BYTES).decode("utf-8-sig", errors="replace")
    return next((row for row in csv.reader(io.StringIO(start), delimiter=delimiter) if row), [])


def csv_rows(stream: pa.NativeFile, delimiter: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns `names` of all rows, as text, and LINE. Empty fields and `\\N` are null."""
    bad_lines: list[str] = []

    def collect(row: pacsv.InvalidRow) -> str:
        bad_lines.extend(str(row.text).splitlines() or [""])  # an open quote swallows lines: each of them counts
        return "skip"

    reader = pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=collect),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(names), column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True,
            null_values=["", r"\N"], check_utf8=False,
        ),
    )  # fmt: skip
    for batch in reader:
        yield batch.append_column(LINE, pa.nulls(len(batch), pa.string()))
        if bad_lines:
            yield no_rows(bad_lines, names)
            bad_lines.clear()
    if bad_lines:
        yield no_rows(bad_lines, names)


def no_rows(lines: Sequence[str], names: Sequence[str]) -> pa.RecordBatch:
    """Nulls for lines that are no rows, and the lines."""
    nulls = {name: pa.nulls(len(lines), pa.string()) for name in names}
    return pa.RecordBatch.from_pydict({**nulls, LINE: pa.array(lines, pa.string())})
