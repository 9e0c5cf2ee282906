"""The jobs' commands on a standalone cluster: the same bytes as locally."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from spark_jobs import cooccurrence, related_pairs
from tests.spark_jobs.test_source import write_csv
from tests.support.cluster import Cluster


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    user, note, time_, clicked = (rng.integers(0, size, 600).tolist() for size in (20, 30, 9999, 2))
    lines = [f"u{u},n{n},{t},{('view', 'click')[c]}" for u, n, t, c in zip(user, note, time_, clicked, strict=True)]
    return write_csv(tmp_path / "events.csv", lines)


def test_the_same_bytes_as_in_local_mode(
    log: Path,
    spark: SparkSession,
    cluster: Cluster,
    connect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The jobs run by spark-submit, and the first of them also by Spark Connect: a server on the cluster, and a client
    that has no JVM. (tests/pipelines/test_cluster.py runs all jobs of the graph by Spark Connect.)
    """

    def arguments(out: Path) -> dict[str, list[str]]:
        scores, filters = str(out / "scores"), ["--low", "0.1", "--up", "0.9", "--top-t", "2", "--bounds", "quantile"]
        return {
            "cooccurrence": ["--events", str(log), "--out", scores],
            "related_pairs": ["--scores", scores, "--out", str(out / "pairs"), *filters],
        }

    jobs = {"cooccurrence": cooccurrence, "related_pairs": related_pairs}
    outs = {name: tmp_path / name for name in ("submitted", "connected", "local")}

    def run(*command: str, **more: str) -> None:
        done = subprocess.run(command, env=cluster.environment | more, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    tasks = [cluster.tasks()]
    for name, options in arguments(outs["submitted"]).items():
        run(*cluster.submit, str(jobs[name].__file__), *options)
    tasks.append(cluster.tasks())
    options, package = arguments(outs["connected"])["cooccurrence"], str(Path(cooccurrence.__file__).parents[1])
    run(sys.executable, "-m", cooccurrence.__name__, *options, SPARK_REMOTE=connect_server, PYTHONPATH=package)
    tasks.append(cluster.tasks())
    for worker in zip(*tasks, strict=True):
        assert worker[0] < worker[1] < worker[2]  # both workers had tasks, both times
    for name, options in arguments(outs["local"]).items():
        monkeypatch.setattr(jobs[name], "spark_session", lambda name: spark)
        monkeypatch.setattr(sys, "argv", [name, *options])
        jobs[name].main()
    submitted, connected, local = (
        {f.name: f.read_bytes() for f in (out / "scores").iterdir()} for out in outs.values()
    )
    assert sorted(local) == ["part-00000.parquet", "part-00001.parquet"]
    assert submitted == connected == local
    # Spark's own files may name their encodings in another order, and say where their columns came from.
    pairs = [pq.read_table(outs[name] / "pairs").replace_schema_metadata() for name in ("submitted", "local")]
    assert pairs[0].num_rows == 60 and pairs[0] == pairs[1]
