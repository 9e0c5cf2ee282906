"""The servers of a simulated year: Dagster's daemon, Spark for all runs, and a receiver of messages."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import dagster as dg
import pyspark
import yaml

from notellm2_core.runtime.processes import die_with_parent
from spark_jobs.common.session import java_home

BIN = Path(sys.executable).parent
MODULE = "pipelines.simulation.definitions"
_INSTANCE = Path(__file__).parents[2] / "dagster.yaml"
_SPARK_SECONDS = 180  # for the server to start
# Small tables: compiled plans, and the compiler that optimises, cost more than they save.
_SPARK = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN",
          "spark.sql.shuffle.partitions": "2", "spark.ui.enabled": "false", "spark.driver.memory": "2g"}  # fmt: skip


@dataclass
class Servers:
    """In one folder: Dagster's home, the servers' output (`log`), and the ids of the messages that were received."""

    folder: Path
    running: ExitStack
    message_ids: list[str] = field(default_factory=list)
    webhook: str = ""
    daemon: "subprocess.Popen[bytes] | None" = None

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator["Servers"]:
        """All but the daemon, which needs a configuration. At the end, all are killed."""
        (folder / "home").mkdir(parents=True)
        with ExitStack() as running:
            servers = cls(folder, running)
            servers._write_instance()
            servers._start_receiver()
            yield servers

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def _write_instance(self) -> None:
        """The repository's dagster.yaml with its folders here, and a queue that does not wait."""
        settings = yaml.safe_load(_INSTANCE.read_text().replace("base_dir: .dagster", f"base_dir: {self.home}"))
        settings["run_coordinator"]["config"] = {"dequeue_interval_seconds": 1}
        (self.home / "dagster.yaml").write_text(yaml.safe_dump(settings))

    def _start_receiver(self) -> None:
        received = self.message_ids

        class Receiver(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                received.append(self.headers["X-NoteLLM2-Id"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the ids are kept."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.running.callback(server.shutdown)
        self.webhook = f"http://127.0.0.1:{server.server_port}"

    def start_daemon(self, config: Path) -> None:
        """Start Spark, and then the daemon with the definitions of the simulation."""
        os.environ |= {"DAGSTER_HOME": str(self.home), "NOTELLM2_CONFIG": str(config)}
        os.environ.pop("DAGSTER_MODULE_NAME", None)
        _ = self.instance  # two processes that create Dagster's storage at once would collide
        os.environ["SPARK_REMOTE"] = self._start_spark()
        self.daemon = self._start("daemon", [str(BIN / "dagster-daemon"), "run", "-m", MODULE])

    def _start_spark(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        home = Path(pyspark.__file__).parent
        os.environ |= {"JAVA_HOME": java_home(), "SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1",
                       "PYSPARK_PYTHON": sys.executable}  # fmt: skip
        settings = _SPARK | {"spark.connect.grpc.binding.port": str(port), "spark.driver.host": "127.0.0.1",
                             "spark.local.dir": str(self.folder / "spark")}  # fmt: skip
        options = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
        server = ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
        self._start("spark", [str(home / "bin" / "spark-submit"), "--master", "local[2]", *options, *server])
        deadline = time.monotonic() + _SPARK_SECONDS
        while "Spark Connect server started" not in (self.folder / "spark.log").read_text():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Spark's server did not start in {_SPARK_SECONDS} s; see {self.folder}/spark.log")
            time.sleep(0.5)
        return f"sc://127.0.0.1:{port}"

    def _start(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        log = self.running.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent, cwd=_INSTANCE.parent
        )
        self.running.callback(_end, process)
        return process

    def require_alive(self) -> None:
        """Raises RuntimeError where the daemon has ended."""
        if self.daemon is None or self.daemon.poll() is not None:
            raise RuntimeError(f"Dagster's daemon has ended; see {self.log}")

    @cached_property
    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.get()

    def backfill(self, job: str, partition: str) -> None:
        """Ask the daemon for a backfill, as the UI does."""
        command = [str(BIN / "dagster"), "job", "backfill", "-m", MODULE, "-j", job, "--partitions", partition]
        done = subprocess.run([*command, "--noprompt"], cwd=_INSTANCE.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"no backfill of {partition}: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def history_bytes(self) -> int:
        """The size of Dagster's storage."""
        return sum(file.stat().st_size for file in self.home.rglob("*") if file.is_file())


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
