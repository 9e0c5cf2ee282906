"""Ingestion: raw events split into partitions by time.

Rows without a readable time go to a partition of their own, undated. So do rows with an absurd time: before 1970-01-02
(a clock that was never set) or after 2099.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from notellm2_core.config.source import EVENT_CONTRACT, EventReadingSettings, Partition
from notellm2_core.tables.log import PLAUSIBLE, UNDATED
from notellm2_core.tables.source import WEIGHT
from spark_jobs.common.tables import counts_by, literal, readable, top_counts, write_partitions
from spark_jobs.source import event_files, read_source_events

_RAW_COLUMNS = ("user_id", "note_id", "event", "timestamp", "malformed", "row")


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
    plausible = F.col("timestamp").between(*(F.lit(bound).cast("timestamp") for bound in PLAUSIBLE))
    partition = F.when(plausible, F.date_format(first_day, "yyyy-MM-dd")).otherwise(UNDATED)
    weight = [WEIGHT.name] if WEIGHT.name in events.columns else []
    return events.select(*_RAW_COLUMNS, *weight, partition.alias("partition"))
