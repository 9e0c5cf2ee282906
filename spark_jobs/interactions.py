"""Interactions: the first view and the last click of each user and note, which are all that Eq. 2 needs.

`reduce_partitions` reduces a partition of the log once, for all windows that it will be part of;
`spark_jobs.window.join_partitions` concatenates a window's partitions. A user and note may therefore have several rows:
the earliest first view and the latest last click count.

A limit between view and click needs every time: a user and note then have a row per time. Weights of clicks, in the
column CLICK_WEIGHT, need the clicks that no later one outweighs: a row for each of them.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import Window as SparkWindow
from pyspark.sql import functions as F

from notellm2_core.config.source import EventSettings
from notellm2_core.schema import CLICK_WEIGHT, INTERACTIONS
from notellm2_core.tables.log import IGNORED
from notellm2_core.tables.source import WEIGHT
from spark_jobs.clean import label_events, split_labelled, within
from spark_jobs.common.tables import read_table, write_partitions

_Rows = Sequence[Any]  # collected from Spark
_NUM_NAMES = 20  # most event names that are reported


def interactions(events: DataFrame, settings: EventSettings) -> DataFrame:
    """EVENTS -> INTERACTIONS, one row per event: every event is a view; click events are also a click.

    With `event_weights` or the column WEIGHT, CLICK_WEIGHT is added: the weight of the click's event, 1 if it has none,
    times the weight of its row. A click of weight 0 is a view and no click.
    """
    has_column = WEIGHT.name in events.columns
    weight = F.lit(1.0)
    for name, its_weight in (settings.event_weights or {}).items():
        weight = F.when(F.col("event") == name, its_weight).otherwise(weight)
    weight = weight * F.col(WEIGHT.name) if has_column else weight
    clicked = F.col("event").isin(*settings.click_events) & (weight > 0)
    is_weighted = has_column or settings.event_weights is not None
    weights = [F.when(clicked, weight).alias(CLICK_WEIGHT.name)] if is_weighted else []
    return events.select(
        "user_id",
        "note_id",
        F.col("timestamp").alias("first_view"),
        F.when(clicked, F.col("timestamp")).alias("last_click"),
        F.lit(1).cast("bigint").alias("events"),
        clicked.cast("bigint").alias("clicks"),
        *weights,
        *(c for c in events.columns if c == "partition"),
    )


def reduced(rows: DataFrame, every_time: bool) -> DataFrame:
    """`interactions`, one row per event -> one row per partition, user and note.

    With CLICK_WEIGHT, one for each click that no later one outweighs: the other rows join the next of these. With
    `every_time`, one for each time, with the largest weight.
    """
    keys = [c for c in rows.columns if c in ("partition", "user_id", "note_id")]
    largest = []
    if CLICK_WEIGHT.name in rows.columns:
        if every_time:
            largest.append(F.max(CLICK_WEIGHT.name).alias(CLICK_WEIGHT.name))
        else:
            from_last = SparkWindow.partitionBy(*keys).orderBy(F.desc_nulls_last("last_click"))
            rows = rows.withColumn(CLICK_WEIGHT.name, F.max(CLICK_WEIGHT.name).over(from_last))
            keys.append(CLICK_WEIGHT.name)
    if every_time:
        keys.append("first_view")
    else:
        largest.append(F.min("first_view").alias("first_view"))
    return rows.groupBy(*keys).agg(
        *largest,
        F.max("last_click").alias("last_click"),
        F.sum("events").alias("events"),
        F.sum("clicks").alias("clicks"),
    )


def reduce_partitions(
    spark: SparkSession,
    ingested: Mapping[str, Path],
    days: Mapping[str, tuple[date, date] | None],
    out: Path,
    settings: EventSettings,
    every_time: bool = False,
) -> dict[str, dict[str, Any]]:
    """Ingested partitions by name -> `out/NAME/interactions` (INTERACTIONS), `robots` (user_id), `quarantine` for each.

    Tables without rows are not written. `days`: the days [start, end) of each partition that count; None: the rows are
    undated, and all go to the quarantine. A user with more than `max_events_per_day` events on a day is a robot. Its
    interactions are written, and `join_partitions` drops them. `every_time`: see `reduced`.

    Returns for each partition rows (on the days), ignored_event, dropped {reason: rows}, events {name: rows},
    first_day and last_day.
    """
    labelled = reduce(
        DataFrame.union,
        (_labelled(spark, path, days[partition], settings, partition) for partition, path in ingested.items()),
    ).persist()
    events, quarantine = split_labelled(labelled)
    with_duplicates = labelled.filter("reason IS NULL OR reason = 'duplicate_event'")
    by_day = with_duplicates.groupBy("partition", "user_id", F.to_date("timestamp")).count()
    max_by_day = settings.max_events_per_day or 1 << 62
    robots = by_day.filter(F.col("count") > max_by_day).select("partition", "user_id").distinct()
    rows = reduced(interactions(events, settings), every_time)
    rows = rows.select("partition", *interaction_columns(rows))
    tables = {"interactions": (rows, sort_columns(rows)), "robots": (robots, ["user_id"]),
              "quarantine": (quarantine, ["reason", "row"])}  # fmt: skip
    for name, (table, sort) in tables.items():
        write_partitions(table, out / f".{name}", "partition", sort)
        for folder in sorted((out / f".{name}").iterdir()):
            (out / folder.name).mkdir(exist_ok=True)
            folder.rename(out / folder.name / name)
        (out / f".{name}").rmdir()
    by_reason = labelled.groupBy("partition", F.coalesce("reason", F.lit("")).alias("key")).count()
    by_event = labelled.groupBy("partition", F.coalesce("event", F.lit("")).alias("key")).count()
    most = SparkWindow.partitionBy("partition").orderBy(F.desc("count"), "key")  # every row may have another name
    by_event = by_event.withColumn("rank", F.row_number().over(most)).filter(F.col("rank") <= _NUM_NAMES)
    day = F.date_format("timestamp", "yyyy-MM-dd")
    spans = events.groupBy("partition").agg(F.min(day).alias("first_day"), F.max(day).alias("last_day"))
    collected = by_reason.collect(), by_event.collect(), spans.collect()
    counts = {partition: _partition_counts(partition, *collected) for partition in ingested}
    labelled.unpersist()
    return counts


def _labelled(
    spark: SparkSession, path: Path, days: tuple[date, date] | None, settings: EventSettings, partition: str
) -> DataFrame:
    raw = read_table(spark, path)
    if days is not None:
        raw = raw.filter(within(*days))
    return label_events(raw, settings, dated=days is not None).withColumn("partition", F.lit(partition))


def _partition_counts(partition: str, by_reason: _Rows, by_event: _Rows, spans: _Rows) -> dict[str, Any]:
    reasons, events = (
        {
            r["key"]: r["count"]
            for r in sorted(rows, key=lambda r: (-r["count"], r["key"]))
            if r["partition"] == partition
        }
        for rows in (by_reason, by_event)
    )
    span = next((r for r in spans if r["partition"] == partition), {"first_day": None, "last_day": None})
    return {
        "rows": sum(reasons.values()),
        IGNORED: reasons.get(IGNORED, 0),
        "dropped": {reason: rows for reason, rows in reasons.items() if reason not in ("", IGNORED)},
        "events": events,
        "first_day": span["first_day"],
        "last_day": span["last_day"],
    }


def interaction_columns(rows: DataFrame) -> list[str]:
    """The columns of INTERACTIONS, and CLICK_WEIGHT if `rows` has it."""
    return [c for c in (*INTERACTIONS.names, CLICK_WEIGHT.name) if c in rows.columns]


def sort_columns(rows: DataFrame) -> list[str]:
    """The columns that put interactions into one order: those that are no counts."""
    return [c for c in rows.columns if c not in ("partition", "events", "clicks")]
