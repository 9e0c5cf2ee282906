"""The jobs' commands on a standalone cluster, by spark-submit: the same bytes as locally."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from spark_jobs import cooccurrence, related_pairs
from tests.cluster import standalone_cluster
from tests.spark_jobs.test_source import write_csv


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    user, note, time_, clicked = (rng.integers(0, size, 600).tolist() for size in (20, 30, 9999, 2))
    lines = [f"u{u},n{n},{t},{('view', 'click')[c]}" for u, n, t, c in zip(user, note, time_, clicked, strict=True)]
    return write_csv(tmp_path / "events.csv", lines)


def test_the_same_bytes_as_in_local_mode(
    log: Path, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(place: Path) -> dict[str, list[str]]:
        scores, filters = str(place / "scores"), ["--low", "0.1", "--up", "0.9", "--top-t", "2", "--bounds", "quantile"]
        return {
            "cooccurrence": ["--events", str(log), "--out", scores],
            "related_pairs": ["--scores", scores, "--out", str(place / "pairs"), *filters],
        }

    jobs = {"cooccurrence": cooccurrence, "related_pairs": related_pairs}
    places = {name: tmp_path / name for name in ("submitted", "local")}
    with standalone_cluster(tmp_path / "cluster") as cluster:
        for name, options in arguments(places["submitted"]).items():
            command = [*cluster.submit, str(jobs[name].__file__), *options]
            done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        assert min(cluster.tasks()) > 0

    for name, options in arguments(places["local"]).items():
        monkeypatch.setattr(jobs[name], "spark_session", lambda name: spark)
        monkeypatch.setattr(sys, "argv", [name, *options])
        jobs[name].main()
    submitted, here = ({f.name: f.read_bytes() for f in (place / "scores").iterdir()} for place in places.values())
    assert sorted(here) == ["part-00000.parquet", "part-00001.parquet"]
    assert submitted == here
    # Spark's own files may name their encodings in another order, and say where their columns came from.
    pairs = [pq.read_table(place / "pairs").replace_schema_metadata() for place in places.values()]
    assert pairs[0].num_rows == 60 and pairs[0] == pairs[1]
