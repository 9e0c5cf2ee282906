"""`make dev`: both pages answer, and no process outlives it."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from docs.screenshots import wait_for
from tests.pipelines.conftest import ROOT, make_workplace

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_both_pages_answer_and_no_process_outlives_a_terminated_dev(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, {})
    dagster, mlflow = str(free_port()), str(free_port())
    command = (sys.executable, "-W", "ignore", "-m", "pipelines.dev")
    dev = workplace.start(*command, DAGSTER_PORT=dagster, MLFLOW_PORT=mlflow)
    try:
        for port in (dagster, mlflow):
            wait_for(f"http://127.0.0.1:{port}/", 400)
        descendants = psutil.Process(dev.pid).children(recursive=True)
        env = workplace.environment(DAGSTER_PORT=dagster, MLFLOW_PORT=mlflow)
        second = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert (second.returncode, second.stderr.startswith(f"error: port {dagster} is taken")) == (2, True)
    finally:
        dev.send_signal(signal.SIGTERM)
    assert dev.wait(timeout=60) == 128 + signal.SIGTERM
    assert len(descendants) >= 3  # Dagster's daemon and web server, MLflow
    _, alive = psutil.wait_procs(descendants, timeout=30)
    assert alive == []
    assert not any(word in workplace.log.read_text() for word in ("Supersession", "superseded", "BetaWarning"))
