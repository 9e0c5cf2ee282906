"""Eq. 2: how often users who saw one note later clicked another.

python -m spark_jobs.cooccurrence --events PATH --out DIR [--view-events view,click --click-events click]
"""

import argparse
import filecmp
import json
import shutil
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from notellm2_core.cli_errors import one_line_errors
from notellm2_core.schema import SCORES
from spark_jobs.clean import clean_events
from spark_jobs.session import spark_session
from spark_jobs.source import land_events, read_source_events
from spark_jobs.tables import (
    counts_by,
    figures,
    read_table,
    readable,
    replacing,
    score_quantiles,
    top_counts,
    write_table,
)

_HALF = 1 << 32  # 1/N_u is kept as two whole numbers of 32 bits after the point


def cooccurrence(
    events: DataFrame, view_events: Sequence[str], click_events: Sequence[str], simultaneous: bool = False
) -> DataFrame:
    """Eq. 2: s(A -> B) = sum over u in U(A -> B) of 1 / N_u, as SCORES.

    u is in the set U(A -> B) iff u's first view of A is earlier than (`simultaneous`: not later than) u's last click on
    B. So the first view and the last click of each user and note decide, and no events are joined. A click is a view
    too. N_u is the number of distinct notes that u clicked in `events`. A note is not paired with itself.

    The sum does not depend on its order: 1/N_u is cut after 64 binary places (a relative error below N_u * 2**-64,
    that is 1e-12 up to 18 million clicked notes), and the two halves add up as whole numbers (for up to 2**31 users
    of one pair). Notes are numbered inside, and named again at the end, which makes the join's rows small.
    """
    is_click = F.col("event").isin(*click_events)
    micros = F.unix_micros("timestamp")
    seen = (
        events.filter(is_click | F.col("event").isin(*view_events))
        .groupBy("user_id", "note_id")
        .agg(F.min(micros).alias("first_view"), F.max(F.when(is_click, micros)).alias("last_click"))
    )
    numbers = seen.select("note_id").distinct()
    numbers = numbers.select("note_id", F.row_number().over(Window.orderBy("note_id")).alias("number"))
    seen = seen.join(numbers, "note_id")

    # Both sides lie by their note: where one is small enough to be broadcast, the pairs need no shuffle of their own.
    num_parts = int(events.sparkSession.conf.get("spark.sql.shuffle.partitions") or 1)
    views = seen.select("user_id", F.col("number").alias("query"), "first_view").repartition(num_parts, "query")
    clicks = (
        seen.filter("last_click IS NOT NULL")
        .select("user_id", F.col("number").alias("target"), "last_click")
        .withColumn("n", F.count("*").over(Window.partitionBy("user_id")))  # N_u
        .withColumn("high", F.expr(f"{_HALF} div n"))
        .withColumn("low", F.expr(f"({_HALF} % n) * {_HALF} div n"))
        .repartition(num_parts, "target")
    )
    followed = F.col("first_view") <= F.col("last_click") if simultaneous else F.col("first_view") < F.col("last_click")
    pairs = (
        views.join(clicks, "user_id")
        .filter(followed & (F.col("query") != F.col("target")))
        .groupBy("query", "target")
        .agg(F.sum("high").alias("high"), F.sum("low").alias("low"), F.count("*").alias("num_users"))
    )
    score = F.col("high") / float(_HALF) + F.col("low") / float(_HALF) ** 2
    queries = numbers.select(F.col("number").alias("query"), F.col("note_id").alias("query_id"))
    targets = numbers.select(F.col("number").alias("target"), F.col("note_id").alias("target_id"))
    named = pairs.withColumn("score", score).join(queries, "query").join(targets, "target")
    return named.select(SCORES.names)


def target_clicks(events: DataFrame, click_events: Sequence[str]) -> DataFrame:
    """note_id, num_users: how many distinct users clicked each note; notes without clicks are left out."""
    clicks = events.filter(F.col("event").isin(*click_events))
    return clicks.groupBy("note_id").agg(F.count_distinct("user_id").alias("num_users"))


def score(
    spark: SparkSession,
    events: Path,
    out: Path,
    view_events: Sequence[str],
    click_events: Sequence[str],
    simultaneous: bool,
) -> dict[str, Any]:
    """`events/train`, `events/test` -> `out/train`, `out/test` (SCORES), `out/train_clicks`, `out/test_clicks`.

    Equal windows are computed once. Returns for train and test: pairs, queries, targets, max_users, score quantiles.
    """
    counts: dict[str, Any] = {}
    for window in ("train", "test"):
        if window == "test" and _same_files(events / "train", events / "test"):
            shutil.copytree(out / "train", out / "test")
            shutil.copytree(out / "train_clicks", out / "test_clicks")
            counts["test"] = counts["train"]
            break
        table = read_table(spark, events / window)
        write_scores(spark, cooccurrence(table, view_events, click_events, simultaneous), out / window)
        write_table(target_clicks(table, click_events), out / f"{window}_clicks", ["note_id"])
        counts[window] = _score_counts(spark, out / window, f"{window} window")
    return counts


def write_scores(spark: SparkSession, scores: DataFrame, out: Path) -> None:
    num_files = int(spark.conf.get("spark.sql.shuffle.partitions") or 1)
    write_table(scores, out, ["query_id", "target_id"], num_files)


def _score_counts(spark: SparkSession, out: Path, where: str) -> dict[str, Any]:
    scores = read_table(spark, out)
    counts = figures(
        scores,
        pairs=F.count("*"),
        queries=F.count_distinct("query_id"),
        targets=F.count_distinct("target_id"),
        max_users=F.max("num_users"),
    )
    if not counts["pairs"]:
        raise ValueError(
            f"{where}: no user clicked one note after viewing another; set pairs.simultaneous (--simultaneous) "
            "for times by the day, or a longer window."
        )
    return {**counts, "score": score_quantiles(scores)}


def _same_files(a: Path, b: Path) -> bool:
    names = sorted(f.name for f in a.iterdir())
    if names != sorted(f.name for f in b.iterdir()):
        return False
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spark_jobs.cooccurrence", description="Eq. 2 over behaviour logs.")
    parser.add_argument("--events", type=Path, required=True, help="events.csv(.gz), a Parquet folder, or a source")
    parser.add_argument("--out", type=Path, required=True, help="folder for query_id, target_id, score, num_users")
    parser.add_argument("--view-events", default="view,click", help="event names that count as viewed")
    parser.add_argument("--click-events", default="click", help="event names that count as clicked")
    parser.add_argument("--simultaneous", action="store_true", help="a click at the very time of the view counts")
    parser.add_argument("--start", type=date.fromisoformat, help="first day, YYYY-MM-DD")
    parser.add_argument("--end", type=date.fromisoformat, help="the day after the last one")
    args = parser.parse_args()
    view_events, click_events = (
        [name.strip() for name in names.split(",")] for names in (args.view_events, args.click_events)
    )
    with one_line_errors(), replacing(args.out, args.events, SCORES.names) as out, readable(args.events):
        spark = spark_session("cooccurrence")
        raw = land_events(read_source_events(spark, args.events)).persist()
        names = top_counts(raw, "event")
        events, quarantine = clean_events(raw, None, view_events, click_events, None, args.start, args.end)
        events = events.persist()
        if not events.filter(F.col("event").isin(click_events)).head(1):
            raise ValueError(f"{args.events}: no clicks; set --click-events, --start, --end. Event names: {names}.")
        write_scores(spark, cooccurrence(events, view_events, click_events, args.simultaneous), out)
        counts = _score_counts(spark, out, str(args.events))
        print(json.dumps({"rows": raw.count(), "events": names, "dropped": counts_by(quarantine, "reason"), **counts}))


if __name__ == "__main__":
    main()
