"""A standalone Spark cluster, a master and two workers on loopback, with room for two applications at once."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyspark

from spark_jobs.common.session import java_home
from tests.support.jvm import UNCOMPILED, quick_jvm
from tests.support.waiting import wait_for

SPARK = Path(pyspark.__file__).parent
HOST = "127.0.0.1"
SETTINGS = {
    "spark.executor.memory": "600m", "spark.executor.cores": "1", "spark.cores.max": "2",  # one on each worker
    "spark.driver.host": HOST, "spark.ui.enabled": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    folder: Path  # for logs
    address: str

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "JAVA_HOME": java_home(), "SPARK_HOME": str(SPARK), "SPARK_LOCAL_IP": HOST,
            "PYSPARK_PYTHON": sys.executable, "JDK_JAVA_OPTIONS": quick_jvm(),
        }  # fmt: skip

    @property
    def submit(self) -> list[str]:
        """The start of a spark-submit command: all but the application and its arguments."""
        settings = SETTINGS | {"spark.sql.shuffle.partitions": "2"}
        return [str(SPARK / "bin" / "spark-submit"), "--master", self.address, *_options(settings)]

    def tasks(self) -> list[int]:
        """Number of tasks that each worker has begun so far. Tasks that ran elsewhere do not count."""
        logs = [self.folder.glob(f"worker{n}/app-*/*/stderr") for n in range(2)]
        return [sum(log.read_text().count("Running task") for log in worker_logs) for worker_logs in logs]

    @contextmanager
    def process(self, name: str, *command: str) -> Iterator[Path]:
        """Run `command` during the block. Yields its log."""
        log = self.folder / f"{name}.log"
        with log.open("w") as out, subprocess.Popen(command, env=self.environment, stdout=out, stderr=out) as running:
            try:
                yield log
            finally:
                running.kill()

    @contextmanager
    def connect_server(self) -> Iterator[str]:
        """A Spark Connect server on the cluster: its address, as SPARK_REMOTE takes it."""
        port = free_port()
        server = "--class", "org.apache.spark.sql.connect.service.SparkConnectServer"
        command = (
            *self.submit,
            *_options(UNCOMPILED),
            *server,
            "--conf",
            f"spark.connect.grpc.binding.port={port}",
            "spark-internal",
        )
        with self.process("server", *command) as log:
            wait_for(lambda: "Spark Connect server started" in log.read_text())
            yield f"sc://{HOST}:{port}"


@contextmanager
def standalone_cluster(folder: Path) -> Iterator[Cluster]:
    folder.mkdir()
    port = free_port()
    cluster = Cluster(folder, f"spark://{HOST}:{port}")
    start = str(SPARK / "bin" / "spark-class")
    master = "org.apache.spark.deploy.master.Master", "--host", HOST, "--port", str(port), "--webui-port", "0"
    worker = "org.apache.spark.deploy.worker.Worker", "--host", HOST, "--webui-port", "0", "--cores", "2"
    with ExitStack() as running:
        running.enter_context(cluster.process("master", start, *master))
        logs = []
        for n in range(2):
            own = "--memory", "2g", "--work-dir", str(folder / f"worker{n}"), cluster.address
            logs.append(running.enter_context(cluster.process(f"worker{n}", start, *worker, *own)))
        # Not the master's log: it also counts a worker that came before the master was elected and so must come again.
        wait_for(lambda: all("Successfully registered with master" in log.read_text() for log in logs))
        yield cluster


def _options(settings: dict[str, str]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]


def free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])
