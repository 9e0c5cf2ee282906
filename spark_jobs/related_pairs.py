"""Section 2.3: of the co-occurrence scores, keep the plausible ones, then the strongest of each query.

python -m spark_jobs.related_pairs --scores DIR --out DIR --low 0.01 --up 30 --top-t 3
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

from notellm2_core.config.data import FilterSettings
from notellm2_core.config.options import add_options, settings_from
from notellm2_core.runtime.errors import user_errors
from notellm2_core.schema import RELATED_PAIRS
from spark_jobs.common.session import absolute_path, spark_session
from spark_jobs.common.tables import figures, pair_figures, read_table, readable, replacing, write_table
from spark_jobs.scoring.arrays import Floats, Ints
from spark_jobs.scoring.filter_files import COUNTED, STRONGEST, VALUES, CandidateFilter, by_file, score_files
from spark_jobs.scoring.quantiles import SHARES, quantiles


def relate(spark: SparkSession, scores: Path, sides: Path, out: Path, filters: FilterSettings) -> dict[str, Any]:
    """`scores/{train,test}` with `scores/{train,test}_clicks` -> `out/train`, `out/test` (RELATED_PAIRS).

    Training pairs have both notes on the train side of the NOTE_SPLIT `sides`, test pairs both in the pool. Returns for
    each what `related_pairs` returns. Workers read the folders, so all of them must see them.
    """
    counts = {}
    for window, side in (("train", "train"), ("test", "pool")):
        none = f"no pair has both notes on the side {side}; set window.{window}_days, split.by or split.pool_share."
        clicks = scores / f"{window}_clicks"
        counts[window] = related_pairs(
            spark, scores / window, out / window, filters, window, none, sides=sides, side=side, clicks=clicks
        )
    return counts


def related_pairs(
    spark: SparkSession,
    scores: Path,
    out: Path,
    filters: FilterSettings,
    name: str,
    none: str,
    *,
    sides: Path | None = None,
    side: str = "",
    clicks: Path | None = None,
) -> dict[str, Any]:
    """SCORES -> RELATED_PAIRS: of the pairs that compete (see `CandidateFilter`) those within the bounds, and of these
    the
    `top_t` of each query by (score descending, target id ascending). Bounds as quantiles are exact percentiles of the
    candidates' scores.

    Returns pairs after every filter, queries, notes, and the quantiles of the candidates' (corrected) scores and of the
    kept ones. Raises ValueError naming the setting that left no pair; `name` is what to call the scores, `none` what to
    say where no pair competes.
    """
    files = score_files(scores)
    compete = CandidateFilter(sides, side, filters.min_users, clicks, filters.popularity_power)
    with readable(scores):
        counted = by_file(spark, files, compete.count, COUNTED).toArrow().to_pylist()
    num_pairs = sum(of["pairs_on_side"] for of in counted)
    if not num_pairs:
        raise ValueError(f"{name}: {none}")
    bins = Counter[int]()
    for of in counted:
        bins.update(dict(zip(of["bins"], of["counts"], strict=True)))
    if not bins:
        raise ValueError(
            f"{name}: no pair has pairs.min_users (--min-users) = {filters.min_users} users (the most is "
            f"{max(of['most_users'] for of in counted)}); lower it."
        )

    def count_values(wanted: Ints) -> tuple[Floats, Ints]:
        found = by_file(spark, files, lambda file: compete.values(file, wanted), VALUES)
        rows = found.groupBy("value").agg(F.sum("count").alias("count")).toArrow()
        return rows["value"].to_numpy(), rows["count"].to_numpy()

    low, up, shares = filters.low, filters.up, list(SHARES.values())
    if filters.bounds == "quantile":
        *spread, low, up = quantiles([*shares, low, up], bins, count_values)
    else:
        spread = quantiles(shares, bins, count_values)
    strongest = by_file(spark, files, lambda file: compete.strongest(file, low, up, filters.top_t), STRONGEST).persist()
    within_bounds = figures(strongest, pairs=F.sum("chosen_from"))["pairs"]
    if not within_bounds:
        raise ValueError(
            f"{name}: no score lies in [pairs.low, pairs.up] (--low, --up) = [{filters.low}, {filters.up}] "
            f"({filters.bounds}); the scores reach from {spread[0]:.6g} to {spread[-1]:.6g}."
        )
    order = Window.partitionBy("query_id").orderBy(F.desc("score"), F.asc("target_id"))
    ranked = strongest.withColumn("rank", F.row_number().over(order)).filter(F.col("rank") <= filters.top_t)
    write_table(ranked.select(RELATED_PAIRS.names), out, ["query_id", "rank"])
    strongest.unpersist()
    kept = pq.read_table(out)
    if kept.group_by(["query_id", "target_id"]).aggregate([]).num_rows < kept.num_rows:
        raise ValueError(f"{name}: {scores} holds the same pair more than once; leave one of them.")
    return {
        "pairs_on_side": num_pairs,
        "pairs_with_min_users": bins.total(),
        "pairs_within_bounds": within_bounds,
        **pair_figures(read_table(spark, out)),
        "score_before_bounds": dict(zip(SHARES, spread, strict=True)),
        "score": dict(zip(SHARES, np.quantile(kept["score"], shares).tolist(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spark_jobs.related_pairs", description="Filter and top-t pairs.")
    parser.add_argument("--scores", type=absolute_path, required=True, help="folder written by spark_jobs.cooccurrence")
    parser.add_argument("--out", type=absolute_path, required=True, help="folder for the same columns plus rank")
    add_options(parser, FilterSettings, "low", "up", "top_t", required=True)
    add_options(parser, FilterSettings, "bounds", "min_users")
    args = parser.parse_args()
    with user_errors(), replacing(args.out, args.scores, RELATED_PAIRS.names) as out:
        filters = settings_from(args, FilterSettings)
        spark = spark_session("related_pairs")
        print(json.dumps(related_pairs(spark, args.scores, out, filters, str(args.scores), "no pairs.")))


if __name__ == "__main__":
    main()
