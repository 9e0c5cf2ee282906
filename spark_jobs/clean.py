"""Notes and events: validate, quarantine with a reason, deduplicate. Nothing is dropped without being counted.

`clean_notes` and `clean_events` are pure; `prepare_notes` and `prepare_events` read, write and count.
"""

import shutil
from collections.abc import Sequence
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from notellm2_core.schema import EVENTS, NOTES, QUARANTINE
from spark_jobs.source import UNDATED, read_source_notes, trimmed
from spark_jobs.tables import counts_by, figures, num_files, read_table, readable, top_counts, write_table

# Labels of rows that are out of question rather than at fault: counted, but not quarantined.
_OUTSIDE, _IGNORED = "outside_window", "ignored_event"


def prepare_notes(spark: SparkSession, source: Path, out: Path) -> dict[str, Any]:
    """`source/notes.parquet` -> `out/notes` (NOTES) and `out/quarantine`.

    Returns rows, notes, with_text, with_image (a path or bytes), and dropped {reason: rows}.
    """
    with readable(source / "notes.parquet"):
        raw = read_source_notes(spark, source)
        rows = raw.count()
        notes, quarantine = clean_notes(raw)
        write_table(notes, out / "notes", ["note_id"])
        write_table(quarantine, out / "quarantine", ["reason", "row"])
    written = read_table(spark, out / "notes")
    counts = figures(
        written, notes=F.count("*"), with_text=F.count_if(_has_text()), with_image=F.count_if(_has_image(written))
    )
    if not counts["notes"]:
        raise ValueError(f"{source / 'notes.parquet'} holds no usable note ({rows} rows).")
    return {"rows": rows, **counts, "dropped": counts_by(read_table(spark, out / "quarantine"), "reason")}


def clean_notes(raw: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Source notes (with `position`) -> (NOTES, QUARANTINE).

    Topics may be a list or '|'-separated text. Missing text is "". Of rows with the same id the last one in file order
    counts. A note without text is kept where it has an image. Reasons: null_note_id, duplicate_note_id, empty_note.
    """
    labelled = _label_notes(raw)
    kept = labelled.filter("reason IS NULL").select(NOTES.names)
    return kept, labelled.filter("reason IS NOT NULL").select(QUARANTINE.names)


def _label_notes(raw: DataFrame) -> DataFrame:
    """Source notes in the form of NOTES, with `row` and the `reason` to drop them (null: none)."""
    text = [F.coalesce(F.col(c).cast("string"), F.lit("")).alias(c) for c in ("title", "content")]
    path = trimmed(F.col("image_path").cast("string")) if "image_path" in raw.columns else F.lit(None).cast("string")
    image = F.col("image").cast("binary") if "image" in raw.columns else F.lit(None).cast("binary")
    as_it_came = [c for c in raw.columns if c not in ("image", "position")]
    notes = raw.select(
        trimmed(F.col("note_id").cast("string")).alias("note_id"),
        *text,
        _topics(raw.schema["topics"].dataType).alias("topics"),
        path.alias("image_path"),
        F.when(F.length(image) > 0, image).alias("image"),
        F.to_json(F.struct(*as_it_came), {"ignoreNullFields": "false"}).alias("row"),
        "position",
    )
    later = F.row_number().over(Window.partitionBy("note_id").orderBy(F.desc("position"))) - 1
    return notes.withColumn(
        "reason",
        F.when(F.isnull("note_id"), "null_note_id")
        .when(later > 0, "duplicate_note_id")
        .when(~_has_text() & ~_has_image(notes), "empty_note"),
    )


def _topics(kind: T.DataType) -> Column:
    column = F.col("topics") if isinstance(kind, T.ArrayType) else F.split(F.col("topics").cast("string"), r"\|")
    named = F.filter(F.transform(column.cast("array<string>"), trimmed), F.isnotnull)
    return F.coalesce(named, F.array().cast("array<string>"))


def _has_text() -> Column:
    return F.isnotnull(trimmed(F.concat("title", "content", F.array_join("topics", ""))))


def _has_image(notes: DataFrame) -> Column:
    return F.isnotnull("image_path") | F.isnotnull("image")


def prepare_events(
    spark: SparkSession,
    raw_paths: Sequence[Path],
    notes: Path,
    out: Path,
    view_events: Sequence[str],
    click_events: Sequence[str],
    ignored_events: Sequence[str],
    max_events_per_day: int | None,
    train_start: date,
    train_end: date,
    test_start: date,
    test_end: date,
) -> dict[str, Any]:
    """Landed events -> `out/train`, `out/test` (EVENTS) and `out/quarantine`. Ends are exclusive; windows may be equal.

    A user with more than `max_events_per_day` on some day of the windows is a robot: none of its events counts.
    Returns rows, outside_window, ignored_event, dropped {reason: rows}, and for train and test: events, views, clicks,
    users, notes, first_day, last_day. Raises ValueError for a window without events or without clicks.
    """
    windows = {"train": (train_start, train_end), "test": (test_start, test_end)}
    raw, known = _read_landed(spark, raw_paths), read_table(spark, notes)
    labelled = _label_events(
        raw, known, view_events, click_events, ignored_events, list(windows.values()), max_events_per_day
    ).persist()
    labels = counts_by(labelled, "reason")
    counts: dict[str, Any] = {
        "rows": sum(labels.values()),
        "robots": figures(labelled.filter("reason = 'robot'"), users=F.count_distinct("user_id"))["users"],
        _OUTSIDE: labels.pop(_OUTSIDE, 0),
        _IGNORED: labels.pop(_IGNORED, 0),
    }
    labels.pop("", None)
    counts["dropped"] = labels
    events, quarantine = _split_labelled(labelled)
    write_table(quarantine, out / "quarantine", ["reason", "row"])
    day = F.date_format("timestamp", "yyyy-MM-dd")
    data = figures(raw, first=F.min(day), last=F.max(day))
    for name, (start, end) in windows.items():
        if name == "test" and windows["test"] == windows["train"]:
            shutil.copytree(out / "train", out / "test")
            counts["test"] = counts["train"]
            break
        in_window, order = events.filter(_within(start, end)), ["user_id", "timestamp", "note_id", "event"]
        write_table(in_window, out / name, order, num_files(spark))
        counts[name] = _event_counts(read_table(spark, out / name), click_events)
        span = f"{start} to {end} (exclusive)"
        reach = f"the events read reach from {data['first']} to {data['last']}"
        if not counts[name]["events"]:
            most = next(iter(labels), "")
            if most == "unknown_event":
                names = ", ".join(top_counts(raw, "event", 5))
                raise ValueError(
                    f"no usable events in the {name} window, {span}: the log's event names are {names}, the settings "
                    f"know {', '.join(sorted({*view_events, *click_events, *ignored_events}))}; set source.view_events "
                    "and source.click_events."
                )
            if most == "unknown_note":
                ids = (figures(t, id=F.min("note_id"))["id"] for t in (raw, known))
                raise ValueError(
                    f"no usable events in the {name} window, {span}: the log's notes are not in notes.parquet; "
                    "a note_id of the log is {!r}, one of notes.parquet {!r}.".format(*ids)
                )
            dropped = ", ".join(f"{rows} {reason}" for reason, rows in labels.items()) or "nothing"
            raise ValueError(
                f"no usable events in the {name} window, {span}: {reach}, dropped: {dropped}; "
                f"set window.end (or WEEK) and window.{name}_days."
            )
        if not counts[name]["clicks"]:
            raise ValueError(
                f"no clicks in the {name} window, {span}: set source.click_events, now {list(click_events)}, to names "
                f"that occur ({', '.join(counts_by(read_table(spark, out / name), 'event'))}), or window.end; {reach}."
            )
    labelled.unpersist()
    return counts


def _read_landed(spark: SparkSession, raw_paths: Sequence[Path]) -> DataFrame:
    """Landed events, with whether `land` could place them in time."""
    tables = [read_table(spark, path).withColumn("placed", F.lit(path.name != UNDATED)) for path in raw_paths]
    return reduce(DataFrame.union, tables)


def _event_counts(events: DataFrame, click_events: Sequence[str]) -> dict[str, Any]:
    day = F.date_format("timestamp", "yyyy-MM-dd")
    is_click = F.col("event").isin(*click_events)
    return figures(
        events,
        events=F.count("*"),
        clicks=F.count_if(is_click),
        views=F.count_if(~is_click),
        users=F.count_distinct("user_id"),
        notes=F.count_distinct("note_id"),
        first_day=F.min(day),
        last_day=F.max(day),
    )


def clean_events(
    raw: DataFrame,
    notes: DataFrame | None,
    view_events: Sequence[str],
    click_events: Sequence[str],
    ignored_events: Sequence[str] | None,
    start: date | None = None,
    end: date | None = None,
) -> tuple[DataFrame, DataFrame]:
    """Landed events of the days [start, end) -> (EVENTS, QUARANTINE).

    Reasons, the first that holds: bad_timestamp, absurd_timestamp, null_user, null_note, unknown_event, robot,
    unknown_note (unless `notes` is None), duplicate_event (same user, note, time and event: one is kept). Ignored
    events (None: all that are neither viewed nor clicked) and rows outside the days are in neither table.
    """
    raw = raw.withColumn("placed", F.isnotnull("timestamp"))
    labelled = _label_events(raw, notes, view_events, click_events, ignored_events, [(start, end)], None)
    return _split_labelled(labelled)


def _split_labelled(labelled: DataFrame) -> tuple[DataFrame, DataFrame]:
    faulty = F.isnotnull("reason") & ~F.col("reason").isin(_OUTSIDE, _IGNORED)
    return labelled.filter("reason IS NULL").select(EVENTS.names), labelled.filter(faulty).select(QUARANTINE.names)


def _label_events(
    raw: DataFrame,
    notes: DataFrame | None,
    view_events: Sequence[str],
    click_events: Sequence[str],
    ignored_events: Sequence[str] | None,
    windows: Sequence[tuple[date | None, date | None]],
    max_events_per_day: int | None,
) -> DataFrame:
    """Landed events with the `reason` to drop them (null: none). `ignored_events` None: all the other ones."""
    in_windows = F.lit(False)
    for start, end in windows:
        in_windows = in_windows | _within(start, end)
    event = F.coalesce("event", F.lit(""))
    used = event.isin(*view_events, *click_events)
    known = raw.withColumn("known", F.lit(True))
    if notes is not None:
        known = raw.join(notes.select("note_id", F.lit(True).alias("known")), "note_id", "left")
    known = known.withColumn("robot", F.lit(None).cast("boolean"))
    if max_events_per_day is not None:
        days = raw.filter(used & F.col("placed") & in_windows).groupBy("user_id", F.to_date("timestamp")).count()
        robots = days.filter(F.col("count") > max_events_per_day).select("user_id").distinct()
        known = known.drop("robot").join(F.broadcast(robots.withColumn("robot", F.lit(True))), "user_id", "left")
    fault = (
        F.when(~used if ignored_events is None else event.isin(*ignored_events), _IGNORED)
        .when(F.isnull("timestamp"), "bad_timestamp")
        .when(~F.col("placed"), "absurd_timestamp")
        .when(~in_windows, _OUTSIDE)
        .when(F.isnull("user_id"), "null_user")
        .when(F.isnull("note_id"), "null_note")
        .when(~used, "unknown_event")
        .when(F.col("robot"), "robot")
        .when(F.isnull("known"), "unknown_note")
    )
    same = Window.partitionBy("user_id", "note_id", "timestamp", "event", "fault").orderBy("row")
    repeated = F.when(F.row_number().over(same) > 1, "duplicate_event")
    return known.withColumn("fault", fault).withColumn("reason", F.coalesce("fault", repeated))


def _within(start: date | None, end: date | None) -> Column:
    inside = F.lit(True)
    if start is not None:
        inside = inside & (F.col("timestamp") >= F.lit(start.isoformat()).cast("timestamp"))
    if end is not None:
        inside = inside & (F.col("timestamp") < F.lit(end.isoformat()).cast("timestamp"))
    return inside
