"""Section 2.3: of the co-occurrence scores, keep the plausible ones, then the strongest of each query.

python -m spark_jobs.related_pairs --scores DIR --out DIR --low 0.01 --up 30 --top-t 3
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from notellm2_core.cli_errors import one_line_errors
from notellm2_core.schema import RELATED_PAIRS, SCORES
from spark_jobs.session import absolute_path, spark_session
from spark_jobs.tables import figures, quantiles, read_table, readable, replacing, score_quantiles, write_table

Bounds = Literal["absolute", "quantile"]


@dataclass(frozen=True)
class Filters:
    """The section `pairs` of the configuration; see there."""

    low: float
    up: float
    bounds: Bounds
    top_t: int
    popularity_power: float
    min_users: int


def same_side(scores: DataFrame, sides: DataFrame) -> DataFrame:
    """The pairs whose notes are both in `sides` (NOTE_SIDES), on the same side."""
    query = sides.select(F.col("note_id").alias("query_id"), F.col("side").alias("query_side"))
    target = sides.select(F.col("note_id").alias("target_id"), F.col("side").alias("target_side"))
    both = scores.join(query, "query_id").join(target, "target_id")
    return both.filter("query_side = target_side").select(SCORES.names)


def corrected(scores: DataFrame, target_clicks: DataFrame | None, power: float, min_users: int) -> DataFrame:
    """The pairs of at least `min_users` users, each score divided by (users who clicked its target) ** `power`.

    `target_clicks`: TARGET_CLICKS; not needed where `power` is 0.
    """
    seen = scores.filter(F.col("num_users") >= min_users)
    if power == 0:
        return seen
    if target_clicks is None:
        raise ValueError(f"pairs.popularity_power = {power} needs the clicks of the targets; without them set it to 0.")
    users = target_clicks.select(F.col("note_id").alias("target_id"), F.col("num_users").alias("target_users"))
    score = F.col("score") / F.pow(F.col("target_users").cast("double"), F.lit(float(power)))
    return seen.join(users, "target_id").withColumn("score", score).select(SCORES.names)


def within_bounds(scores: DataFrame, low: float, up: float, bounds: Bounds) -> DataFrame:
    """The pairs with low <= score <= up; as quantiles, the bounds are exact percentiles of the given scores."""
    limits = [low, up] if bounds == "absolute" else quantiles(scores, "score", [low, up])
    return scores.filter(F.col("score").between(*map(F.lit, limits)))


def strongest(scores: DataFrame, top_t: int) -> DataFrame:
    """SCORES -> RELATED_PAIRS: the `top_t` of each query by (score descending, target id ascending)."""
    order = Window.partitionBy("query_id").orderBy(F.desc("score"), F.asc("target_id"))
    return (
        scores.withColumn("rank", F.row_number().over(order)).filter(F.col("rank") <= top_t).select(RELATED_PAIRS.names)
    )


def relate(spark: SparkSession, scores: Path, sides: Path, out: Path, filters: Filters) -> dict[str, Any]:
    """`scores/{train,test}` with `scores/{train,test}_clicks` -> `out/train`, `out/test` (RELATED_PAIRS).

    Training pairs have both notes on the train side, test pairs both in the pool. Returns for each: pairs after every
    filter, queries, notes, and the quantiles of the candidates' (corrected) scores and of the kept ones.
    """
    counts = {}
    for window, side in (("train", "train"), ("test", "pool")):
        on_side = same_side(read_table(spark, scores / window), read_table(spark, sides).filter(F.col("side") == side))
        clicks = read_table(spark, scores / f"{window}_clicks")
        none = f"no pair has both notes on the side {side}; set window.{window}_days, split.by or split.pool_share."
        counts[window] = _relate(spark, on_side, clicks, out / window, window, filters, none)
    return counts


def _relate(
    spark: SparkSession,
    scores: DataFrame,
    clicks: DataFrame | None,
    out: Path,
    name: str,
    filters: Filters,
    none: str,
) -> dict[str, Any]:
    """Filter, write and count one table of pairs. Raises ValueError naming the setting that left none.

    `none`: what to say where `scores` has no rows.
    """
    found = figures(scores, pairs=F.count("*"), most_users=F.max("num_users"))
    if not found["pairs"]:
        raise ValueError(f"{name}: {none}")
    candidates = corrected(scores, clicks, filters.popularity_power, filters.min_users).persist()
    spread = score_quantiles(candidates)
    if spread["max"] is None:
        raise ValueError(
            f"{name}: no pair has pairs.min_users = {filters.min_users} users (the most is {found['most_users']}); "
            "lower it."
        )
    inside = within_bounds(candidates, filters.low, filters.up, filters.bounds)
    num_inside = inside.count()
    if not num_inside:
        raise ValueError(
            f"{name}: no score lies in [pairs.low, pairs.up] = [{filters.low}, {filters.up}] ({filters.bounds}); the "
            f" scores reach from {spread['min']:.6g} to {spread['max']:.6g}."
        )
    write_table(strongest(inside, filters.top_t), out, ["query_id", "rank"])
    num_candidates = candidates.count()
    candidates.unpersist()
    pairs = read_table(spark, out)
    ends = pairs.select(F.explode(F.array("query_id", "target_id")).alias("note_id"))
    return {
        "pairs_on_side": found["pairs"],
        "pairs_with_min_users": num_candidates,
        "pairs_within_bounds": num_inside,
        **figures(pairs, pairs=F.count("*"), queries=F.count_distinct("query_id")),
        "notes": ends.distinct().count(),
        "score_before_bounds": spread,
        "score": score_quantiles(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spark_jobs.related_pairs", description="Filter and top-t pairs.")
    parser.add_argument("--scores", type=absolute_path, required=True, help="folder written by spark_jobs.cooccurrence")
    parser.add_argument("--out", type=absolute_path, required=True, help="folder for the same columns plus rank")
    parser.add_argument("--low", type=float, required=True, help="smallest score kept")
    parser.add_argument("--up", type=float, required=True, help="largest score kept")
    parser.add_argument("--top-t", type=int, required=True, help="targets kept for each query")
    parser.add_argument("--bounds", choices=("absolute", "quantile"), default="absolute")
    parser.add_argument("--min-users", type=int, default=1, help="fewest users of a pair")
    args = parser.parse_args()
    with one_line_errors(), replacing(args.out, args.scores, RELATED_PAIRS.names) as out, readable(args.scores):
        if args.low > args.up or args.top_t < 1:
            raise ValueError(f"need --low <= --up and --top-t >= 1, got {args.low}, {args.up}, {args.top_t}.")
        if args.bounds == "quantile" and not 0 <= args.low <= args.up <= 1:
            raise ValueError(f"with --bounds quantile, --low and --up are shares in [0, 1]: {args.low}, {args.up}.")
        spark = spark_session("related_pairs")
        scores = read_table(spark, args.scores)
        missing = [c for c in SCORES.names if c not in scores.columns]
        if missing:
            raise ValueError(f"{args.scores} lacks the column {missing[0]}; it has {', '.join(scores.columns)}.")
        filters = Filters(args.low, args.up, args.bounds, args.top_t, 0.0, args.min_users)
        print(json.dumps(_relate(spark, scores, None, out, str(args.scores), filters, "no pairs.")))


if __name__ == "__main__":
    main()
