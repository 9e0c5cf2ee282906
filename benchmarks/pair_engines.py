"""Eq. 2 by the engines that a user would pick instead: DuckDB, Polars and ClickHouse, on two threads.

Each function reads the log (Parquet; DuckDB also CSV.gz and JSON Lines), writes `out/scores.parquet` and returns what
it spent. None has a memory limit.
"""

import os
import time
from pathlib import Path

import psutil

THREADS = 2
SQL = """
    WITH seen AS (
        SELECT user_id, note_id, min(timestamp) AS first_view, max(timestamp) FILTER (event = 'click') AS last_click
        FROM {table} GROUP BY ALL
    ), clicks AS (
        SELECT *, count(*) OVER (PARTITION BY user_id) AS n FROM seen WHERE last_click IS NOT NULL
    )
    SELECT v.note_id AS query_id, c.note_id AS target_id, sum(1.0 / n) AS score, count(*) AS num_users
    FROM seen v JOIN clicks c ON v.user_id = c.user_id
    WHERE v.first_view < c.last_click AND v.note_id <> c.note_id GROUP BY ALL
"""
_COLUMNS = "columns = {'user_id': 'VARCHAR', 'note_id': 'VARCHAR', 'timestamp': 'TIMESTAMPTZ', 'event': 'VARCHAR'}"
_READERS = {".gz": f"read_csv('{{log}}', {_COLUMNS})", ".jsonl": f"read_json('{{log}}', {_COLUMNS})"}
CLICKHOUSE_SQL = """
    INSERT INTO FUNCTION file('{out}', Parquet)
    WITH seen AS (
        SELECT user_id, note_id, min(timestamp) AS first_view, maxOrNullIf(timestamp, event = 'click') AS last_click
        FROM file('{log}', Parquet, 'user_id String, note_id String, timestamp DateTime64(6), event String')
        GROUP BY user_id, note_id
    ), clicks AS (
        SELECT *, count(*) OVER (PARTITION BY user_id) AS n FROM seen WHERE last_click IS NOT NULL
    )
    SELECT v.note_id AS query_id, c.note_id AS target_id, sum(1.0 / n) AS score, toInt64(count()) AS num_users
    FROM seen v JOIN clicks c ON v.user_id = c.user_id
    WHERE v.first_view < c.last_click AND v.note_id <> c.note_id GROUP BY query_id, target_id
    SETTINGS max_threads = {threads}
"""


class Stopwatch:
    """What this process and its children spend from now on."""

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), _cpu_seconds()

    def spent(self) -> dict[str, float]:
        """{seconds, cpu_seconds}; other work on the machine changes the second far less than the first."""
        return {"seconds": time.monotonic() - self._started, "cpu_seconds": _cpu_seconds() - self._before}


def _cpu_seconds() -> float:
    process = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def with_duckdb(log: Path, out: Path, memory: str) -> dict[str, float]:
    import duckdb

    out.mkdir()
    database = duckdb.connect(config={"threads": THREADS})
    database.execute(f"SET temp_directory = '{out.parent}/spill'; SET preserve_insertion_order = false")
    watch = Stopwatch()
    table = _READERS.get(log.suffix, "read_parquet('{log}')").replace("{log}", str(log))
    database.execute(f"COPY ({SQL.format(table=table)}) TO '{out}/scores.parquet' (FORMAT parquet)")
    return watch.spent()


def with_polars(log: Path, out: Path, memory: str) -> dict[str, float]:
    os.environ["POLARS_MAX_THREADS"] = str(THREADS)  # read when polars is imported
    import polars as pl

    out.mkdir()
    watch = Stopwatch()
    clicked_at = pl.col("timestamp").filter(pl.col("event") == "click").max()
    seen = pl.scan_parquet(log).group_by("user_id", "note_id").agg(
        pl.col("timestamp").min().alias("first_view"), clicked_at.alias("last_click")
    )  # fmt: skip
    clicks = seen.filter(pl.col("last_click").is_not_null())
    counts = clicks.group_by("user_id").agg((1.0 / pl.len()).alias("weight"))
    clicks = clicks.join(counts, on="user_id").select("user_id", "last_click", "weight", target_id="note_id")
    views = seen.select("user_id", "first_view", query_id="note_id")
    pairs = views.join(clicks, on="user_id").filter(
        (pl.col("first_view") < pl.col("last_click")) & (pl.col("query_id") != pl.col("target_id"))
    )
    sums = pl.col("weight").sum().alias("score"), pl.len().cast(pl.Int64).alias("num_users")
    pairs.group_by("query_id", "target_id").agg(*sums).sink_parquet(out / "scores.parquet", engine="streaming")
    return watch.spent()


def with_clickhouse(log: Path, out: Path, memory: str) -> dict[str, float]:
    import chdb

    out.mkdir()
    watch = Stopwatch()
    chdb.query(CLICKHOUSE_SQL.format(log=log, out=out / "scores.parquet", threads=THREADS))
    return watch.spent()


# by contender: the module it needs, and the function
ENGINES = {
    "duckdb": ("duckdb", with_duckdb),
    "polars": ("polars", with_polars),
    "clickhouse": ("chdb", with_clickhouse),
}
