"""Interactions: the first view and the last click of each user and note, which are all that Eq. 2 needs.

`reduce_partitions` reduces a partition of the log once, for all windows that it will be part of. `join_partitions`
concatenates a window's partitions and drops robots and unknown notes, which a single partition cannot identify. A user
and note may therefore have several rows: the earliest first view and the latest last click count.

A limit between view and click needs every time: a user and note then have a row per time. Weights of clicks need the
last click of each weight: a row per weight, in the column CLICK_WEIGHT.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import Window as SparkWindow
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from notellm2_core.config.data import EventSettings
from notellm2_core.schema import CLICK_WEIGHT, INTERACTIONS, QUARANTINE, QUARANTINE_TABLE, TEST, TRAIN
from spark_jobs.clean import IGNORED, label_events, split_labelled, within
from spark_jobs.common.tables import aggregates, num_files, read_table, summed_counts, write_partitions, write_table

_Rows = Sequence[Any]  # collected from Spark
_NUM_NAMES = 20  # most event names that are reported
_ROBOTS = pa.schema([pa.field("user_id", pa.string(), nullable=False)])


@dataclass(frozen=True)
class Window:
    """Days [start, end), and their reduced partitions: folder -> the metrics that `reduce_partitions` returned."""

    start: date
    end: date
    partitions: Mapping[Path, Mapping[str, Any]]


def interactions(events: DataFrame, settings: EventSettings) -> DataFrame:
    """EVENTS -> INTERACTIONS, one row per event: every event is a view; click events are also a click.

    With `event_weights`, CLICK_WEIGHT is added: the weight of the click, 1 if its event has none.
    """
    clicked = F.col("event").isin(*settings.click_events)
    weight = F.lit(1.0)
    for name, its_weight in (settings.event_weights or {}).items():
        weight = F.when(F.col("event") == name, its_weight).otherwise(weight)
    weights = [] if settings.event_weights is None else [F.when(clicked, weight).alias(CLICK_WEIGHT.name)]
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

    With CLICK_WEIGHT, one for each of its values. With `every_time`, one for each time, with the largest weight.
    """
    keys = [c for c in rows.columns if c in ("partition", "user_id", "note_id")]
    largest = []
    if CLICK_WEIGHT.name in rows.columns:
        if every_time:
            largest.append(F.max(CLICK_WEIGHT.name).alias(CLICK_WEIGHT.name))
        else:
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
    rows = reduced(interactions(events, settings), every_time).select("partition", *_columns(settings).names)
    tables = {"interactions": (rows, _order(rows)), "robots": (robots, ["user_id"]),
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


def join_partitions(
    spark: SparkSession,
    train: Window,
    test: Window,
    undated: Mapping[Path, Mapping[str, Any]],
    notes: Path,
    out: Path,
    settings: EventSettings,
) -> dict[str, Any]:
    """Reduced partitions -> `out/train`, `out/test` (INTERACTIONS) and `out/quarantine`. The windows may be equal.

    A robot in one window is a robot in both. Interactions of robots and with unknown notes go to the quarantine, one
    row each; `dropped` counts their events.

    Returns rows, ignored_event, dropped {reason: events}, robots (users), and for train and test: events, views,
    clicks, users, notes, first_day, last_day. Raises ValueError for a window without events or without clicks.
    """
    all_partitions = {**undated, **train.partitions, **test.partitions}
    columns = _columns(settings)
    robots = _read(spark, all_partitions, "robots", _ROBOTS).distinct().withColumn("robot", F.lit(True))
    note_ids = read_table(spark, notes).select("note_id", F.lit(True).alias("is_known"))

    def labelled(partitions: Mapping[Path, Any]) -> DataFrame:
        table = _read(spark, partitions, "interactions", columns).join(robots, "user_id", "left")
        reason = F.when(F.col("robot"), "robot").when(F.isnull("is_known"), "unknown_note")
        return table.join(note_ids, "note_id", "left").withColumn("reason", reason)

    faulty = labelled(all_partitions).filter("reason IS NOT NULL").persist()
    row = F.to_json(F.struct(*INTERACTIONS.names), {"ignoreNullFields": "false"}).alias("row")
    quarantine = _read(spark, all_partitions, "quarantine", QUARANTINE).select(QUARANTINE.names)
    quarantine = quarantine.union(faulty.select("reason", row))
    write_table(quarantine, out / QUARANTINE_TABLE, ["row", "reason"], num_files(spark))
    dropped = summed_counts(metrics["dropped"] for metrics in all_partitions.values())
    dropped.update(_events_by_reason(faulty))
    faulty.unpersist()
    counts: dict[str, Any] = {
        "rows": sum(metrics["rows"] for metrics in all_partitions.values()),
        IGNORED: sum(metrics[IGNORED] for metrics in all_partitions.values()),
        "dropped": dict(dropped.most_common()),
        "robots": robots.count(),
    }
    for name, window in (("train", train), ("test", test)):
        if name == "test" and test == train:
            shutil.copytree(out / TRAIN, out / TEST)
            counts["test"] = counts["train"]
            break
        table = labelled(window.partitions)
        clean = table.filter("reason IS NULL").select(columns.names)
        write_table(clean, out / name, _order(clean), num_files(spark))
        counts[name] = _counts(read_table(spark, out / name), window)
        _require(counts[name], name, window, settings, table, note_ids)
    return counts


def _columns(settings: EventSettings) -> pa.Schema:
    return INTERACTIONS if settings.event_weights is None else INTERACTIONS.append(CLICK_WEIGHT)


def _order(rows: DataFrame) -> list[str]:
    """The columns that put interactions into one order: those that are no counts."""
    return [c for c in rows.columns if c not in ("partition", "events", "clicks")]


def _read(spark: SparkSession, partitions: Mapping[Path, Any], table: str, columns: pa.Schema) -> DataFrame:
    """The rows of `table` of all partitions; a partition without that table has none."""
    folders = [partition / table for partition in partitions if (partition / table).exists()]
    return read_table(spark, *folders) if folders else spark.createDataFrame([], from_arrow_schema(columns))


def _events_by_reason(labelled: DataFrame) -> dict[str, int]:
    """The number of events of the interactions to drop, by reason."""
    rows = labelled.filter("reason IS NOT NULL").groupBy("reason").sum("events").collect()
    return dict(sorted((r["reason"], r["sum(events)"]) for r in rows))


def _counts(table: DataFrame, window: Window) -> dict[str, Any]:
    partitions = window.partitions.values()
    days = {key: [metrics[key] for metrics in partitions if metrics[key]] for key in ("first_day", "last_day")}
    sums = aggregates(
        table,
        events=F.sum("events"),
        clicks=F.sum("clicks"),
        users=F.count_distinct("user_id"),
        notes=F.count_distinct("note_id"),
    )
    events, clicks = sums["events"] or 0, sums["clicks"] or 0
    return {
        **sums, "events": events, "clicks": clicks, "views": events - clicks,
        "first_day": min(days["first_day"], default=None), "last_day": max(days["last_day"], default=None),
    }  # fmt: skip


def _require(
    counts: Mapping[str, Any],
    name: str,
    window: Window,
    settings: EventSettings,
    labelled: DataFrame,
    note_ids: DataFrame,
) -> None:
    """Raises ValueError naming the setting that leaves the window without events, or without clicks.

    `counts`: what `_counts` returned for the window. `labelled`: its interactions with the `reason` to drop them.
    """
    span = f"{window.start} to {window.end} (exclusive)"
    partitions = window.partitions.values()
    event_names = ", ".join(summed_counts(metrics["events"] for metrics in partitions))
    if not counts["events"]:
        # The valid rows, which joining the partitions dropped. Without any: the rows that reducing them dropped.
        dropped = summed_counts([_events_by_reason(labelled)])
        if not dropped:
            dropped = summed_counts(metrics["dropped"] for metrics in partitions)
        reason = next(iter(dict(dropped.most_common())), "")
        problem = f"no usable events in the {name} window, {span}:"
        if reason == "unknown_event":
            raise ValueError(
                f"{problem} the log's event names are {event_names}, the settings know "
                f"{', '.join(settings.event_names)}; set source.view_events and source.click_events."
            )
        if reason == "robot":
            raise ValueError(
                f"{problem} most are of robots ({dropped['robot']} of {dropped.total()} valid rows); raise "
                "source.max_events_per_day."
            )
        if reason == "unknown_note":
            ids = (aggregates(table, id=F.min("note_id"))["id"] for table in (labelled, note_ids))
            raise ValueError(
                f"{problem} the log's notes are not among the notes; "
                "a note_id of the log is {!r}, one of the notes {!r}.".format(*ids)
            )
        reasons = ", ".join(f"{rows} {key}" for key, rows in dropped.most_common()) or "nothing"
        raise ValueError(f"{problem} dropped: {reasons}; set window.end (or WEEK) and window.{name}_days.")
    if not counts["clicks"]:
        raise ValueError(
            f"no clicks in the {name} window, {span}: set source.click_events, now {list(settings.click_events)}, to "
            f"names that occur ({event_names}), or window.end."
        )
