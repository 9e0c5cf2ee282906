"""The source contract: what a person brings, read as it is and checked where it must hold.

A source is a folder with `notes.parquet` and one of `events.csv.gz`, `events.csv`, `events/` (Parquet). Extra columns
are ignored. A file or column that cannot be used is a ValueError naming it; a row that cannot be used is kept, to be
quarantined with its reason by `spark_jobs.clean`.

A `timestamp` is one of
  - a number: unix time. Seconds below 1e11 in size, milliseconds below 1e14, microseconds below 1e17, nanoseconds
    above. The unit of a number after 1973-03-03 is never mistaken; of earlier ones only seconds are read rightly;
  - a date as eight digits (20250119), as text or as a number;
  - ISO 8601 text: a date, or a date and time with or without an offset (none: UTC);
  - a Parquet timestamp or date of any unit (without a zone: UTC).
Anything else, and any time outside the years 1 to 9999, cannot be placed.
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
_DIGITS = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(\.0*)?$"  # as seconds they would all be of August 1970
_ISO = r"^\d{4}-\d{1,2}-\d{1,2}([T ]\d{1,2}:.*)?$"  # Spark alone would also take a year, or a time of today
_MICROS_OF_YEARS = (-62135596800000000, 253402300799999999)  # 0001-01-01 .. 9999-12-31, what Python can show
MALFORMED = "_corrupt_record"  # Spark's name for it
_CSV = (".csv", ".csv.gz")
_ID_TYPES = (T.StringType, T.ByteType, T.ShortType, T.IntegerType, T.LongType)


def event_files(source: Path) -> list[str]:
    """The files of the log, relative to `source`; in a folder, those that readers of Parquet open.

    Raises ValueError where there is none.
    """
    events = _events(source)
    if not (files := visible_files(events)):
        raise ValueError(f"{events} holds no Parquet files.")
    return [str(file.relative_to(source)) for file in files]


def alike(source: Path, files: Sequence[str]) -> list[list[str]]:
    """Some of the `event_files(source)`, those together whose columns have the same types: Spark reads many files with
    the types of one. Raises ValueError naming a file that is damaged.
    """
    columns = {file: _columns(source / file) for file in files}
    return [list(group) for _, group in groupby(sorted(files, key=lambda f: (columns[f], f)), columns.get)]


def _columns(file: Path) -> str:
    return "" if file.name.endswith(_CSV) else ", ".join(sorted(map(" ".join, _types(file).items())))


def _types(file: Path) -> dict[str, str]:
    """The types of the columns of a Parquet file that a log is made of. INT96 is the old form of nanoseconds."""
    try:
        with pq.ParquetFile(file) as parquet:
            found, stored = parquet.schema_arrow, parquet.schema
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"{file} is damaged, or no Parquet; replace it.") from e
    old = {column.path for column in stored if column.physical_type == "INT96"}
    return {f.name: "INT96" if f.name in old else str(f.type) for f in found if f.name in SOURCE_EVENT_COLUMNS}


def _holds_parquet(folder: Path) -> bool:
    return any(file.suffix == ".parquet" for file in visible_files(folder))


def _read_parquet(spark: SparkSession, path: Path, files: Sequence[Path]) -> DataFrame:
    """All rows of `files`. Folders are read for columns (event=click/) only where files lack them: Spark then ignores
    the files of other folders.
    """
    names = [literal(file) for file in files]
    events = spark.read.parquet(*names).drop(MALFORMED)
    if all(column in events.columns for column in SOURCE_EVENT_COLUMNS) or path.is_file():
        return events
    return spark.read.option("basePath", str(path)).parquet(*names).drop(MALFORMED)


def _read_csv(spark: SparkSession, path: Path) -> DataFrame:
    """All columns as text, and MALFORMED: the line where it has more or fewer fields than the header, else null."""
    form: dict[str, Any] = {"header": True, "quote": '"', "escape": '"'}
    named = spark.read.csv(literal(path), **form)
    _require(named, SOURCE_EVENT_COLUMNS, path)
    columns = T.StructType([*named.schema, T.StructField(MALFORMED, T.StringType())])
    return spark.read.csv(literal(path), columns, columnNameOfCorruptRecord=MALFORMED, **form)


def _events(source: Path) -> Path:
    """The table of events that `source` is, or the one that it holds."""
    is_source = any((source / name).exists() for name in ("notes.parquet", *SOURCE_EVENTS))
    is_table = source.is_file() or (source.is_dir() and not is_source and _holds_parquet(source))
    return source if is_table else find_events(source)


def find_events(source: Path) -> Path:
    """The one file or folder of events in `source`."""
    if not source.exists():
        raise ValueError(f"the source {source} does not exist; set source.path.")
    if not source.is_dir():
        raise ValueError(f"the source {source} is not a folder; set source.path.")
    found = [p for name in SOURCE_EVENTS if (p := source / name).exists()]
    if not found:
        raise ValueError(f"{source} holds no events.csv.gz, events.csv or events/ (Parquet).")
    if len(found) > 1:
        raise ValueError(f"{source} holds both {found[0].name} and {found[1].name}; keep one of them.")
    return found[0]


def read_source_events(spark: SparkSession, source: Path, files: Sequence[str] | None = None) -> DataFrame:
    """The events of `source` as they came; of a CSV every column as text, and MALFORMED.

    `source` is a source folder, or directly a .csv(.gz) file or a folder of Parquet. `files`: which of its
    `event_files`, all `alike`; None: all. Raises ValueError naming the file, and the column that is missing or of the
    wrong type.
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
            if _types(path).get("timestamp", "").startswith("timestamp[ns"):  # which Spark knows as bare numbers only
                micros = F.expr("(timestamp - pmod(timestamp, 1000)) div 1000")
                events = events.withColumn("timestamp", F.timestamp_micros(micros))
    _require(events, SOURCE_EVENT_COLUMNS, path)
    for column in ("user_id", "note_id", "event"):
        events = _typed(events, column, _ID_TYPES, "text or whole numbers", path)
    dated = (T.StringType, T.NumericType, T.TimestampType, T.TimestampNTZType, T.DateType)
    return _typed(events, "timestamp", dated, "text, numbers or timestamps", path)


def event_time(kind: T.DataType) -> Column:
    """The column `timestamp` of type `kind` as a UTC timestamp, or null (see the head of this file)."""
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
        whole = F.when(raw == F.floor(raw), raw.cast("bigint").cast("string"))  # pandas' dates with a missing one
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
    """`notes.parquet` of `source`, plus `position`, the row's place in the file.

    Raises ValueError naming the file, and the column that is missing or of the wrong type.
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
    for column, kind, wanted in zip(SOURCE_IMAGE_COLUMNS, (T.StringType, T.BinaryType), ("text", "bytes"), strict=True):
        if column in notes.columns:
            notes = _typed(notes, column, (kind,), wanted, path)
    return notes


def trimmed(text: Column) -> Column:
    """`text` without white space at its ends; null where nothing is left."""
    return F.nullif(F.btrim(text, F.lit(" \t\r\n")), F.lit(""))


def _require(df: DataFrame, columns: tuple[str, ...], path: Path) -> None:
    if not df.columns:
        raise ValueError(f"{path} is empty.")
    missing = [c for c in columns if c not in df.columns]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]}; it has {', '.join(df.columns)}.")


def _typed(df: DataFrame, column: str, types: tuple[type, ...], wanted: str, path: Path) -> DataFrame:
    """`df` if `column` has one of `types`. Spark reads a column of nulls alone as int: here it is text."""
    kind = df.schema[column].dataType
    if isinstance(kind, types):
        return df
    if isinstance(kind, T.IntegerType) and not df.filter(F.isnotnull(column)).head(1):
        return df.withColumn(column, F.lit(None).cast("string"))
    raise ValueError(f"{path}: the column {column} has type {kind.simpleString()}, not {wanted}.")
