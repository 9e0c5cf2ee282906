"""The interactions of the training and of the test window, from the reduced partitions of the log.

Robots and unknown notes are dropped here, because a single partition cannot identify them.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from notellm2_core.config.source import EventSettings
from notellm2_core.schema import CLICK_WEIGHT, INTERACTIONS, QUARANTINE, QUARANTINE_TABLE, TEST, TRAIN
from notellm2_core.tables.log import IGNORED, summed_counts
from notellm2_core.tables.windows import no_clicks, no_events
from spark_jobs.common.tables import aggregates, num_files, read_table, write_table
from spark_jobs.interactions import interaction_columns, sort_columns

_ROBOTS = pa.schema([pa.field("user_id", pa.string(), nullable=False)])


@dataclass(frozen=True)
class Window:
    """Days [start, end), and their reduced partitions: folder -> the metrics that `reduce_partitions` returned."""

    start: date
    end: date
    partitions: Mapping[Path, Mapping[str, Any]]


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
    robots = _read(spark, all_partitions, "robots", _ROBOTS).distinct().withColumn("robot", F.lit(True))
    note_ids = read_table(spark, notes).select("note_id", F.lit(True).alias("is_known"))

    def labelled(partitions: Mapping[Path, Any]) -> DataFrame:
        table = _read(spark, partitions, "interactions", INTERACTIONS).join(robots, "user_id", "left")
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
        clean = table.filter("reason IS NULL").select(interaction_columns(table))
        write_table(clean, out / name, sort_columns(clean), num_files(spark))
        counts[name] = _counts(read_table(spark, out / name), window)
        _require(counts[name], name, window, settings, table, note_ids)
    return counts


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
    span = (window.start, window.end)
    partitions = window.partitions.values()
    event_names = list(summed_counts(metrics["events"] for metrics in partitions))
    if not counts["events"]:
        # The valid rows, which joining the partitions dropped. Without any: the rows that reducing them dropped.
        dropped = summed_counts([_events_by_reason(labelled)])
        if not dropped:
            dropped = summed_counts(metrics["dropped"] for metrics in partitions)

        def example_ids() -> tuple[str, str]:
            of_log, of_notes = (aggregates(table, id=F.min("note_id"))["id"] for table in (labelled, note_ids))
            return of_log, of_notes

        raise ValueError(no_events(name, span, settings, dropped, event_names, example_ids))
    if not counts["clicks"]:
        raise ValueError(no_clicks(name, span, settings, event_names, CLICK_WEIGHT.name in labelled.columns))
