"""Section 2.3: drop pairs whose co-occurrence score is an outlier, then take the strongest targets of each query.

python -m spark_jobs.related_pairs --scores DIR --out DIR --low 0.01 --up 30 --top-t 3
spark-submit --master spark://HOST:7077 spark_jobs/related_pairs.py --scores DIR --out DIR ...
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from spark_jobs.common.tables import aggregates, pair_counts, read_table, readable, replacing, write_table
from spark_jobs.scoring.arrays import Floats, Ints
from spark_jobs.scoring.filter_files import (
    CANDIDATE_COUNTS,
    SCORE_VALUES,
    STRONGEST,
    CandidateFilter,
    by_file,
    score_files,
)
from spark_jobs.scoring.quantiles import SHARES, quantiles


@dataclass(frozen=True)
class ScoredWindow:
    """A window of scored pairs: the split that its notes belong to, and the clicks on its targets."""

    name: str  # "train" or "test"; without a split the folder of scores. Error messages begin with it
    note_split: Path | None = None  # NOTE_SPLIT; None: all notes
    split: str = ""  # "train" or "pool"
    clicks: Path | None = None  # TARGET_CLICKS, for the popularity correction

    @property
    def no_pair(self) -> str:
        """The error message for a window without pairs."""
        if self.note_split is None:
            return f"{self.name}: no pairs."
        members = "candidate pool" if self.split == "pool" else f"{self.split} split"
        settings = f"window.{self.name}_days, split.by or split.pool_share"
        return f"{self.name}: no pair has both notes in the {members}; set {settings}."


def relate(spark: SparkSession, scores: Path, note_split: Path, out: Path, filters: FilterSettings) -> dict[str, Any]:
    """`scores/{train,test}` with `scores/{train,test}_clicks` -> `out/train`, `out/test` (RELATED_PAIRS).

    `note_split` (NOTE_SPLIT) puts both notes of a training pair in the train split, and both notes of a test pair in
    the candidate pool. Returns the counts of `related_pairs` by window. The workers read the folders, so all machines
    must share them.
    """
    counts = {}
    for name, split in (("train", "train"), ("test", "pool")):
        window = ScoredWindow(name, note_split, split, scores / f"{name}_clicks")
        counts[name] = related_pairs(spark, scores / name, out / name, filters, window)
    return counts


def related_pairs(
    spark: SparkSession, scores: Path, out: Path, filters: FilterSettings, window: ScoredWindow
) -> dict[str, Any]:
    """SCORES -> RELATED_PAIRS: the `top_t` candidates within the bounds for each query.

    A candidate has at least `min_users` users. `popularity_power` corrects its score (`CandidateFilter`). Candidates
    are ordered by (score descending, target id ascending). Bounds given as quantiles are exact quantiles of the
    candidates' scores.

    Returns the number of pairs that each filter leaves, the numbers of queries and notes, and the quantiles of the
    candidates' (corrected) scores and of the related pairs' scores. Raises ValueError naming the setting that leaves no
    pair.
    """
    files = score_files(scores)
    candidates = CandidateFilter(
        window.note_split, window.split, filters.min_users, window.clicks, filters.popularity_power
    )
    with readable(scores):
        file_counts = by_file(spark, files, candidates.count, CANDIDATE_COUNTS).toArrow().to_pylist()
    num_in_split, bins = _merged_counts(file_counts, window, filters)

    def count_values(bin_numbers: Ints) -> tuple[Floats, Ints]:
        values = by_file(spark, files, lambda file: candidates.values(file, bin_numbers), SCORE_VALUES)
        rows = values.groupBy("value").agg(F.sum("count").alias("count")).toArrow()
        return rows["value"].to_numpy(), rows["count"].to_numpy()

    low, up, shares = filters.low, filters.up, list(SHARES.values())
    if filters.bounds == "quantile":
        *spread, low, up = quantiles([*shares, low, up], bins, count_values)
    else:
        spread = quantiles(shares, bins, count_values)
    strongest = by_file(spark, files, lambda file: candidates.strongest(file, low, up, filters.top_t), STRONGEST)
    strongest = strongest.persist()
    num_within = aggregates(strongest, pairs=F.sum("chosen_from"))["pairs"]
    if not num_within:
        raise ValueError(
            f"{window.name}: no score lies in [pairs.low, pairs.up] (--low, --up) = [{filters.low}, {filters.up}]"
            f" ({filters.bounds}); the scores reach from {spread[0]:.6g} to {spread[-1]:.6g}."
        )
    order = Window.partitionBy("query_id").orderBy(F.desc("score"), F.asc("target_id"))
    ranked = strongest.withColumn("rank", F.row_number().over(order)).filter(F.col("rank") <= filters.top_t)
    write_table(ranked.select(RELATED_PAIRS.names), out, ["query_id", "rank"])
    strongest.unpersist()
    related = pq.read_table(out)
    if related.group_by(["query_id", "target_id"]).aggregate([]).num_rows < related.num_rows:
        raise ValueError(f"{window.name}: {scores} holds the same pair more than once: a pair has one score.")
    return {
        "pairs_on_side": num_in_split,
        "pairs_with_min_users": bins.total(),
        "pairs_within_bounds": num_within,
        **pair_counts(read_table(spark, out)),
        "score_before_bounds": dict(zip(SHARES, spread, strict=True)),
        "score": dict(zip(SHARES, np.quantile(related["score"], shares).tolist(), strict=True)),
    }


def _merged_counts(
    file_counts: Sequence[Mapping[str, Any]], window: ScoredWindow, filters: FilterSettings
) -> tuple[int, Counter[int]]:
    """CANDIDATE_COUNTS of all files -> the number of pairs in the split, and of candidates by the bin of their score.

    Raises ValueError where there is no pair, and where there is no candidate.
    """
    num_in_split = sum(row["pairs_on_side"] for row in file_counts)
    if not num_in_split:
        raise ValueError(window.no_pair)
    bins = Counter[int]()
    for row in file_counts:
        bins.update(dict(zip(row["bins"], row["counts"], strict=True)))
    if not bins:
        raise ValueError(
            f"{window.name}: no pair has pairs.min_users (--min-users) = {filters.min_users} users (the most is "
            f"{max(row['most_users'] for row in file_counts)}); lower it."
        )
    return num_in_split, bins


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
        print(json.dumps(related_pairs(spark, args.scores, out, filters, ScoredWindow(str(args.scores)))))


if __name__ == "__main__":
    main()
