"""The file formats of a user's tables: which files are its parts, which columns a part has, and its rows.

Parquet, CSV, TSV and JSON Lines are read; the text formats also compressed by gzip, bzip2 or zstd. A reader yields
Arrow batches of the requested columns in their stored types, and LINE.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.runtime.files import is_hidden
from notellm2_core.tables.columns import Kind
from notellm2_core.tables.csv_rows import BLOCK_BYTES, LINE, RFC_4180, CsvLayout, csv_names, csv_rows
from notellm2_core.tables.forms import USUAL_FORMS, Forms
from notellm2_core.tables.json_rows import json_names, json_rows

FORMATS = "Parquet, CSV (.csv), TSV (.tsv) and JSON Lines (.jsonl), the last three also as .gz, .bz2 or .zst"
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_NAMES = {".parquet": "Parquet", ".csv": "CSV", ".tsv": "TSV", **dict.fromkeys(_JSON_LINES, "JSON Lines")}
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_ROWS, _IMAGE_ROWS = 1 << 16, 1 << 8  # rows of Parquet in memory at a time
_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata": "Iceberg"}


@dataclass(frozen=True)
class Split:
    """What one task reads: a file, or one row group of a Parquet file. `first_row`: the number of rows before it."""

    file: Path
    group: int | None = None
    first_row: int = 0


def table_files(path: Path, layout: CsvLayout = RFC_4180) -> list[Path]:
    """The parts of a table: the file `path` itself, or all visible files below the folder `path`, sorted.

    Raises ValueError for a table format whose files are no rows by themselves, and for a file of no format of FORMATS.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.is_file():
        _format(path, layout)
        return [path]
    files: list[Path] = []
    for folder, folders, names in os.walk(path, followlinks=True):
        _refuse_logs(Path(folder), folders)
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [Path(folder) / name for name in names if not is_hidden(name)]
    for file in files:
        _format(file, layout)
    return sorted(files)


def _refuse_logs(folder: Path, folders: Collection[str]) -> None:
    for log, name in _LOGS.items():
        if log in folders and (name != "Iceberg" or any((folder / log).glob("*.metadata.json"))):
            raise ValueError(
                f"{folder} is a table of {name}, whose log decides which of its files count. It is not read: export it "
                "as plain Parquet."
            )


def _format(file: Path, layout: CsvLayout = RFC_4180) -> str:
    """The suffix of the format, without that of its compression. A layout makes a file of any other name a CSV.

    Raises ValueError for a file of another format.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in _COMPRESSIONS
    kind = suffixes[-2 if is_compressed else -1] if len(suffixes) > is_compressed else ""
    if kind in _DELIMITERS or kind in _JSON_LINES:
        return kind
    if (kind in (".parquet", ".pq") and not is_compressed) or _starts_like_parquet(file):
        return ".parquet"
    if layout != RFC_4180:
        return ".csv"
    raise ValueError(f"{file} has none of the formats that are read: {FORMATS}.")


def format_name(file: Path, layout: CsvLayout = RFC_4180) -> str:
    """The format of a table's part for people to read, such as `CSV (gzip)`."""
    suffix = _format(file, layout)
    compression = None if suffix == ".parquet" else _COMPRESSIONS.get(file.suffix.lower())
    return _NAMES[suffix] + (f" ({compression})" if compression else "")


def _starts_like_parquet(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def splits(file: Path) -> list[Split]:
    """The parts of a file that tasks can read side by side. Raises ValueError for a damaged Parquet file."""
    if not is_parquet(file):
        return [Split(file)]
    with parquet_file(file) as parquet:
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return [Split(file, group, sum(rows[:group])) for group in range(len(rows))]


def is_table_file(file: Path) -> bool:
    """Whether the name or the start of `file` says that it has one of FORMATS."""
    try:
        _format(file)
    except ValueError:
        return False
    return True


def is_parquet(file: Path) -> bool:
    """Whether `file`, one of `table_files`, is Parquet."""
    return _format(file, CsvLayout(delimiter=",")) == ".parquet"


def parquet_file(file: Path) -> pq.ParquetFile:
    """The open Parquet file. Raises ValueError naming it where it is damaged."""
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"{file} is damaged, or no Parquet ({_first_line(e)}).") from e


def column_types(file: Path) -> list[tuple[str, pa.DataType]]:
    """The columns of a Parquet file with their types. Raises ValueError for a damaged file."""
    with parquet_file(file) as parquet:
        return list(zip(parquet.schema_arrow.names, parquet.schema_arrow.types, strict=True))


def column_names(file: Path, folder: Path, layout: CsvLayout = RFC_4180) -> list[str]:
    """The columns of a part of the table in `folder`; partition folders (event=click/) are columns, too.

    An empty text file has none. Raises ValueError for a damaged file.
    """
    names = [name for name, _ in column_types(file)] if is_parquet(file) else _text_names(file, layout)
    return names and names + [name for name in partition_values(file, folder) if name not in names]


def partition_values(file: Path, folder: Path) -> dict[str, str | None]:
    """The columns that the names of folders below `folder` give: event=click/ is event = "click" in its files.

    As Spark and Hive write them: special characters are percent-encoded, and null has a name.
    """
    parts = file.relative_to(folder).parts[:-1] if file != folder else ()
    values = dict(part.split("=", 1) for part in parts if "=" in part)
    return {unquote(name): None if value == _HIVE_NULL else unquote(value) for name, value in values.items()}


@dataclass(frozen=True)
class Reading:
    """What is read of a file, and how.

    `kinds`: columns of the file, each with what it has to hold. `lists`: those that may hold lists of it.
    """

    kinds: Mapping[str, Sequence[Kind]]
    lists: Collection[str] = ()
    layout: CsvLayout = RFC_4180
    forms: Forms = USUAL_FORMS


def read_split(split: Split, reading: Reading, folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of `split` in file order: the columns of `reading` in their stored types, and LINE.

    Columns that the file lacks are left out. Raises ValueError naming the file if it is damaged, or a value of JSON
    that its column cannot have.
    """
    kinds = reading.kinds
    constants = partition_values(split.file, folder)
    names = column_names(split.file, split.file, reading.layout)
    if _format(split.file, reading.layout) in _JSON_LINES:  # a key may come first in a later line
        names = [name for name in kinds if name in names or name not in constants]
    stored = {name: kinds[name] for name in names if name in kinds}
    try:
        for batch in _stored_rows(split, replace(reading, kinds=stored)):
            for name in kinds:
                if name in constants and name not in stored:
                    batch = batch.append_column(name, pa.repeat(pa.scalar(constants[name], pa.string()), len(batch)))
            yield batch
    except (OSError, EOFError, pa.ArrowException) as e:
        raise ValueError(unreadable(split.file, e)) from e


def _stored_rows(split: Split, reading: Reading) -> Iterator[pa.RecordBatch]:
    kind = _format(split.file, reading.layout)
    if kind == ".parquet":
        with parquet_file(split.file) as parquet:
            groups = [*range(parquet.num_row_groups)] if split.group is None else [split.group]
            has_images = any(Kind.BYTES in kinds for kinds in reading.kinds.values())
            rows, names = _IMAGE_ROWS if has_images else _ROWS, list(reading.kinds)
            for batch in parquet.iter_batches(rows, row_groups=groups, columns=names, use_threads=False):
                yield batch.append_column(LINE, pa.nulls(len(batch), pa.string()))
        return
    with open_text(split.file) as stream:
        if kind in _DELIMITERS:
            yield from csv_rows(stream, _layout(kind, reading.layout), list(reading.kinds))
        else:
            yield from json_rows(stream, reading.kinds, reading.lists, reading.forms)


def open_text(file: Path) -> pa.NativeFile:
    """The bytes of a text file, decompressed as its name says."""
    return pa.input_stream(str(file), compression=_COMPRESSIONS.get(file.suffix.lower()))


def _layout(kind: str, layout: CsvLayout) -> CsvLayout:
    return layout if layout.delimiter else replace(layout, delimiter=_DELIMITERS[kind])


def _text_names(file: Path, layout: CsvLayout) -> list[str]:
    """The columns of a CSV, TSV or JSON Lines file; [] for an empty one. Raises ValueError for a damaged one."""
    kind = _format(file, layout)
    try:
        with open_text(file) as stream:
            return csv_names(stream, _layout(kind, layout)) if kind in _DELIMITERS else json_names(stream)
    except (OSError, EOFError) as e:
        raise ValueError(unreadable(file, e)) from e
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def unreadable(file: Path, error: Exception) -> str:
    """One sentence on a file that cannot be read to its end."""
    text = _first_line(error)
    if "all lists to be of size" in text:  # apache/arrow's reader of Parquet, as of version 25
        return f"{file} has lists of a fixed size, some of them null, which Arrow cannot read: write plain lists."
    if "straddling object" in text or "out of sync" in text:
        return f"{file} has a row of more than {BLOCK_BYTES >> 20} MB: a quote in it is opened and never closed."
    return f"{file} is damaged, or not of the format its name says ({text})."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
