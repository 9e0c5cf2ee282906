"""Section 2.3 on a large table of scores: time and memory of the filters, of plain Spark, and of Swing's scores.

    .venv/bin/python benchmarks/related_pairs.py [--millions 5]

The log is that of cooccurrence.py. Each step runs in its own process; its time starts when its session is ready:
  cooccurrence   Eq. 2, the scores that both filters read
  swing          the alternative score, from the same log
  filters        spark_jobs.related_pairs: both windows (with equal scores), a tenth of the notes in the pool; it also
                 counts the pairs that each filter leaves, and computes exact quantiles of the scores
  plain          only the same pairs, by Spark's joins and a window
The two tables of pairs are compared row by row.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from cooccurrence import RESULTS, generate, measure, new_session, ours
from pair_engines import Stopwatch
from pyspark.sql import Window
from pyspark.sql import functions as F

from notellm2_core.schema import RELATED_PAIRS

LOW, UP, TOP_T = 0.01, 30.0, 3  # the paper's bounds


def cooccurrence(log: Path, out: Path, memory: str) -> dict[str, float]:
    return ours(log, out / "train", memory)


def swing(log: Path, out: Path, memory: str) -> dict[str, float]:
    return ours(log, out, memory, score="swing")


def filters(log: Path, out: Path, memory: str) -> dict[str, float]:
    from notellm2_core.config.data import FilterSettings
    from spark_jobs.related_pairs import relate

    spark = new_session(memory)
    watch = Stopwatch()
    scores, note_split = log.parent / "cooccurrence", log.parent / "note_split"
    relate(spark, scores, note_split, out, FilterSettings(low=LOW, up=UP, top_t=TOP_T))
    return watch.spent()


def plain(log: Path, out: Path, memory: str) -> dict[str, float]:
    spark = new_session(memory)
    watch = Stopwatch()
    splits = spark.read.parquet(str(log.parent / "note_split"))
    for window, split in (("train", "train"), ("test", "pool")):
        notes = splits.filter(F.col("side") == split).select("note_id")
        pairs = spark.read.parquet(str(log.parent / "cooccurrence" / window))
        pairs = pairs.filter(F.col("score").between(LOW, UP))
        for end in ("query_id", "target_id"):
            pairs = pairs.join(notes.withColumnRenamed("note_id", end), end)
        order = Window.partitionBy("query_id").orderBy(F.desc("score"), "target_id")
        ranked = pairs.withColumn("rank", F.row_number().over(order)).filter(F.col("rank") <= TOP_T)
        ranked.select(RELATED_PAIRS.names).write.parquet(str(out / window))
    return watch.spent()


STEPS = {"cooccurrence": cooccurrence, "swing": swing, "filters": filters, "plain": plain}


def run(millions: int, memory: str, work: Path) -> dict[str, Any]:
    log = work / "log.parquet"
    generate(millions * 1_000_000, log)
    notes = pq.read_table(log, columns=["note_id"])["note_id"].unique()
    split = np.where(np.random.default_rng(0).random(len(notes)) < 0.9, "train", "pool")
    (work / "note_split").mkdir()
    pq.write_table(pa.table({"note_id": notes, "side": split}), work / "note_split" / "part-00000.parquet")
    rows = []
    for step in STEPS:
        rows.append(measure(step, log, work / step, memory, Path(__file__)))
        print(json.dumps(rows[-1]), flush=True)
        if rows[-1]["seconds"] is None:
            raise SystemExit(f"{step} failed: {rows[-1]['failed']}")
        if step == "cooccurrence":
            os.symlink("train", work / step / "test")
    order = [("query_id", "ascending"), ("rank", "ascending")]
    tables = [
        [pq.read_table(work / step / window).sort_by(order).select(RELATED_PAIRS.names) for window in ("train", "test")]
        for step in ("filters", "plain")
    ]
    scores = sum(pq.read_metadata(file).num_rows for file in (work / "cooccurrence" / "train").iterdir())
    same = all(a.to_pydict() == b.to_pydict() for a, b in zip(*tables, strict=True))
    return {"rows": rows, "scores": scores, "pairs": [table.num_rows for table in tables[0]], "same": same}


def to_markdown(results: dict[str, Any], millions: int, memory: str) -> str:
    total = psutil.virtual_memory().total >> 30
    train, test = results["pairs"]
    lines = [
        "# Related pairs of a large table of scores (section 2.3)",
        "",
        f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, {total} GB, Python "
        f"{platform.python_version()}. Command: `python {' '.join(sys.argv)}`; Spark's driver has {memory}.",
        "",
        f"{millions} million events, {results['scores']:,} scored pairs, of which [{LOW}, {UP}] and the top {TOP_T} "
        f"leave {train:,} for training and {test:,} in the pool.",
        "",
        "| step | seconds | peak memory, GB |",
        "| --- | ---: | ---: |",
    ]
    for r in results["rows"]:
        lines.append(f"| {r['contender']} | {r['seconds']:.1f} | {r['peak_gb']:.1f} |")
    return "\n".join([*lines, "", f"Both filters leave the same rows: {results['same']}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=5, help="events of the log")
    parser.add_argument("--memory", default="3g", help="of Spark's driver")
    parser.add_argument("--one", nargs=4, metavar=("STEP", "LOG", "OUT", "MEMORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        step, log, out, memory = options.one
        spent = STEPS[step](Path(log), Path(out), memory)
        Path(f"{out}.json").write_text(json.dumps(spent))
        return
    with tempfile.TemporaryDirectory() as work:
        results = run(options.millions, options.memory, Path(work))
    (RESULTS / "related_pairs.json").write_text(json.dumps(results, indent=1))
    (RESULTS / "related_pairs.md").write_text(text := to_markdown(results, options.millions, options.memory))
    print(text)


if __name__ == "__main__":
    main()
