"""Eq. 2 over generated logs: time, memory and growth, beside DuckDB, Polars, ClickHouse and Spark's own joins.

    .venv/bin/python benchmarks/cooccurrence.py                      everything, about an hour on two cores
    .venv/bin/python benchmarks/cooccurrence.py --millions 1 5       smaller logs only

Note popularity follows Zipf's law, user activity is log-normal with a mean of 40 events, and there are 50 events per
note. Each contender runs in its own process, from the same Parquet file to a Parquet table of scores; its time starts
when its session is ready. Contenders:
  ours          spark_jobs.cooccurrence, nobody capped
  duckdb        one SQL query, two threads
  polars        its lazy frames, on the streaming engine, two threads
  clickhouse    one SQL query by chdb, two threads
  expressions   Spark's built-in expressions: first views and last clicks of each user, then a join
  events_join   Spark, the equation literally: events joined with events, then distinct
The last two stop at --join-millions, and the engines before them at --engine-millions: they hold all pairs in memory. A
contender that is not installed (`pip install -e ".[bench]"`) is left out with a line that says so. Each result is
compared with DuckDB's, row by row. At the smallest size, `ours` runs twice and the bytes are compared. At 10 million
events, `ours` and `duckdb` also read the log as CSV.gz and as JSON Lines; and with heavy users capped as in the
pipeline, `ours` runs in turn with and without one more user of 200,000 events.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from pair_engines import ENGINES, Stopwatch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from recall_seeds import tree_memory

from notellm2_core.config.data import ScoringSettings
from notellm2_core.config.source import EventSettings
from notellm2_core.runtime.files import parquet_files

RESULTS = Path(__file__).parent / "results"
DAY = 86_400_000_000
TEXT_FORMATS = ("csv.gz", "jsonl")


def generate(num_events: int, file: Path, heavy_user: int = 0, seed: int = 0) -> None:
    """A log of two weeks; `heavy_user`: the number of events of one more user."""
    rng = np.random.default_rng(seed)
    num_users, num_notes = num_events // 40, num_events // 50
    activity = rng.lognormal(0, 1, num_users)
    popularity = 1.0 / np.arange(1, num_notes + 1) ** 0.8
    user = rng.choice(num_users, num_events, p=activity / activity.sum())
    user = np.append(user, np.full(heavy_user, num_users))
    note = rng.choice(num_notes, len(user), p=popularity / popularity.sum())
    note = rng.permutation(num_notes)[note]  # ids do not follow popularity
    start = 1_704_067_200_000_000
    ids = {"u": num_users + 1, "n": num_notes}
    names = {letter: pa.array([f"{letter}{i}" for i in range(count)]) for letter, count in ids.items()}
    columns = {
        "user_id": names["u"].take(pa.array(user)),
        "note_id": names["n"].take(pa.array(note)),
        "timestamp": pa.array(start + rng.integers(0, 14 * DAY, len(user)), pa.timestamp("us", "UTC")),
        "event": pa.array(["view", "click"]).take(pa.array((rng.random(len(user)) < 0.4).astype(np.int8))),
    }
    pq.write_table(pa.table(columns), file, row_group_size=500_000)


def as_text(log: Path, form: str) -> Path:
    """The log in this format, beside itself."""
    file = log.with_name(f"{log.stem}.{form}")
    options = {"csv.gz": "FORMAT csv, COMPRESSION gzip", "jsonl": "FORMAT json"}[form]
    duckdb.connect().execute(f"COPY (FROM read_parquet('{log}')) TO '{file}' ({options})")
    return file


def ours(log: Path, out: Path, memory: str, **scoring: Any) -> dict[str, float]:
    """`scoring`: settings of ScoringSettings; by default no user is capped."""
    from spark_jobs.cooccurrence import cooccurrence
    from spark_jobs.interactions import interactions
    from spark_jobs.source import read_source_events

    spark = new_session(memory)
    watch = Stopwatch()
    is_parquet = log.suffix == ".parquet"
    events = spark.read.parquet(str(log)) if is_parquet else read_source_events(spark, log)
    names = EventSettings(view_events=("view",), click_events=("click",), ignored_events=None)
    cooccurrence(interactions(events, names), out, ScoringSettings(**{"max_user_notes": None} | scoring))
    return watch.spent()


def capped(log: Path, out: Path, memory: str) -> dict[str, float]:
    return ours(log, out, memory, max_user_notes=ScoringSettings().max_user_notes)


def expressions(log: Path, out: Path, memory: str) -> dict[str, float]:
    def scores(events: DataFrame) -> DataFrame:
        seen = events.groupBy("user_id", "note_id").agg(
            F.min("timestamp").alias("first_view"),
            F.max(F.when(F.col("event") == "click", F.col("timestamp"))).alias("last_click"),
        )
        n = F.expr("count(*) OVER (PARTITION BY user_id)")
        clicks = seen.filter("last_click IS NOT NULL").select("user_id", F.col("note_id").alias("target_id"),
                                                              "last_click", (1 / n).alias("weight"))  # fmt: skip
        views = seen.select("user_id", F.col("note_id").alias("query_id"), "first_view")
        pairs = views.join(clicks, "user_id").filter("first_view < last_click AND query_id <> target_id")
        return _summed(pairs)

    return _with_spark(log, out, memory, scores)


def events_join(log: Path, out: Path, memory: str) -> dict[str, float]:
    def scores(events: DataFrame) -> DataFrame:
        clicks = events.filter("event = 'click'")
        weights = clicks.groupBy("user_id").agg((1 / F.count_distinct("note_id")).alias("weight"))
        later = clicks.select("user_id", F.col("note_id").alias("target_id"), F.col("timestamp").alias("clicked_at"))
        pairs = events.withColumnRenamed("note_id", "query_id").join(later, "user_id")
        pairs = pairs.filter("timestamp < clicked_at AND query_id <> target_id")
        return _summed(pairs.select("user_id", "query_id", "target_id").distinct().join(weights, "user_id"))

    return _with_spark(log, out, memory, scores)


def _summed(pairs: DataFrame) -> DataFrame:
    sums = F.sum("weight").alias("score"), F.count("*").alias("num_users")
    return pairs.groupBy("query_id", "target_id").agg(*sums)


def _with_spark(log: Path, out: Path, memory: str, scores: Callable[[DataFrame], DataFrame]) -> dict[str, float]:
    spark = new_session(memory)
    watch = Stopwatch()
    scores(spark.read.parquet(str(log))).write.parquet(str(out))
    return watch.spent()


def new_session(memory: str) -> SparkSession:
    from spark_jobs.common.session import spark_session

    spark = spark_session("benchmark", "local[2]", memory, 16)
    spark.range(1000).repartition(2).mapInArrow(
        lambda batches: batches, "id long"
    ).count()  # starts the JVM and the workers
    return spark


CONTENDERS = {
    "ours": ours,
    "capped": capped,
    **{name: function for name, (_, function) in ENGINES.items()},
    "expressions": expressions,
    "events_join": events_join,
}


def measure(contender: str, log: Path, out: Path, memory: str, script: Path = Path(__file__)) -> dict[str, Any]:
    """Run one contender of `script` in its own process: seconds, CPU seconds, peak memory of the process tree."""
    shutil.rmtree(out, ignore_errors=True)
    Path(f"{out}.json").unlink(missing_ok=True)
    command = [sys.executable, str(script), "--one", contender, str(log), str(out), memory]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process, peak = psutil.Popen(command, env=environment), 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process))
        time.sleep(0.5)
    row = {"contender": contender, "peak_gb": peak / 2**30}
    if process.returncode:
        return row | {"seconds": None, "failed": process.returncode}
    return row | json.loads(Path(f"{out}.json").read_text())


def _is_installed(contender: str) -> bool:
    module = ENGINES[contender][0] if contender in ENGINES else "pyspark"
    if importlib.util.find_spec(module) is None:
        print(f"{contender} is left out: {module} is not installed.", flush=True)
        return False
    return True


def compare(actual: Path, expected: Path, slices: int) -> dict[str, Any]:
    """Pairs in either table; pairs that one lacks or whose users differ; the largest relative difference of a score."""
    database = duckdb.connect(config={"threads": 2})
    pairs, differing, error = 0, 0, 0.0
    for part in range(slices):  # the whole join would not fit into memory
        tables = [
            f"(SELECT * FROM read_parquet('{folder}/*.parquet') WHERE hash(query_id) % {slices} = {part})"
            for folder in (actual, expected)
        ]
        row = database.execute(
            f"""SELECT count(*), count(*) FILTER (a.num_users IS DISTINCT FROM b.num_users),
                       coalesce(max(abs(a.score - b.score) / b.score), 0)
                FROM {tables[0]} a FULL JOIN {tables[1]} b USING (query_id, target_id)"""
        ).fetchone()
        assert row is not None
        pairs, differing, error = pairs + row[0], differing + row[1], max(error, row[2])
    return {"pairs": pairs, "differing": differing, "max_error": error}


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in parquet_files(folder):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def run(
    millions: list[int], most: dict[str, int], heavy_millions: int, text_millions: int, memory: str, work: Path
) -> Iterator[dict[str, Any]]:
    """The results so far, after each size. most: the largest log of each contender that does not take all."""
    results: dict[str, Any] = {"sizes": []}
    installed = [name for name in CONTENDERS if name != "capped" and _is_installed(name)]
    for size in millions:
        log = work / f"log_{size}.parquet"
        generate(size * 1_000_000, log)
        rows = []
        for contender in installed:
            if size > most.get(contender, size):
                continue
            row = measure(contender, log, work / contender, memory)
            rows.append(row)
            print(json.dumps({"millions": size, **row}), flush=True)
        for row in rows:
            done = row["seconds"] is not None and (work / "duckdb.json").exists()
            if done and row["contender"] != "duckdb":
                row |= compare(work / row["contender"], work / "duckdb", size)
        for form in TEXT_FORMATS if size == text_millions else ():
            text = as_text(log, form)
            for contender in ("ours", "duckdb"):
                row = measure(contender, text, out := work / f"{contender}_text", memory)
                if row["seconds"] is not None:
                    row |= compare(out, work / "duckdb", size)
                rows.append(row | {"contender": f"{contender}, {form}"})
                print(json.dumps(rows[-1]), flush=True)
            text.unlink()
        results["sizes"].append({"millions": size, "rows": rows})
        if size == millions[0]:
            first = digest(work / "ours")
            measure("ours", log, work / "ours", memory)
            results["same_bytes"] = first == digest(work / "ours") if parquet_files(work / "ours") else None
        if size == heavy_millions:
            # The machine's speed changes with the hour: with and without the heavy user in turn.
            heavy = work / "log_heavy.parquet"
            generate(size * 1_000_000, heavy, heavy_user=200_000)
            seconds: dict[str, list[float]] = {"without": [], "with": []}
            for _ in range(2):
                for name, file in (("without", log), ("with", heavy)):
                    seconds[name].append(measure("capped", file, work / "ours", memory)["seconds"])
            results["heavy_user"] = seconds
            print(json.dumps(seconds), flush=True)
            heavy.unlink()
        for file in work.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        yield results


def exponent(sizes: list[dict[str, Any]], contender: str) -> float | None:
    """The exponent of a power law from the smallest to the largest size."""
    times = [(s["millions"], r["seconds"]) for s in sizes for r in s["rows"] if r["contender"] == contender]
    if len(times) < 2:
        return None
    (small, fast), (large, slow) = times[0], times[-1]
    return math.log(slow / fast) / math.log(large / small)


def to_markdown(results: dict[str, Any], memory: str) -> str:
    total = psutil.virtual_memory().total >> 30
    lines = [
        "# Co-occurrence scores (Eq. 2)",
        "",
        f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, {total} GB, Python "
        f"{platform.python_version()}. Command: `python {' '.join(sys.argv)}`; Spark's driver has {memory}.",
        "",
        "| million events | contender | seconds | CPU seconds | peak memory, GB | pairs | differing | largest error |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size, r in ((s["millions"], r) for s in results["sizes"] for r in s["rows"]):
        seconds = (
            f"failed ({r['failed']}) | " if r["seconds"] is None else f"{r['seconds']:.1f} | {r['cpu_seconds']:.1f}"
        )
        agreement = f"{r['pairs']:,} | {r['differing']} | {r['max_error']:.0e}" if "pairs" in r else " | | "
        lines.append(f"| {size} | {r['contender']} | {seconds} | {r['peak_gb']:.1f} | {agreement} |")
    for contender in ("ours", *ENGINES):
        if (power := exponent(results["sizes"], contender)) is not None:
            lines += [
                "",
                f"Growth of {contender} from the smallest log to the largest: events to the power {power:.2f}.",
            ]
    lines += ["", f"Two runs of ours at the smallest size wrote the same bytes: {results['same_bytes']}."]
    if heavy := results.get("heavy_user"):
        heavy = {name: [math.nan if s is None else s for s in seconds] for name, seconds in heavy.items()}
        more = 100 * (sum(heavy["with"]) / sum(heavy["without"]) - 1)
        runs = {name: " and ".join(f"{s:.1f}" for s in seconds) for name, seconds in heavy.items()}
        lines += ["", f"A user of 200,000 events more: {runs['with']} s, without {runs['without']} s ({more:+.0f} %)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 5, 10, 30], help="events of the logs")
    parser.add_argument("--join-millions", type=int, default=10, help="the largest log for Spark's joins")
    parser.add_argument("--engine-millions", type=int, default=30, help="the largest log for the other engines")
    parser.add_argument("--heavy-millions", type=int, default=10, help="the log that gets a heavy user")
    parser.add_argument("--text-millions", type=int, default=10, help="the log that is read as text, too")
    parser.add_argument("--memory", default="3g", help="of Spark's driver")
    parser.add_argument("--one", nargs=4, metavar=("CONTENDER", "LOG", "OUT", "MEMORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        contender, log, out, memory = options.one
        spent = CONTENDERS[contender](Path(log), Path(out), memory)
        Path(f"{out}.json").write_text(json.dumps(spent))
        return
    with tempfile.TemporaryDirectory() as work:
        most = dict.fromkeys(ENGINES, options.engine_millions)
        most |= dict.fromkeys(("expressions", "events_join"), options.join_millions)
        extra = options.heavy_millions, options.text_millions
        for results in run(sorted(options.millions), most, *extra, options.memory, Path(work)):
            (RESULTS / "cooccurrence.json").write_text(json.dumps(results, indent=1))
            (RESULTS / "cooccurrence.md").write_text(text := to_markdown(results, options.memory))
    print(text)


if __name__ == "__main__":
    main()
