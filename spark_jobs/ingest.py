"""Ingestion: raw events split into partitions by time, and the metrics of an ingested log.

Rows without a readable time go to a partition of their own, undated. So do rows with an absurd time: before 1970-01-02
(a clock that was never set) or after 2099.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from notellm2_core.config.source import EVENT_CONTRACT, EventReadingSettings, Partition
from notellm2_core.tables.source import WEIGHT
from spark_jobs.common.tables import counts_by, literal, readable, summed_counts, top_counts, write_partitions
from spark_jobs.source import event_files, read_source_events

UNDATED = "undated"  # the partition of rows without a plausible time
_PLAUSIBLE = ("1970-01-02", "2099-12-31 23:59:59.999999")
_RAW_COLUMNS = ("user_id", "note_id", "event", "timestamp", "malformed", "row")
Span = tuple[date, date]  # days [start, end)


def ingest(
    spark: SparkSession,
    source: Path,
    out: Path,
    unit: Partition,
    files: Sequence[str] | None = None,
    reading: EventReadingSettings = EVENT_CONTRACT,
) -> dict[str, Any]:
    """Raw events -> `out/<partition>/*.parquet`; rows with an unreadable or absurd time -> `out/undated/`.

    A partition is named by its first day (the Sunday, or January 1st). `files`: those of `event_files(source)` to
    ingest; None: all. Returns files, rows {partition: rows}, days {day: rows}, and events
    {name: rows} (`top_counts`). Raises ValueError for a source that cannot be used.
    """
    files = list(files or event_files(source, reading))
    with readable(source):
        ingested = with_partition(read_source_events(spark, source, files, reading), unit)
        write_partitions(ingested, out, "partition", ["timestamp", "user_id", "note_id", "event", "row"])
    if not any(out.rglob("*.parquet")):
        return {"files": files, "rows": {}, "days": {}, "events": {}}
    ingested = spark.read.parquet(*map(literal, sorted(out.iterdir())))
    # A file's folder is its partition.
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


def with_partition(events: DataFrame, unit: Partition = "week") -> DataFrame:
    """Source events with `partition`: the first day of the week or year, or UNDATED without a plausible time."""
    if unit == "week":  # date_trunc's week starts on Monday, ours on Sunday
        first_day = F.date_trunc("week", F.col("timestamp") + F.expr("INTERVAL 1 DAY")) - F.expr("INTERVAL 1 DAY")
    else:
        first_day = F.date_trunc(unit, "timestamp")
    plausible = F.col("timestamp").between(*(F.lit(bound).cast("timestamp") for bound in _PLAUSIBLE))
    partition = F.when(plausible, F.date_format(first_day, "yyyy-MM-dd")).otherwise(UNDATED)
    weight = [WEIGHT.name] if WEIGHT.name in events.columns else []
    return events.select(*_RAW_COLUMNS, *weight, partition.alias("partition"))


def ingestion_metrics(source: Path, ingestions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of a log: the results of `ingest` over all files of `source`, summed up.

    Returns rows, undated (rows), most_undated {file, share}, first_day, last_day, covered_until (see the function),
    events {name: rows}, and partitions [{partition, rows}]. most_undated is the ingestion with the largest share of
    undated rows, named by its first file, so that many good weeks do not hide a broken one. Ingestions under 1 % of the
    usual size are ignored. Raises ValueError for a log without rows, and for one without a readable time.
    """
    rows, days, events = (summed_counts(metrics[key] for metrics in ingestions) for key in ("rows", "days", "events"))
    if not rows:
        raise ValueError(f"the events of {source} have no rows.")
    if not days:
        raise ValueError(
            f"no timestamp of the events of {source} is readable and between {_PLAUSIBLE[0]} and 2099; use Unix "
            "seconds or ISO 8601, or set source.timestamp_format."
        )
    sizes = [sum(metrics["rows"].values()) for metrics in ingestions]
    shares = [
        (-metrics["rows"].get(UNDATED, 0) / size, metrics["files"][0])
        for metrics, size in zip(ingestions, sizes, strict=True)
        if size >= _usual(sizes) / 100
    ]
    share, file = min(shares)  # the first file among equal shares
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
    """The last day with at least 1 % of a usual day's rows (usual: the day of the median row).

    Later rows come from devices with a wrong clock. The median day is no measure of a usual day: a few such devices,
    each on its own day, can account for most of the days.
    """
    usual = _usual(rows_by_day.values())
    return max(day for day, rows in rows_by_day.items() if rows >= usual / 100)


def _usual(sizes: Iterable[int]) -> int:
    """The size of the group that holds the median row."""
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
    """The ingested partitions that overlap the days [start, end), with the days of the overlap; without the undated.

    `partitions`, `first_day`, `last_day`: from `ingestion_metrics`. Raises ValueError where the log ends before `start`
    or begins at `end` or later.
    """
    if not (first_day < str(end) and str(start) <= last_day):
        raise ValueError(
            f"the log reaches from {first_day} to {last_day}, not into the window from {start} to {end} (exclusive): "
            "set window.end (or WEEK, where you named one), window.train_days or window.test_days"
        )
    overlaps = []
    for partition in sorted(p["partition"] for p in partitions if p["partition"] != UNDATED):
        first = date.fromisoformat(partition)
        after = first + timedelta(days=7) if unit == "week" else date(first.year + 1, 1, 1)
        overlaps.append((partition, (max(first, start), min(after, end))))
    return [(partition, days) for partition, days in overlaps if days[0] < days[1]]
