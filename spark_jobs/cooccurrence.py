"""Eq. 2: how often users who viewed one note later clicked another.

    python -m spark_jobs.cooccurrence --events PATH --out DIR [--view-events view,click --click-events click]
    spark-submit --master spark://HOST:7077 spark_jobs/cooccurrence.py --events PATH --out DIR

The slow reference, as SQL over the events; a test runs it and compares:

    WITH seen AS (SELECT user_id, note_id, min(timestamp) AS first_view,
                         max(timestamp) FILTER (WHERE event = 'click') AS last_click FROM events GROUP BY ALL),
         clicks AS (SELECT *, count(*) OVER (PARTITION BY user_id) AS n_u FROM seen WHERE last_click IS NOT NULL)
    SELECT v.note_id AS query_id, c.note_id AS target_id, sum(1 / n_u) AS score, count(*) AS num_users
    FROM seen v JOIN clicks c ON v.user_id = c.user_id AND v.first_view < c.last_click AND v.note_id <> c.note_id
    GROUP BY ALL

Spark shuffles the interactions by user and the histories built from them by block of queries;
`spark_jobs.scoring.score_blocks` does the work inside a task. Pairs, by far the largest table, are never shuffled
(docs/decisions/0008). The command uses every readable event; the pipeline also drops robots and absurd times.
"""

import argparse
import filecmp
import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from notellm2_core.config.data import ScoringSettings
from notellm2_core.config.options import add_options, settings_from
from notellm2_core.config.source import EventSettings
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import parquet_files
from notellm2_core.schema import CLICK_WEIGHT, SCORES, TEST, TEST_CLICKS, TRAIN, TRAIN_CLICKS
from spark_jobs.clean import label_events, split_labelled, within
from spark_jobs.common.session import absolute_path, spark_session
from spark_jobs.common.tables import counts_by, num_files, read_table, readable, replacing, top_counts, write_table
from spark_jobs.interactions import interactions
from spark_jobs.scoring.score_blocks import (
    BLOCK_METRICS,
    HISTORY_CHUNKS,
    build_histories,
    merged_metrics,
    write_note_ids,
    write_scores,
)
from spark_jobs.scoring.timed_histories import Timing
from spark_jobs.source import read_source_events


def cooccurrence(
    interactions: DataFrame, out: Path, scoring: ScoringSettings, end: date | None = None
) -> dict[str, Any]:
    """Eq. 2: s(A -> B) = sum over u in U(A -> B) of 1 / N_u. INTERACTIONS -> SCORES in the new folder `out`.

    U(A -> B) holds the users whose first view of A is earlier than (`simultaneous`: not later than) their last click on
    B. First views and last clicks therefore suffice: no events are joined. A click is also a view. N_u is the number of
    distinct notes that u clicked. A note is not paired with itself.

    Each user's `max_user_notes` latest first views and `max_user_notes` latest last clicks make pairs (None: all). N_u
    counts all clicked notes. `score = "swing"` computes another score from the same clicks
    (`spark_jobs.scoring.swing`).

    With `max_minutes`, `half_life_days` (counted from the day `end`, which is the window's end) or CLICK_WEIGHT,
    clicks follow within a limit and have weights (`spark_jobs.scoring.timed_histories`). A limit needs an interaction
    for each time that a user viewed or clicked a note (`spark_jobs.interactions.reduced`).

    The workers write `out`: one file per block of queries, sorted by query and target, with the same bytes on every
    run.

    Returns pairs, queries, max_users (the largest num_users), score {min, p10, p50, p90, p99, max; rounded down to
    1 %}, histogram, capped_users, capped_notes (Swing: notes with more than `swing_max_users` users), and max_loss (a
    bound on what the cap takes from any score; Swing: None). Raises ValueError unless all workers see `out`.
    """
    num_blocks = num_files(interactions.sparkSession)
    micros = (F.unix_micros(c).alias(c) for c in ("first_view", "last_click"))
    weighted = CLICK_WEIGHT.name in interactions.columns
    timing = Timing.of(scoring, end, weighted)
    weights = [] if timing is None else [F.col(CLICK_WEIGHT.name) if weighted else F.lit(1.0).alias(CLICK_WEIGHT.name)]
    rows = interactions.select("user_id", "note_id", *micros, *weights)
    out = out.resolve()  # workers have another working directory
    out.mkdir(parents=True)
    note_ids = out / ".note_ids.arrow"
    write_note_ids(rows.select("note_id").distinct().toArrow()["note_id"], note_ids)

    def build(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return build_histories(batches, note_ids, num_blocks, scoring, timing)

    def write(chunks: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return write_scores(chunks, note_ids, out, scoring, timing)

    chunks = rows.repartition(num_blocks, "user_id").mapInArrow(build, from_arrow_schema(HISTORY_CHUNKS))
    blocks = chunks.repartitionById(num_blocks, "block").mapInArrow(write, from_arrow_schema(BLOCK_METRICS))
    try:
        counts = merged_metrics(blocks.toArrow().to_pylist())
    except PySparkException as e:
        if "FileNotFoundError" in str(e):
            raise ValueError(f"not all workers see the folder {out}; name one that they share.") from e
        raise
    for hidden in out.glob(".*"):  # the ids, and drafts of tasks that were retried
        hidden.unlink(missing_ok=True)
    if counts["pairs"] != sum(pq.read_metadata(file).num_rows for file in parquet_files(out)):
        raise ValueError(f"{out} lacks files that the workers have written; name a folder that they share.")
    if scoring.score != "swing":
        return counts | {"capped_notes": 0}
    crowded = target_clicks(interactions).filter(F.col("num_users") > scoring.swing_max_users)
    return counts | {"capped_notes": crowded.count(), "max_loss": None}  # Swing has no such bound


def target_clicks(interactions: DataFrame) -> DataFrame:
    """INTERACTIONS -> TARGET_CLICKS: distinct users by clicked note; notes without clicks are absent."""
    clicks = interactions.filter("last_click IS NOT NULL")
    return clicks.groupBy("note_id").agg(F.count_distinct("user_id").alias("num_users"))


def score(
    spark: SparkSession, windows: Path, out: Path, scoring: ScoringSettings, ends: Mapping[str, date]
) -> dict[str, Any]:
    """`windows/{train,test}` (INTERACTIONS) -> `out/{train,test}` (SCORES), `out/{train,test}_clicks` (TARGET_CLICKS).

    `ends`: the day after each window. Equal windows are computed once. Returns the counts of `cooccurrence` by window.
    Raises ValueError naming the settings that leave a window without pairs.
    """
    counts: dict[str, Any] = {}
    for window in ("train", "test"):
        if window == "test" and ends[TRAIN] == ends[TEST] and _same_files(windows / TRAIN, windows / TEST):
            shutil.copytree(out / TRAIN, out / TEST)
            shutil.copytree(out / TRAIN_CLICKS, out / TEST_CLICKS)
            counts["test"] = counts["train"]
            break
        table = read_table(spark, windows / window)
        counts[window] = cooccurrence(table, out / window, scoring, ends[window])
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
    if scoring.max_minutes is None:
        raise ValueError(f"{where}: no user clicked one note after viewing another; set {by_day}{longer}.")
    raise ValueError(
        f"{where}: no user clicked one note at most {scoring.max_minutes:g} minutes after viewing another; raise "
        f"pairs.max_minutes (--max-minutes), or set {by_day}{longer}."
    )


def _same_files(a: Path, b: Path) -> bool:
    names = sorted(f.name for f in a.iterdir())
    if names != sorted(f.name for f in b.iterdir()):
        return False
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spark_jobs.cooccurrence", description="Eq. 2 over behaviour logs.")
    parser.add_argument("--events", type=absolute_path, required=True, help="events.csv(.gz), Parquet, or a source")
    parser.add_argument("--out", type=absolute_path, required=True, help="folder for the scores")
    add_options(parser, EventSettings, "view_events", "click_events", "event_weights")
    add_options(parser, ScoringSettings, "simultaneous", "score", "swing_alpha", "swing_max_users")
    add_options(parser, ScoringSettings, "max_minutes", "half_life_days")
    add_options(parser, ScoringSettings, "max_user_notes", default="all")
    parser.add_argument("--start", type=date.fromisoformat, help="first day, YYYY-MM-DD")
    parser.add_argument("--end", type=date.fromisoformat, help="the day after the last one")
    args = parser.parse_args()
    with user_errors(), replacing(args.out, args.events, SCORES.names) as out, readable(args.events):
        if args.start and args.end and args.start >= args.end:
            raise ValueError(f"--start {args.start} is not before --end {args.end}.")
        settings = settings_from(args, EventSettings, ignored_events=None, max_events_per_day=None)
        scoring = settings_from(args, ScoringSettings)
        if scoring.half_life_days is not None and args.end is None:
            raise ValueError("--half-life-days counts back from --end; name it.")
        spark = spark_session("cooccurrence")
        raw = read_source_events(spark, args.events).persist()
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
        counts = cooccurrence(interactions(events, settings), out, scoring, args.end)
        _require_pairs(counts, scoring, str(args.events))
        print(json.dumps({"rows": raw.count(), "events": names, "dropped": counts_by(quarantine, "reason"), **counts}))


if __name__ == "__main__":
    main()
