"""The source contract: the files that the user brings, how they are read, and what is checked.

A source is a folder with `notes.parquet` and one of `events.csv.gz`, `events.csv`, `events/` (Parquet). Extra columns
are ignored. An unusable file or column raises a ValueError naming it; unusable rows are read, and `spark_jobs.clean`
quarantines them with a reason.

A `timestamp` is one of
  - a number: Unix time in seconds (absolute value below 1e11), milliseconds (below 1e14), microseconds (below 1e17) or
    nanoseconds. The unit is unambiguous for times after 1973-03-03; earlier times are read correctly only in seconds;
  - a date as eight digits (20250119), as text or as a number;
  - ISO 8601 text: a date, or a date and time with or without an offset (none: UTC);
  - a Parquet timestamp or date of any unit (without a zone: UTC).
Any other value, and any time outside the years 1 to 9999, is unreadable.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from notellm2_core.schema import SOURCE_EVENT_COLUMNS, SOURCE_EVENTS, SOURCE_IMAGE_COLUMNS, SOURCE_NOTE_COLUMNS
from spark_jobs.common.tables import literal, readable, visible_files

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_DIGITS = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(\.0*)?$"  # as seconds, all would be in August 1970
_ISO = r"^\d{4}-\d{1,2}-\d{1,2}([T ]\d{1,2}:.*)?$"  # Spark alone also accepts a bare year or time of day
_MICROS_OF_YEARS = (-62135596800000000, 253402300799999999)  # 0001-01-01 .. 9999-12-31, the range of Python's datetime
MALFORMED = "_corrupt_record"  # Spark's name for it
_CSV = (".csv", ".csv.gz")
_ID_TYPES = (T.StringType, T.ByteType, T.ShortType, T.IntegerType, T.LongType)


def event_files(source: Path) -> list[str]:
    """The files of the log, relative to `source`; in a folder, those that Parquet readers open.

    Raises ValueError where the folder holds no such file.
    """
    events = _events(source)
    if not (files := visible_files(events)):
        raise ValueError(f"{events} holds no Parquet files.")
    return [str(file.relative_to(source)) for file in files]


def files_by_types(source: Path, files: Sequence[str]) -> list[list[str]]:
    """`files`, of `event_files(source)`, grouped by equal column types: Spark reads many files with the types of one.

    Raises ValueError naming a damaged file.
    """
    columns = {file: _columns(source / file) for file in files}
    return [list(group) for _, group in groupby(sorted(files, key=lambda f: (columns[f], f)), columns.get)]


def _columns(file: Path) -> str:
    return "" if file.name.endswith(_CSV) else ", ".join(sorted(map(" ".join, _types(file).items())))


def _types(file: Path) -> dict[str, str]:
    """The types of a Parquet file's event columns, by name. INT96 is the legacy timestamp in nanoseconds."""
    try:
        with pq.ParquetFile(file) as parquet:
            columns, stored = parquet.schema_arrow, parquet.schema
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"{file} is damaged, or no Parquet; replace it.") from e
    int96 = {column.path for column in stored if column.physical_type == "INT96"}
    return {f.name: "INT96" if f.name in int96 else str(f.type) for f in columns if f.name in SOURCE_EVENT_COLUMNS}


def _holds_parquet(folder: Path) -> bool:
    return any(file.suffix == ".parquet" for file in visible_files(folder))


def _read_parquet(spark: SparkSession, path: Path, files: Sequence[Path]) -> DataFrame:
    """All rows of `files`. Folder names (event=click/) become columns only if the files lack these columns.

    The reason: given partition folders, Spark ignores the files outside them.
    """
    names = [literal(file) for file in files]
    events = spark.read.parquet(*names).drop(MALFORMED)
    if all(column in events.columns for column in SOURCE_EVENT_COLUMNS) or path.is_file():
        return events
    return spark.read.option("basePath", str(path)).parquet(*names).drop(MALFORMED)


def _read_csv(spark: SparkSession, path: Path) -> DataFrame:
    """All columns as text, and MALFORMED: the line if its number of fields differs from the header's, else null."""
    options: dict[str, Any] = {"header": True, "quote": '"', "escape": '"'}
    header = spark.read.csv(literal(path), **options)
    _require(header, SOURCE_EVENT_COLUMNS, path)
    columns = T.StructType([*header.schema, T.StructField(MALFORMED, T.StringType())])
    return spark.read.csv(literal(path), columns, columnNameOfCorruptRecord=MALFORMED, **options)


def _events(source: Path) -> Path:
    """`source` if it is a table of events, else the table of events in it."""
    is_source = any((source / name).exists() for name in ("notes.parquet", *SOURCE_EVENTS))
    is_table = source.is_file() or (source.is_dir() and not is_source and _holds_parquet(source))
    return source if is_table else find_events(source)


def find_events(source: Path) -> Path:
    """The one file or folder of events in `source`. Raises ValueError where there is none, or more than one."""
    if not source.exists():
        raise ValueError(f"the source {source} does not exist; set source.path.")
    if not source.is_dir():
        raise ValueError(f"the source {source} is not a folder; set source.path.")
    tables = [p for name in SOURCE_EVENTS if (p := source / name).exists()]
    if not tables:
        raise ValueError(f"{source} holds no events.csv.gz, events.csv or events/ (Parquet).")
    if len(tables) > 1:
        raise ValueError(f"{source} holds both {tables[0].name} and {tables[1].name}; leave one of them there.")
    return tables[0]


def read_source_events(spark: SparkSession, source: Path, files: Sequence[str] | None = None) -> DataFrame:
    """The unchanged events of `source`; from a CSV, all columns are text, and MALFORMED is added.

    `source`: a source folder, a .csv(.gz) file, or a folder of Parquet. `files`: those of its `event_files` to read,
    with equal types (`files_by_types`); None: all. Raises ValueError naming the file, and the column that is missing or
    has the wrong type.
    """
    path = _events(source)
    with readable(path):
        if path.name.endswith(_CSV):
            events = _read_csv(spark, path)
        elif path.is_dir() and not _holds_parquet(path):
            raise ValueError(f"{path} holds no Parquet files.")
        else:
            chosen = [source / file for file in files] if files is not None else visible_files(path)
            events = _read_parquet(spark, path, chosen)
            path = chosen[0]
            if _types(path).get("timestamp", "").startswith("timestamp[ns"):  # Spark reads nanoseconds as bare integers
                micros = F.expr("(timestamp - pmod(timestamp, 1000)) div 1000")
                events = events.withColumn("timestamp", F.timestamp_micros(micros))
    _require(events, SOURCE_EVENT_COLUMNS, path)
    for column in ("user_id", "note_id", "event"):
        events = _typed(events, column, _ID_TYPES, "text or whole numbers", path)
    dated = (T.StringType, T.NumericType, T.TimestampType, T.TimestampNTZType, T.DateType)
    return _typed(events, "timestamp", dated, "text, numbers or timestamps", path)


def event_time(kind: T.DataType) -> Column:
    """The column `timestamp`, of type `kind`, as a UTC timestamp; null if unreadable (see the module docstring)."""
    raw = F.col("timestamp")
    if isinstance(kind, T.TimestampType | T.TimestampNTZType | T.DateType):
        micros = F.unix_micros(raw.cast("timestamp"))
    elif isinstance(kind, T.StringType):
        text = trimmed(raw)
        iso = F.when(text.rlike(_ISO), F.unix_micros(text.try_cast("timestamp")))
        number = F.when(text.rlike(_NUMBER), _unix_micros(text.try_cast("double"))).otherwise(iso)
        micros = _or_eight_digits(text, number)
    elif isinstance(kind, T.IntegralType):
        micros = _or_eight_digits(raw.cast("string"), _unix_micros(raw.cast("double")))
    else:
        whole = F.when(
            raw == F.floor(raw), raw.cast("bigint").cast("string")
        )  # pandas stores dates as floats if one is missing
        micros = _or_eight_digits(whole, _unix_micros(raw.cast("double")))
    return F.timestamp_micros(F.when(micros.between(*_MICROS_OF_YEARS), micros))


def _or_eight_digits(text: Column, otherwise: Column) -> Column:
    return F.when(
        text.rlike(_DIGITS), F.unix_micros(F.try_to_timestamp(F.substring(text, 1, 8), F.lit("yyyyMMdd")))
    ).otherwise(otherwise)


def _unix_micros(number: Column) -> Column:
    size = F.abs(number)
    per_second = F.when(size < 1e11, 1e6).when(size < 1e14, 1e3).when(size < 1e17, 1.0).otherwise(1e-3)
    return F.round(number * per_second).try_cast("bigint")


def read_source_notes(spark: SparkSession, source: Path) -> DataFrame:
    """`notes.parquet` of `source`, plus `position`, which orders the rows as in the file.

    Raises ValueError naming the file, and the column that is missing or has the wrong type.
    """
    path = source / "notes.parquet"
    if not path.exists():
        raise ValueError(f"{source} holds no notes.parquet; set source.path to a folder that does.")
    with readable(path):
        notes = spark.read.parquet(literal(path))
    _require(notes, SOURCE_NOTE_COLUMNS, path)
    notes = notes.withColumn("position", F.struct("_metadata.file_path", "_metadata.row_index"))
    notes = _typed(notes, "note_id", _ID_TYPES, "text or whole numbers", path)
    for column in ("title", "content"):
        notes = _typed(notes, column, (T.StringType,), "text", path)
    notes = _typed(notes, "topics", (T.StringType, T.ArrayType), "text or a list of texts", path)
    topics = notes.schema["topics"].dataType
    if isinstance(topics, T.ArrayType) and not isinstance(topics.elementType, (*_ID_TYPES, T.NullType)):
        raise ValueError(f"{path}: the column topics has type {topics.simpleString()}, not a list of texts.")
    for column, kind, expected in zip(
        SOURCE_IMAGE_COLUMNS, (T.StringType, T.BinaryType), ("text", "bytes"), strict=True
    ):
        if column in notes.columns:
            notes = _typed(notes, column, (kind,), expected, path)
    return notes


def trimmed(text: Column) -> Column:
    """`text` without white space at its ends; null if empty."""
    return F.nullif(F.btrim(text, F.lit(" \t\r\n")), F.lit(""))


def _require(df: DataFrame, columns: tuple[str, ...], path: Path) -> None:
    if not df.columns:
        raise ValueError(f"{path} is empty.")
    missing = [c for c in columns if c not in df.columns]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]}; it has {', '.join(df.columns)}.")


def _typed(df: DataFrame, column: str, types: tuple[type, ...], expected: str, path: Path) -> DataFrame:
    """`df`, where `column` has one of `types`. A column of nulls alone, which Spark reads as int, becomes text.

    Raises ValueError for another type.
    """
    kind = df.schema[column].dataType
    if isinstance(kind, types):
        return df
    if isinstance(kind, T.IntegerType) and not df.filter(F.isnotnull(column)).head(1):
        return df.withColumn(column, F.lit(None).cast("string"))
    raise ValueError(f"{path}: the column {column} has type {kind.simpleString()}, not {expected}.")
