"""Long work: lines in a log, at most one in ten seconds; a bar in a terminal."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from notellm2_core.runtime.progress import TO_TERMINAL
from notellm2_core.training.state.metrics import Progress

WORK = """
import time
from notellm2_core.runtime import progress
progress.LINE_SECONDS = {seconds}
for _ in progress.ProgressBar(range(60), desc="features", unit="notes"):
    time.sleep(0.02)
"""


def run(seconds: float, stderr: int = subprocess.PIPE, **variables: str) -> str:
    code = [sys.executable, "-c", WORK.format(seconds=seconds)]
    environment = {name: value for name, value in os.environ.items() if name != TO_TERMINAL} | variables
    done = subprocess.run(code, env=environment, stderr=stderr, check=True)
    return (done.stderr or b"").decode()


def test_a_log_gets_a_line_in_each_period_and_one_at_the_end() -> None:
    """60 notes take 1.2 seconds or more. With a period of 0.25 s a busy machine may miss some of the lines."""
    lines = run(0.25).splitlines()
    assert 2 <= len(lines) <= 40 and "\r" not in "".join(lines)
    assert all(re.fullmatch(r"features: \d+/60 notes, \d+ %, \d\d:\d\d so far, \S+ to go", line) for line in lines)
    assert lines[-1].startswith("features: 60/60 notes, 100 %")
    done = [int(line.split()[1].split("/")[0]) for line in lines]
    assert done == sorted(done) and done[0] >= 5


def test_short_work_is_silent_in_a_log() -> None:
    assert run(10) == ""


def test_a_terminal_gets_a_bar_also_through_a_pipe() -> None:
    assert "features: 100%|" in run(10, **{TO_TERMINAL: "1"})
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    run(10, stderr=terminal)
    os.close(terminal)
    assert b"features: 100%|" in os.read(ours, 1 << 16)
    os.close(ours)


def test_training_logs_at_most_a_line_in_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,000 reports in no time the logs get the validation and the last; metrics.jsonl gets all."""
    dagster: list[str] = []
    progress = Progress(tmp_path / "metrics.jsonl", 0, 1000, log=dagster.append)
    for step in range(1, 1001):
        progress.add(8, 90, 990, {"loss": 1.0})
        progress.report(step, {"loss": 1.0}, always=step == 500)
    progress.close()
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [line.split(",")[0] for line in dagster] == ["step 500/1000", "step 1000/1000"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1000

    for name in ("runtime.progress", "training.state.metrics"):
        monkeypatch.setattr(f"notellm2_core.{name}.LINE_SECONDS", 0)
    progress = Progress(tmp_path / "metrics.jsonl", 0, 1000, log=dagster.append)
    progress.report(1, {"loss": 2.0})
    capsys.readouterr()
    progress.add(8, 90, 990, {"loss": 1.0})
    assert capsys.readouterr().err.endswith("to go, loss 2\n")  # of the last report
    assert dagster[-1].startswith("step 1/1000") and dagster[-1].endswith("loss 2")
    progress.close()
