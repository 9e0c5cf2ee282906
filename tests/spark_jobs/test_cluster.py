"""A job on a standalone cluster, a master and two workers on loopback: the same bytes as locally."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pyspark
import pytest
from pyspark.sql import SparkSession

from spark_jobs import cooccurrence as job
from spark_jobs import related_pairs as relate
from spark_jobs.session import java_home
from tests.conftest import QUICK_JVM
from tests.spark_jobs.test_source import write_csv
from tests.waiting import wait_for

SPARK = Path(pyspark.__file__).parent
HOST = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def process(log: Path, *command: str, env: dict[str, str]) -> Iterator[None]:
    with log.open("w") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as running:
        try:
            yield
        finally:
            running.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The master's address, and the environment that spark-submit needs."""
    port = free_port()
    env = os.environ | {
        "JAVA_HOME": java_home(), "SPARK_HOME": str(SPARK), "SPARK_LOCAL_IP": HOST, "PYSPARK_PYTHON": sys.executable,
        "JDK_JAVA_OPTIONS": QUICK_JVM,
    }  # fmt: skip
    start = str(SPARK / "bin" / "spark-class"), "org.apache.spark.deploy"
    address = f"spark://{HOST}:{port}"
    with ExitStack() as running:
        master = [f"{start[1]}.master.Master", "--host", HOST, "--port", str(port), "--webui-port", "0"]
        running.enter_context(process(tmp_path / "master.log", start[0], *master, env=env))
        for n in range(2):
            folder = str(tmp_path / f"worker{n}")
            worker = [f"{start[1]}.worker.Worker", "--host", HOST, "--webui-port", "0", "--cores", "1",
                      "--memory", "1g", "--work-dir", folder, address]  # fmt: skip
            running.enter_context(process(tmp_path / f"worker{n}.log", start[0], *worker, env=env))
        wait_for(lambda: (tmp_path / "master.log").read_text().count("Registering worker") == 2)
        yield address, env


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    user, note, time_, clicked = (rng.integers(0, size, 600).tolist() for size in (20, 30, 9999, 2))
    lines = [f"u{u},n{n},{t},{('view', 'click')[c]}" for u, n, t, c in zip(user, note, time_, clicked, strict=True)]
    return write_csv(tmp_path / "events.csv", lines)


def test_the_same_bytes_as_in_local_mode(
    cluster: tuple[str, dict[str, str]], log: Path, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By spark-submit, and by Spark Connect: a server on the cluster, and a client that has no JVM."""
    address, env = cluster
    settings = {"spark.executor.memory": "600m", "spark.driver.host": HOST, "spark.ui.enabled": "false",
                "spark.sql.shuffle.partitions": "2"}  # fmt: skip
    options = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
    submit = str(SPARK / "bin" / "spark-submit"), "--master", address, *options
    arguments = "--events", str(log), "--out"

    def run(*command: str, **more: str) -> None:
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    run(*submit, str(job.__file__), *arguments, "cluster")
    port = free_port()
    server = "--class", "org.apache.spark.sql.connect.service.SparkConnectServer"
    serve = *submit, *server, "--conf", f"spark.connect.grpc.binding.port={port}", "spark-internal"
    with process(tmp_path / "server.log", *serve, env=env):
        wait_for(lambda: "Spark Connect server started" in (tmp_path / "server.log").read_text())
        more = {"SPARK_REMOTE": f"sc://{HOST}:{port}", "PYTHONPATH": str(Path(job.__file__).parents[1])}
        run(sys.executable, "-m", job.__name__, *arguments, "connect", **more)
        filters = "--low", "0", "--up", "1", "--top-t", "2"
        run(sys.executable, "-m", relate.__name__, "--scores", "connect", "--out", "pairs", *filters, **more)

    monkeypatch.setattr(job, "spark_session", lambda name: spark)
    monkeypatch.setattr(sys, "argv", ["cooccurrence", *arguments, str(tmp_path / "local")])
    job.main()
    submitted, connected, here = (
        {f.name: f.read_bytes() for f in (tmp_path / place).iterdir()} for place in ("cluster", "connect", "local")
    )
    assert sorted(here) == ["part-00000.parquet", "part-00001.parquet"] and submitted == connected == here
    assert pq.read_table(tmp_path / "pairs")["rank"].to_numpy().max() == 2
