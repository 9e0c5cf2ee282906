"""The source contract: what a person brings, read as it is and checked where it must hold.

A source is a folder with `notes.parquet` and one of `events.csv.gz`, `events.csv`, `events/` (Parquet). Extra columns
are ignored. A file or column that cannot be used is a ValueError naming it; a row that cannot be used is kept, to be
quarantined with its reason by `spark_jobs.clean`.

A `timestamp` is one of
  - a number: unix time. Seconds below 1e11 in size, milliseconds below 1e14, microseconds below 1e17, nanoseconds
    above. The unit of a time after 1973-03-03 is never mistaken; of earlier ones only seconds are read rightly;
  - a date as eight digits (20250119), as text or as a number;
  - ISO 8601 text: a date, or a date and time with or without an offset (none: UTC);
  - a Parquet timestamp or date (without a zone: UTC).
Anything else, and any time outside the years 1 to 9999, cannot be placed. What `land` also refuses to place are absurd
times: before 1970-01-02, as of a clock that was never set, and from 2100 on.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from notellm2_core.schema import SOURCE_EVENT_COLUMNS, SOURCE_EVENTS, SOURCE_IMAGE_COLUMNS, SOURCE_NOTE_COLUMNS
from spark_jobs.tables import added, counts_by, readable, top_counts, write_partitions

UNDATED = "undated"  # the partition of rows whose time cannot be read
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_DIGITS = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$"  # as seconds they would all be of August 1970
_ISO = r"^\d{4}-\d{1,2}-\d{1,2}([T ]\d{1,2}:.*)?$"  # Spark alone would also take a year, or a time of today
_MICROS_OF_YEARS = (-62135596800000000, 253402300799999999)  # 0001-01-01 .. 9999-12-31, what Python can show
_PLAUSIBLE = ("1970-01-02", "2099-12-31 23:59:59.999999")
Partition = Literal["week", "year"]
Span = tuple[date, date]  # days [start, end)
_ID_TYPES = (T.StringType, T.ByteType, T.ShortType, T.IntegerType, T.LongType)


def land(
    spark: SparkSession,
    source: Path,
    out: Path,
    partition: Partition,
    files: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Place raw events in time: `out/<period>/*.parquet`, what has no readable or an absurd time in `out/undated/`.

    A period is named by its first day (the Sunday, or January 1st). `files`: which of `event_files(source)`; None: all.
    Returns rows {period: rows}, days {day: rows}, and events {name: rows} (`top_counts`). Raises ValueError for a
    source that cannot be used.
    """
    with readable(find_events(source)):
        landed = land_events(read_source_events(spark, source, files or event_files(source)), partition)
        absurd = ~F.col("timestamp").between(*(F.lit(bound).cast("timestamp") for bound in _PLAUSIBLE))
        placed = landed.withColumn("period", F.when(absurd, UNDATED).otherwise(F.col("period")))
        write_partitions(placed, out, "period", ["timestamp", "user_id", "note_id", "event", "row"])
    if not any(out.rglob("*.parquet")):
        return {"rows": {}, "days": {}, "events": {}}
    landed = spark.read.parquet(*(str(p) for p in sorted(out.iterdir())))
    # One row per file that Spark opened: its folder is the period.
    landed = landed.withColumn("period", F.element_at(F.split(F.col("_metadata.file_path"), "/"), -2))
    day = F.when(F.col("period") != UNDATED, F.date_format("timestamp", "yyyy-MM-dd"))
    days = counts_by(landed.withColumn("day", day), "day")
    days.pop("", None)
    return {"rows": counts_by(landed, "period"), "days": days, "events": top_counts(landed, "event")}


def landed_figures(source: Path, landings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `land` returned of all files of `source`, together.

    Returns rows, undated rows, first and last day, up to which day the log covers (`covered_until`), rows by event
    name, and the periods with their rows. Raises ValueError for a log without rows, or without a time that can be read.
    """
    rows, days, events = (added(of[key] for of in landings) for key in ("rows", "days", "events"))
    if not rows:
        raise ValueError(f"{find_events(source)} holds no rows.")
    if not days:
        raise ValueError(
            f"no timestamp of {find_events(source)} can be read and lies between {_PLAUSIBLE[0]} and 2099; it takes "
            "Unix seconds or ISO 8601."
        )
    return {
        "rows": sum(rows.values()),
        "undated": rows[UNDATED],
        "first_day": min(days),
        "last_day": max(days),
        "covered_until": covered_until(days),
        "events": dict(sorted(events.items(), key=lambda item: (-item[1], item[0]))),
        "periods": [{"period": period, "rows": rows[period]} for period in sorted(rows) if rows[period]],
    }


def covered_until(rows_by_day: Mapping[str, int]) -> str:
    """The last day with at least a hundredth of the rows of a usual day: the one that the median row lies in.

    A log ends there, whatever devices with a wrong clock have written after it. The median day would not do: a few of
    them, each on a day of its own, can be most of the days.
    """
    sizes = sorted(rows_by_day.values())
    below = list(accumulate(sizes))
    usual = sizes[bisect_left(below, below[-1] / 2)]
    return max(day for day, rows in rows_by_day.items() if rows >= usual / 100)


def periods_between(
    start: date,
    end: date,
    partition: Partition,
    periods: Sequence[Mapping[str, Any]],
    first_day: str,
    last_day: str,
    **others: Any,
) -> list[tuple[str, Span]]:
    """The landed periods with days in [start, end), each with those days; the undated rows are in no period.

    `periods`, `first_day`, `last_day`: as `landed_figures` returned them. Raises ValueError where the log ends before
    the days, or begins after them.
    """
    if not (first_day < str(end) and str(start) <= last_day):
        raise ValueError(
            f"the log reaches from {first_day} to {last_day}, not into the window from {start} to {end} (exclusive): "
            "set window.end (or WEEK, where you named one), window.train_days or window.test_days"
        )
    found = []
    for period in sorted(p["period"] for p in periods if p["period"] != UNDATED):
        first = date.fromisoformat(period)
        after = first + timedelta(days=7) if partition == "week" else date(first.year + 1, 1, 1)
        found.append((period, (max(first, start), min(after, end))))
    return [(period, days) for period, days in found if days[0] < days[1]]


def event_files(source: Path) -> list[str]:
    """The files of the log, relative to `source`; in a folder, those that readers of Parquet open."""
    return [str(file.relative_to(source)) for file in _visible_files(find_events(source))]


def _visible_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [Path(folder) / name for name in files if not name.startswith((".", "_"))]
    return sorted(found)


def _read_parquet(spark: SparkSession, path: Path, files: Sequence[Path]) -> DataFrame:
    """All rows of `files`. Folders are read for columns (event=click/) only where files lack them: Spark then ignores
    the files of other folders.
    """
    names = [re.sub(r"([\\*?{}\[\]])", r"\\\1", str(file)) for file in files]  # which Spark takes for patterns
    events = spark.read.parquet(*names)
    if all(column in events.columns for column in SOURCE_EVENT_COLUMNS) or path.is_file():
        return events
    return spark.read.option("basePath", str(path)).parquet(*names)


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
    """The events of `source` as they came, every column of a CSV as text.

    `source` is a source folder, or directly a .csv(.gz) file or a folder of Parquet. `files`: which of its
    `event_files`; None: all. Raises ValueError naming the file, and the column that is missing or of the wrong type.
    """
    is_table = source.is_file() or (any(source.glob("*.parquet")) and not (source / "notes.parquet").exists())
    path = source if is_table else find_events(source)
    with readable(path):
        if path.name.endswith((".csv", ".csv.gz")):
            events = spark.read.csv(str(path), header=True, quote='"', escape='"')
        elif path.is_dir() and not any(path.rglob("*.parquet")):
            raise ValueError(f"{path} holds no Parquet files.")
        else:
            chosen = [source / file for file in files] if files is not None else _visible_files(path)
            events = _read_parquet(spark, path, chosen)
    _require(events, SOURCE_EVENT_COLUMNS, path)
    for column in ("user_id", "note_id", "event"):
        events = _typed(events, column, _ID_TYPES, "text or whole numbers", path)
    dated = (T.StringType, T.NumericType, T.TimestampType, T.TimestampNTZType, T.DateType)
    return _typed(events, "timestamp", dated, "text, numbers or timestamps", path)


def land_events(events: DataFrame, partition: Partition = "week") -> DataFrame:
    """Source events -> user_id, note_id, event (trimmed; "" is null), timestamp (UTC; null: unreadable), row, period.

    `row` is the whole row as it came, in JSON.
    """
    if partition == "week":  # date_trunc's week starts on Monday, ours on Sunday
        first_day = F.date_trunc("week", F.col("timestamp") + F.expr("INTERVAL 1 DAY")) - F.expr("INTERVAL 1 DAY")
    else:
        first_day = F.date_trunc(partition, "timestamp")
    period = F.date_format(first_day, "yyyy-MM-dd")
    return events.select(
        *(trimmed(F.col(c).cast("string")).alias(c) for c in ("user_id", "note_id", "event")),
        _time(events.schema["timestamp"].dataType).alias("timestamp"),
        F.to_json(F.struct("*"), {"ignoreNullFields": "false"}).alias("row"),
    ).withColumn("period", F.coalesce(period, F.lit(UNDATED)))


def _time(kind: T.DataType) -> Column:
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
        micros = _unix_micros(raw.cast("double"))
    return F.timestamp_micros(F.when(micros.between(*_MICROS_OF_YEARS), micros))


def _or_eight_digits(text: Column, otherwise: Column) -> Column:
    return F.when(text.rlike(_DIGITS), F.unix_micros(F.try_to_timestamp(text, F.lit("yyyyMMdd")))).otherwise(otherwise)


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
        notes = spark.read.parquet(str(path))
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
