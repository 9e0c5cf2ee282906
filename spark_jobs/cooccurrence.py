"""Eq. 2: how often users who saw one note later clicked another.

python -m spark_jobs.cooccurrence --events PATH --out DIR [--view-events view,click --click-events click]

The command takes every readable event: robots and absurd times are left to the pipeline, which sees the whole log.

Spark brings each user's interactions together, and then the lists made of them; what is done inside a task is in
`spark_jobs.scoring.score_blocks`. Pairs, by far the largest table, are never shuffled (docs/decisions/0008).
"""

import argparse
import filecmp
import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from notellm2_core.config.data import EventSettings, ScoringSettings
from notellm2_core.config.options import add_options, settings_from
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import parquet_files
from notellm2_core.schema import SCORES, TEST, TEST_CLICKS, TRAIN, TRAIN_CLICKS
from spark_jobs.clean import label_events, split_labelled, within
from spark_jobs.common.session import absolute_path, spark_session
from spark_jobs.common.tables import counts_by, num_files, read_table, readable, replacing, top_counts, write_table
from spark_jobs.ingest import ingest_events
from spark_jobs.interactions import interactions
from spark_jobs.scoring.score_blocks import (
    FIGURES,
    HISTORY_CHUNKS,
    build_histories,
    merged_figures,
    write_note_ids,
    write_scores,
)
from spark_jobs.source import alike, event_files, read_source_events


def cooccurrence(interactions: DataFrame, out: Path, scoring: ScoringSettings) -> dict[str, Any]:
    """Eq. 2: s(A -> B) = sum over u in U(A -> B) of 1 / N_u, as SCORES in the new folder `out`.

    u is in the set U(A -> B) iff u's first view of A is earlier than (`simultaneous`: not later than) u's last click on
    B. So the first view and the last click of each user and note decide, and no events are joined. A click is a view
    too. N_u is the number of distinct notes that u clicked. A note is not paired with itself.

    Of each user, the `max_user_notes` notes first viewed latest and the `max_user_notes` notes last clicked latest make
    pairs (None: all of them); N_u counts all. `score = "swing"` makes another score of the same clicks
    (`spark_jobs.scoring.swing`).

    `out` gets a file for each block of queries, ordered by query and target: the same bytes on every run. Workers write
    them, so all of them must see it.

    Returns pairs, queries, max_users (the most of one pair), score {min, p10, p50, p90, p99, max; cut to 1 %},
    capped_users, capped_notes (Swing: notes with more users than count), and max_loss: no score has lost more by the
    cap (Swing: None).
    """
    num_blocks = num_files(interactions.sparkSession)
    micros = (F.unix_micros(c).alias(c) for c in ("first_view", "last_click"))
    rows = interactions.select("user_id", "note_id", *micros)
    out = out.resolve()  # workers have another working directory
    out.mkdir(parents=True)
    note_ids = out / ".note_ids.arrow"
    write_note_ids(rows.select("note_id").distinct().toArrow()["note_id"], note_ids)

    def cut(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return build_histories(batches, note_ids, num_blocks, scoring)

    def write(pieces: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return write_scores(pieces, note_ids, out, scoring)

    pieces = rows.repartition(num_blocks, "user_id").mapInArrow(cut, from_arrow_schema(HISTORY_CHUNKS))
    written = pieces.repartitionById(num_blocks, "block").mapInArrow(write, from_arrow_schema(FIGURES))
    try:
        counts = merged_figures(written.toArrow().to_pylist())
    except PySparkException as e:
        if "FileNotFoundError" in str(e):
            raise ValueError(f"not all workers see the folder {out}; name one that they share.") from e
        raise
    for hidden in out.glob(".*"):  # the ids, and what a task that was tried again may have left
        hidden.unlink(missing_ok=True)
    if counts["pairs"] != sum(pq.read_metadata(file).num_rows for file in parquet_files(out)):
        raise ValueError(f"{out} does not hold all that the workers have written; name a folder that they share.")
    if scoring.score != "swing":
        return counts | {"capped_notes": 0}
    crowded = target_clicks(interactions).filter(F.col("num_users") > scoring.swing_max_users)
    return counts | {"capped_notes": crowded.count(), "max_loss": None}  # Swing has no such bound


def target_clicks(interactions: DataFrame) -> DataFrame:
    """note_id, num_users: how many distinct users clicked each note; notes without clicks are left out."""
    clicks = interactions.filter("last_click IS NOT NULL")
    return clicks.groupBy("note_id").agg(F.count_distinct("user_id").alias("num_users"))


def score(spark: SparkSession, windows: Path, out: Path, scoring: ScoringSettings) -> dict[str, Any]:
    """`windows/train`, `windows/test` (INTERACTIONS) -> `out/train`, `out/test` (SCORES), and `out/train_clicks`,
    `out/test_clicks` (TARGET_CLICKS).

    Equal windows are computed once. Returns for train and test what `cooccurrence` returns.
    """
    counts: dict[str, Any] = {}
    for window in ("train", "test"):
        if window == "test" and _same_files(windows / TRAIN, windows / TEST):
            shutil.copytree(out / TRAIN, out / TEST)
            shutil.copytree(out / TRAIN_CLICKS, out / TEST_CLICKS)
            counts["test"] = counts["train"]
            break
        table = read_table(spark, windows / window)
        counts[window] = cooccurrence(table, out / window, scoring)
        _require_pairs(counts[window], scoring, f"{window} window")
        write_table(target_clicks(table), out / f"{window}_clicks", ["note_id"])
    return counts


def _require_pairs(counts: Mapping[str, Any], scoring: ScoringSettings, where: str) -> None:
    if counts["pairs"]:
        return
    longer = "a longer window (window.train_days, window.test_days; --start, --end)"
    if scoring.score == "swing":
        raise ValueError(f"{where}: no two users clicked the same two notes; set {longer}, or pairs.score.")
    by_day = "" if scoring.simultaneous else "pairs.simultaneous (--simultaneous) for times by the day, or "
    raise ValueError(f"{where}: no user clicked one note after viewing another; set {by_day}{longer}.")


def _same_files(a: Path, b: Path) -> bool:
    names = sorted(f.name for f in a.iterdir())
    if names != sorted(f.name for f in b.iterdir()):
        return False
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spark_jobs.cooccurrence", description="Eq. 2 over behaviour logs.")
    parser.add_argument("--events", type=absolute_path, required=True, help="events.csv(.gz), Parquet, or a source")
    parser.add_argument("--out", type=absolute_path, required=True, help="folder for the scores")
    add_options(parser, EventSettings, "view_events", "click_events")
    add_options(parser, ScoringSettings, "simultaneous", "score", "swing_alpha", "swing_max_users")
    add_options(parser, ScoringSettings, "max_user_notes", default="all")
    parser.add_argument("--start", type=date.fromisoformat, help="first day, YYYY-MM-DD")
    parser.add_argument("--end", type=date.fromisoformat, help="the day after the last one")
    args = parser.parse_args()
    with user_errors(), replacing(args.out, args.events, SCORES.names) as out, readable(args.events):
        if args.start and args.end and args.start >= args.end:
            raise ValueError(f"--start {args.start} is not before --end {args.end}.")
        settings = settings_from(args, EventSettings, ignored_events=None, max_events_per_day=None)
        scoring = settings_from(args, ScoringSettings)
        spark = spark_session("cooccurrence")
        groups = alike(args.events, event_files(args.events))
        ingested = (ingest_events(read_source_events(spark, args.events, files)) for files in groups)
        raw = reduce(DataFrame.union, ingested).persist()
        names = top_counts(raw, "event")
        in_days = F.isnull("timestamp") | within(args.start, args.end)
        labelled = label_events(raw.filter(in_days), settings).persist()
        events, quarantine = split_labelled(labelled)
        if not events.filter(F.col("event").isin(*settings.click_events)).head(1):
            dropped = counts_by(quarantine, "reason") or "nothing"
            raise ValueError(
                f"{args.events}: no clicks; set --click-events, --start, --end. Event names: {names}. "
                f"Dropped: {dropped}."
            )
        counts = cooccurrence(interactions(events, settings), out, scoring)
        _require_pairs(counts, scoring, str(args.events))
        print(json.dumps({"rows": raw.count(), "events": names, "dropped": counts_by(quarantine, "reason"), **counts}))


if __name__ == "__main__":
    main()
