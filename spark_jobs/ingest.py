"""Ingestion: raw events placed in time, partition by partition, and what is known of a ingested log.

What cannot be placed is kept apart as undated: rows without a readable time, and those with an absurd one, before
1970-01-02 (a clock that was never set) or from 2100 on.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from notellm2_core.config.data import Partition
from notellm2_core.schema import SOURCE_EVENT_COLUMNS
from spark_jobs.common.tables import added, counts_by, literal, readable, top_counts, write_partitions
from spark_jobs.source import MALFORMED, event_files, event_time, find_events, read_source_events, trimmed

UNDATED = "undated"  # the partition of rows that cannot be placed
_PLAUSIBLE = ("1970-01-02", "2099-12-31 23:59:59.999999")
Span = tuple[date, date]  # days [start, end)


def ingest(
    spark: SparkSession,
    source: Path,
    out: Path,
    unit: Partition,
    files: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Place raw events in time: `out/<partition>/*.parquet`, what has no readable or an absurd time in `out/undated/`.

    A partition is named by its first day (the Sunday, or January 1st). `files`: which of `event_files(source)`; None:
    all.
    Returns files, rows {partition: rows}, days {day: rows}, and events {name: rows} (`top_counts`). Raises ValueError
    for a source that cannot be used.
    """
    files = list(files or event_files(source))
    with readable(find_events(source)):
        ingested = ingest_events(read_source_events(spark, source, files), unit)
        absurd = ~F.col("timestamp").between(*(F.lit(bound).cast("timestamp") for bound in _PLAUSIBLE))
        placed = ingested.withColumn("partition", F.when(absurd, UNDATED).otherwise(F.col("partition")))
        write_partitions(placed, out, "partition", ["timestamp", "user_id", "note_id", "event", "row"])
    if not any(out.rglob("*.parquet")):
        return {"files": files, "rows": {}, "days": {}, "events": {}}
    ingested = spark.read.parquet(*map(literal, sorted(out.iterdir())))
    # One row per file that Spark opened: its folder is the partition.
    ingested = ingested.withColumn("partition", F.element_at(F.split(F.col("_metadata.file_path"), "/"), -2))
    day = F.when(F.col("partition") != UNDATED, F.date_format("timestamp", "yyyy-MM-dd"))
    days = counts_by(ingested.withColumn("day", day), "day")
    days.pop("", None)
    return {
        "files": files,
        "rows": counts_by(ingested, "partition"),
        "days": days,
        "events": top_counts(ingested, "event"),
    }


def ingest_events(events: DataFrame, unit: Partition = "week") -> DataFrame:
    """Source events -> user_id, note_id, event (trimmed; "" is null), timestamp (UTC; null: unreadable), malformed, row
    and partition.

    `row` is the row as it came, in JSON: the columns of the contract, or the line of a CSV with more or fewer fields
    than its header. Of such a malformed one, or one with bytes that are no UTF-8, nothing else is read.
    """
    line = F.col(MALFORMED) if MALFORMED in events.columns else F.lit(None).cast("string")
    as_it_came = F.to_json(F.struct(*SOURCE_EVENT_COLUMNS), {"ignoreNullFields": "false"})
    ids = {c: trimmed(F.col(c).cast("string")) for c in ("user_id", "note_id", "event")}
    read = ids | {"timestamp": event_time(events.schema["timestamp"].dataType)}
    malformed = F.isnotnull(line) | F.concat_ws("", *ids.values()).contains("\ufffd")  # what Spark makes of such bytes
    if unit == "week":  # date_trunc's week starts on Monday, ours on Sunday
        first_day = F.date_trunc("week", F.col("timestamp") + F.expr("INTERVAL 1 DAY")) - F.expr("INTERVAL 1 DAY")
    else:
        first_day = F.date_trunc(unit, "timestamp")
    partition = F.date_format(first_day, "yyyy-MM-dd")
    return events.select(
        *(F.when(~malformed, value).alias(name) for name, value in read.items()),
        malformed.alias("malformed"),
        F.when(F.isnull(line), as_it_came).otherwise(F.to_json(F.struct(line.alias("line")))).alias("row"),
    ).withColumn("partition", F.coalesce(partition, F.lit(UNDATED)))


def ingestion_metrics(source: Path, ingestions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `ingest` returned of all files of `source`, together.

    Returns rows, undated rows, and the file (the first of those ingested together) with the largest share of them: a
    week
    that is broken must not hide behind good years, but ingestions of a hundredth of the usual size are not looked at.
    Also first and last day, up to which day the log covers (`covered_until`), rows by event name, and the partitions
    with
    their rows. Raises ValueError for a log without rows, or without a time that can be read.
    """
    rows, days, events = (added(of[key] for of in ingestions) for key in ("rows", "days", "events"))
    if not rows:
        raise ValueError(f"{find_events(source)} holds no rows.")
    if not days:
        raise ValueError(
            f"no timestamp of {find_events(source)} can be read and lies between {_PLAUSIBLE[0]} and 2099; it takes "
            "Unix seconds or ISO 8601."
        )
    sizes = [sum(of["rows"].values()) for of in ingestions]
    shares = [
        (-of["rows"].get(UNDATED, 0) / size, of["files"][0])
        for of, size in zip(ingestions, sizes, strict=True)
        if size >= _usual(sizes) / 100
    ]
    share, file = min(shares)  # of equal shares the first file
    return {
        "rows": sum(rows.values()),
        "undated": rows[UNDATED],
        "most_undated": {"file": file, "share": -share},
        "first_day": min(days),
        "last_day": max(days),
        "covered_until": covered_until(days),
        "events": dict(sorted(events.items(), key=lambda item: (-item[1], item[0]))),
        "partitions": [
            {"partition": partition, "rows": rows[partition]} for partition in sorted(rows) if rows[partition]
        ],
    }


def covered_until(rows_by_day: Mapping[str, int]) -> str:
    """The last day with at least a hundredth of the rows of a usual day: the one that the median row lies in.

    A log ends there, whatever devices with a wrong clock have written after it. The median day would not do: a few of
    them, each on a day of its own, can be most of the days.
    """
    usual = _usual(rows_by_day.values())
    return max(day for day, rows in rows_by_day.items() if rows >= usual / 100)


def _usual(sizes: Iterable[int]) -> int:
    """The size of the part that the median row lies in."""
    ordered = sorted(sizes)
    below = list(accumulate(ordered))
    return ordered[bisect_left(below, below[-1] / 2)]


def partitions_between(
    start: date,
    end: date,
    unit: Partition,
    partitions: Sequence[Mapping[str, Any]],
    first_day: str,
    last_day: str,
    **others: Any,
) -> list[tuple[str, Span]]:
    """The ingested partitions with days in [start, end), each with those days; the undated rows are in no partition.

    `partitions`, `first_day`, `last_day`: as `ingestion_metrics` returned them. Raises ValueError where the log ends
    before
    the days, or begins after them.
    """
    if not (first_day < str(end) and str(start) <= last_day):
        raise ValueError(
            f"the log reaches from {first_day} to {last_day}, not into the window from {start} to {end} (exclusive): "
            "set window.end (or WEEK, where you named one), window.train_days or window.test_days"
        )
    found = []
    for partition in sorted(p["partition"] for p in partitions if p["partition"] != UNDATED):
        first = date.fromisoformat(partition)
        after = first + timedelta(days=7) if unit == "week" else date(first.year + 1, 1, 1)
        found.append((partition, (max(first, start), min(after, end))))
    return [(partition, days) for partition, days in found if days[0] < days[1]]
