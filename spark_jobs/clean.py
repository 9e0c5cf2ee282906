"""Notes and events: validate, quarantine with a reason, deduplicate. Nothing is dropped without being counted.

`clean_notes` and `label_events` are pure; `prepare_notes` reads, writes and counts. `spark_jobs.interactions` and
`spark_jobs.cooccurrence` use `label_events`.
"""

from datetime import date
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from notellm2_core.config.source import MAX_WEIGHT, NOTE_CONTRACT, EventSettings, NoteReadingSettings
from notellm2_core.schema import EVENTS, NOTES, NOTES_TABLE, QUARANTINE, QUARANTINE_TABLE
from notellm2_core.tables.log import IGNORED
from notellm2_core.tables.source import WEIGHT
from spark_jobs.common.tables import aggregates, counts_by, read_table, readable, write_table
from spark_jobs.source import read_source_notes


def prepare_notes(
    spark: SparkSession,
    source: Path,
    out: Path,
    reading: NoteReadingSettings = NOTE_CONTRACT,
    posted: Path | None = None,
) -> dict[str, Any]:
    """The notes of `source` -> `out/notes` (NOTES) and `out/quarantine`. posted: a file of POSTED; its notes replace or
    delete those of `source`.

    Returns rows, html_rows (from whose texts HTML was cleaned), notes, with_text, with_image (a path or bytes), dropped
    {reason: rows}; with `posted`, also posted (its living notes), replaced and deleted (rows of `source`). Raises
    ValueError where no note is usable.
    """
    with readable(source):
        raw = read_source_notes(spark, source, reading)
        rows = aggregates(raw, rows=F.count("*"), html_rows=F.count_if("html"))
        if reading.notes is not None and reading.notes.repeated == "join":
            raw = joined_notes(raw)
        changed: dict[str, Any] = {}
        if posted is not None:
            raw, changed = with_posted(raw, spark.read.parquet(str(posted)))
        notes, quarantine = clean_notes(raw)
        write_table(notes, out / NOTES_TABLE, ["note_id"])
        write_table(quarantine, out / QUARANTINE_TABLE, ["reason", "row"])
    written = read_table(spark, out / NOTES_TABLE)
    counts = aggregates(
        written, notes=F.count("*"), with_text=F.count_if(_has_text()), with_image=F.count_if(_has_image(written))
    )
    if not counts["notes"]:
        raise ValueError(f"the notes of {source} hold no usable one ({rows['rows']} rows).")
    return {**rows, **changed, **counts, "dropped": counts_by(read_table(spark, out / QUARANTINE_TABLE), "reason")}


def joined_notes(raw: DataFrame) -> DataFrame:
    """Source notes, those with one id in one row: their distinct texts in file order, the image of the last."""
    is_note = F.isnotnull("note_id") & ~F.col("malformed")

    def distinct(value: Column) -> Column:
        by_position = F.sort_array(F.collect_list(F.struct("position", value.alias("value"))))
        return F.array_distinct(F.filter(by_position["value"], F.isnotnull))

    texts = [F.array_join(distinct(F.nullif(F.col(name), F.lit(""))), " ").alias(name) for name in ("title", "content")]
    last = [F.max_by(name, "position").alias(name) for name in ("image_path", "image", "row")]
    joined = raw.filter(is_note).groupBy("note_id").agg(
        *texts, F.array_distinct(F.flatten(distinct(F.col("topics")))).alias("topics"), *last,
        F.lit(False).alias("malformed"), F.bool_or("html").alias("html"), F.max("position").alias("position"),
    )  # fmt: skip
    return joined.select(raw.columns).union(raw.filter(~is_note))


def with_posted(raw: DataFrame, posted: DataFrame) -> tuple[DataFrame, dict[str, int]]:
    """Source notes with those of POSTED in place of their own ones, and without those that are deleted there.

    Returns also posted (living notes), replaced and deleted (rows of `raw`).
    """
    decided = raw.join(posted.select("note_id", "deleted"), "note_id", "left")
    counts = aggregates(decided, replaced=F.count_if(~F.col("deleted")), deleted=F.count_if("deleted"))
    living = posted.filter(~F.col("deleted"))
    rows = living.select(
        *NOTES.names[:4], F.lit(None).cast("string").alias("image_path"), "image", F.lit(False).alias("malformed"),
        F.lit("").alias("row"), F.lit(False).alias("html"), F.lit(0).cast("long").alias("position"),
    )  # fmt: skip
    kept = decided.filter("deleted IS NULL").select(raw.columns)
    return kept.unionByName(rows), {"posted": living.count(), **counts}


def clean_notes(raw: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Source notes (with `position`) -> (NOTES, QUARANTINE).

    Missing text becomes "". Among rows with the same id, the last in file order counts. A note needs text or an image.
    Reasons: malformed_row, null_note_id, duplicate_note_id, empty_note.
    """
    labelled = _label_notes(raw)
    usable = labelled.filter("reason IS NULL").select(NOTES.names)
    return usable, labelled.filter("reason IS NOT NULL").select(QUARANTINE.names)


def _label_notes(raw: DataFrame) -> DataFrame:
    """Source notes with the columns of NOTES, `row` and the `reason` to drop it (null: none)."""
    text = [F.coalesce(c, F.lit("")).alias(c) for c in ("title", "content")]
    notes = raw.select(
        "note_id",
        *text,
        F.coalesce("topics", F.array().cast("array<string>")).alias("topics"),
        _trimmed(F.col("image_path")).alias("image_path"),
        F.when(F.length("image") > 0, F.col("image")).alias("image"),
        "malformed",
        "row",
        "position",
    )
    later = F.row_number().over(Window.partitionBy("note_id").orderBy(F.desc("position"))) - 1
    return notes.withColumn(
        "reason",
        F.when(F.col("malformed"), "malformed_row")
        .when(F.isnull("note_id"), "null_note_id")
        .when(later > 0, "duplicate_note_id")
        .when(~_has_text() & ~_has_image(notes), "empty_note"),
    )


def _trimmed(text: Column) -> Column:
    """`text` without white space at its ends; null if empty."""
    return F.nullif(F.btrim(text, F.lit(" \t\r\n")), F.lit(""))


def _has_text() -> Column:
    return F.isnotnull(_trimmed(F.concat("title", "content", F.array_join("topics", ""))))


def _has_image(notes: DataFrame) -> Column:
    return F.isnotnull("image_path") | F.isnotnull("image")


def label_events(raw: DataFrame, settings: EventSettings, dated: bool = True) -> DataFrame:
    """Ingested events with the `reason` to drop them; null: none.

    The first reason that applies counts: malformed_row, ignored_event, bad_timestamp, absurd_timestamp (all other rows
    of the undated partition, `dated` = False), null_user, null_note, unknown_event, bad_weight (a click whose WEIGHT,
    if there is that column, is no number from 0 to MAX_WEIGHT), duplicate_event (all except one of the rows with the
    same user, note, time, event and weight).
    """
    event = F.coalesce("event", F.lit(""))
    used = event.isin(*settings.view_events, *settings.click_events)
    fault = (
        F.when(F.col("malformed"), "malformed_row")
        .when(~used if settings.ignored_events is None else event.isin(*settings.ignored_events), IGNORED)
        .when(F.isnull("timestamp"), "bad_timestamp")
        .when(F.lit(not dated), "absurd_timestamp")
        .when(F.isnull("user_id"), "null_user")
        .when(F.isnull("note_id"), "null_note")
        .when(~used, "unknown_event")
    )
    weights = [WEIGHT.name] if WEIGHT.name in raw.columns else []
    for weight in weights:
        is_usable = F.coalesce(F.col(weight).between(0, MAX_WEIGHT), F.lit(False))  # NaN is above all numbers
        fault = fault.when(event.isin(*settings.click_events) & ~is_usable, "bad_weight")
    same = Window.partitionBy("user_id", "note_id", "timestamp", "event", *weights, "fault").orderBy("row")
    repeated = F.when(F.row_number().over(same) > 1, "duplicate_event")
    return raw.withColumn("fault", fault).withColumn("reason", F.coalesce("fault", repeated))


def split_labelled(labelled: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Events labelled by `label_events` -> (EVENTS, QUARANTINE), both with `partition` if `labelled` has it.

    The events have WEIGHT if `labelled` has it.
    """
    faulty = F.isnotnull("reason") & (F.col("reason") != IGNORED)
    weights, partition = ([c for c in labelled.columns if c == name] for name in (WEIGHT.name, "partition"))
    events, quarantine = labelled.filter("reason IS NULL"), labelled.filter(faulty)
    return events.select(*EVENTS.names, *weights, *partition), quarantine.select(*QUARANTINE.names, *partition)


def within(start: date | None, end: date | None) -> Column:
    """Whether `timestamp` is in the days [start, end), UTC; None: no bound."""
    inside = F.lit(True)
    if start is not None:
        inside = inside & (F.col("timestamp") >= F.lit(start.isoformat()).cast("timestamp"))
    if end is not None:
        inside = inside & (F.col("timestamp") < F.lit(end.isoformat()).cast("timestamp"))
    return inside
