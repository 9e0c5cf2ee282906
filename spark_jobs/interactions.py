"""Interactions: what each user did with each note. All that Eq. 2 needs of the events, and much less than they are.

A partition of the log is reduced once (`reduce_partitions`), whatever windows it is part of later; a window is its
partitions
side by side, less robots and unknown notes (`join_partitions`), which no partition can tell alone. So one user and
note may
stand in several rows: what counts is the first view and the last click of all.
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
from notellm2_core.schema import INTERACTIONS, QUARANTINE, QUARANTINE_TABLE, TEST, TRAIN
from spark_jobs.clean import IGNORED, label_events, split_labelled, within
from spark_jobs.common.tables import added, figures, num_files, read_table, write_partitions, write_table

_Rows = Sequence[Any]  # of Spark
_NUM_NAMES = 20  # of events that are told
_TABLES = {
    "interactions": INTERACTIONS,
    "robots": pa.schema([pa.field("user_id", pa.string(), nullable=False)]),
    "quarantine": QUARANTINE,
}


@dataclass(frozen=True)
class Window:
    """Days [start, end), the reduced partitions that lie in them, and what `reduce_partitions` returned of each."""

    start: date
    end: date
    partitions: Mapping[Path, Mapping[str, Any]]


def interactions(events: DataFrame, settings: EventSettings) -> DataFrame:
    """EVENTS -> INTERACTIONS, a row per event: a view at its time, and a click too where it is one."""
    clicked = F.col("event").isin(*settings.click_events)
    return events.select(
        "user_id",
        "note_id",
        F.col("timestamp").alias("first_view"),
        F.when(clicked, F.col("timestamp")).alias("last_click"),
        F.lit(1).cast("bigint").alias("events"),
        clicked.cast("bigint").alias("clicks"),
        *(c for c in events.columns if c == "partition"),
    )


def reduce_partitions(
    spark: SparkSession,
    ingested: Mapping[str, Path],
    days: Mapping[str, tuple[date, date] | None],
    out: Path,
    settings: EventSettings,
) -> dict[str, dict[str, Any]]:
    """Ingested partitions, by name -> of each `out/NAME/interactions` (INTERACTIONS), `robots` (user_id), `quarantine`.

    A table without rows is not written. `days` [start, end) of a partition are those that count; None: its rows are
    undated, and all go to the quarantine. A user with more than `max_events_per_day` on a day is a robot; its
    interactions are still there.
    Returns of each rows (of the days), ignored_event, dropped {reason: rows}, events {name: rows}, first_day, last_day.
    """
    labelled = reduce(
        DataFrame.union,
        (_labelled(spark, path, days[partition], settings, partition) for partition, path in ingested.items()),
    ).persist()
    events, quarantine = split_labelled(labelled)
    reduced = (
        interactions(events, settings)
        .groupBy("partition", "user_id", "note_id")
        .agg(
            F.min("first_view").alias("first_view"),
            F.max("last_click").alias("last_click"),
            F.sum("events").alias("events"),
            F.sum("clicks").alias("clicks"),
        )
    )
    used = labelled.filter("reason IS NULL OR reason = 'duplicate_event'")
    by_day = used.groupBy("partition", "user_id", F.to_date("timestamp")).count()
    most_by_day = settings.max_events_per_day or 1 << 62
    robots = by_day.filter(F.col("count") > most_by_day).select("partition", "user_id").distinct()
    tables = {"interactions": (reduced, ["user_id", "note_id"]), "robots": (robots, ["user_id"]),
              "quarantine": (quarantine, ["reason", "row"])}  # fmt: skip
    for name, (table, sort) in tables.items():
        write_partitions(table, out / f".{name}", "partition", sort)
        for folder in sorted((out / f".{name}").iterdir()):
            (out / folder.name).mkdir(exist_ok=True)
            folder.rename(out / folder.name / name)
        (out / f".{name}").rmdir()
    by_reason = labelled.groupBy("partition", F.coalesce("reason", F.lit("")).alias("key")).count()
    by_event = labelled.groupBy("partition", F.coalesce("event", F.lit("")).alias("key")).count()
    most = SparkWindow.partitionBy("partition").orderBy(F.desc("count"), "key")  # there may be as many names as rows
    by_event = by_event.withColumn("place", F.row_number().over(most)).filter(F.col("place") <= _NUM_NAMES)
    day = F.date_format("timestamp", "yyyy-MM-dd")
    spans = events.groupBy("partition").agg(F.min(day).alias("first_day"), F.max(day).alias("last_day"))
    found = by_reason.collect(), by_event.collect(), spans.collect()
    counts = {partition: _partition_counts(partition, *found) for partition in ingested}
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
    """Reduced partitions -> `out/train`, `out/test` (INTERACTIONS) and `out/quarantine`. Windows may be equal.

    The interactions of robots (of either window) and those with unknown notes go to the quarantine, a row for each,
    and are counted by their events. Returns rows, ignored_event, dropped {reason: events}, robots (users), and for
    train and test: events, views, clicks, users, notes, first_day, last_day. Raises ValueError for a window without
    events or without clicks.
    """
    parts = {**undated, **train.partitions, **test.partitions}
    robots = _read(spark, parts, "robots").distinct().withColumn("robot", F.lit(True))
    known = read_table(spark, notes).select("note_id", F.lit(True).alias("known"))

    def labelled(partitions: Mapping[Path, Any]) -> DataFrame:
        table = _read(spark, partitions, "interactions").join(robots, "user_id", "left")
        reason = F.when(F.col("robot"), "robot").when(F.isnull("known"), "unknown_note")
        return table.join(known, "note_id", "left").withColumn("reason", reason)

    faulty = labelled(parts).filter("reason IS NOT NULL").persist()
    row = F.to_json(F.struct(*INTERACTIONS.names), {"ignoreNullFields": "false"}).alias("row")
    before = _read(spark, parts, "quarantine").select(QUARANTINE.names)
    write_table(before.union(faulty.select("reason", row)), out / QUARANTINE_TABLE, ["row", "reason"], num_files(spark))
    dropped = added(of["dropped"] for of in parts.values())
    dropped.update({r["reason"]: r["sum(events)"] for r in faulty.groupBy("reason").sum("events").collect()})
    faulty.unpersist()
    counts: dict[str, Any] = {
        "rows": sum(of["rows"] for of in parts.values()),
        IGNORED: sum(of[IGNORED] for of in parts.values()),
        "dropped": dict(dropped.most_common()),
        "robots": robots.count(),
    }
    for name, window in (("train", train), ("test", test)):
        if name == "test" and test == train:
            shutil.copytree(out / TRAIN, out / TEST)
            counts["test"] = counts["train"]
            break
        kept = labelled(window.partitions).filter("reason IS NULL").select(INTERACTIONS.names)
        write_table(kept, out / name, ["user_id", "note_id", "first_view"], num_files(spark))
        counts[name] = _counts(read_table(spark, out / name), window)
        _require(counts, name, window, settings, spark, notes)
    return counts


def _read(spark: SparkSession, parts: Mapping[Path, Any], table: str) -> DataFrame:
    """The rows of this table of all parts; a part without it has none."""
    folders = [part / table for part in parts if (part / table).exists()]
    return read_table(spark, *folders) if folders else spark.createDataFrame([], from_arrow_schema(_TABLES[table]))


def _counts(table: DataFrame, window: Window) -> dict[str, Any]:
    days = {key: [of[key] for of in window.partitions.values() if of[key]] for key in ("first_day", "last_day")}
    sums = figures(
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
    counts: Mapping[str, Any], name: str, window: Window, settings: EventSettings, spark: SparkSession, notes: Path
) -> None:
    """Raises ValueError naming the setting that leaves the window without events, or without clicks."""
    span = f"{window.start} to {window.end} (exclusive)"
    found = ", ".join(added(of["events"] for of in window.partitions.values()))
    if not counts[name]["events"]:
        dropped = added(of["dropped"] for of in window.partitions.values())
        rows = sum(of["rows"] - of[IGNORED] for of in window.partitions.values())
        if rows > dropped.total():  # the window took the rest
            dropped = added([{reason: counts["dropped"].get(reason, 0) for reason in ("robot", "unknown_note")}])
        most = next(iter(dict(dropped.most_common())), "")
        says = f"no usable events in the {name} window, {span}:"
        if most == "unknown_event":
            raise ValueError(
                f"{says} the log's event names are {found}, the settings know {', '.join(settings.event_names)}; set "
                "source.view_events and source.click_events."
            )
        if most == "robot":
            raise ValueError(f"{says} all are of robots; raise source.max_events_per_day.")
        if most == "unknown_note":
            tables = _read(spark, window.partitions, "interactions"), read_table(spark, notes)
            ids = (figures(table, id=F.min("note_id"))["id"] for table in tables)
            raise ValueError(
                f"{says} the log's notes are not in notes.parquet; "
                "a note_id of the log is {!r}, one of notes.parquet {!r}.".format(*ids)
            )
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in dropped.most_common()) or "nothing"
        raise ValueError(f"{says} dropped: {reasons}; set window.end (or WEEK) and window.{name}_days.")
    if not counts[name]["clicks"]:
        raise ValueError(
            f"no clicks in the {name} window, {span}: set source.click_events, now {list(settings.click_events)}, to "
            f"names that occur ({found}), or window.end."
        )
