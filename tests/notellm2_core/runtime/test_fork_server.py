"""A forked command runs like a started one, and no process outlives the one that started the server."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from notellm2_core.runtime.errors import ERROR_FILE
from notellm2_core.runtime.fork_server import Child, ForkServer
from tests.support.waiting import wait_for

COMMAND = "tests.support.commands"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(["tests.support.import_marker"], os.environ) as server:
        yield server


def _start(server: ForkServer, how: str, tmp_path: Path, **env: str) -> Child:
    with (tmp_path / "errors").open("w") as errors:
        return server.start(["-m", COMMAND, how, str(tmp_path / "out")], {**os.environ, **env}, errors.fileno())


def _report(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out").read_text())


def test_arguments_environment_group_and_errors_are_its_own(server: ForkServer, tmp_path: Path) -> None:
    child = _start(server, "end", tmp_path, WORD="hello")
    assert child.wait() == child.wait() == 0
    report = _report(tmp_path)
    assert report["pid"] == report["group"] == child.pid and report["WORD"] == "hello"
    assert (tmp_path / "errors").read_text() == "on its way\n"
    assert "WORD" not in os.environ
    _start(server, "end", tmp_path).wait()
    assert _report(tmp_path)["WORD"] is None  # it has nothing of the previous command


def test_imports_are_done_and_what_they_set_is_there(server: ForkServer, tmp_path: Path) -> None:
    """torch_compat limits a cache by a variable that torch reads at the first product: without it memory grows."""
    assert "SET_BY_IMPORT" not in os.environ
    _start(server, "end", tmp_path).wait()
    assert _report(tmp_path)["preloaded"] and _report(tmp_path)["SET_BY_IMPORT"] == "128"
    _start(server, "end", tmp_path, SET_BY_IMPORT="7").wait()
    assert _report(tmp_path)["SET_BY_IMPORT"] == "7"


def test_a_users_error_a_bug_and_a_kill(server: ForkServer, tmp_path: Path) -> None:
    assert _start(server, "refuse", tmp_path, **{ERROR_FILE: str(tmp_path / "sentence")}).wait() == 2
    assert (tmp_path / "sentence").read_text() == "set x"
    assert _start(server, "crash", tmp_path).wait() == 1
    assert "RuntimeError: a bug" in (tmp_path / "errors").read_text()
    child = _start(server, "sleep", tmp_path)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert _start(server, "end", tmp_path).wait() == 0


def test_no_process_outlives_the_one_that_started_the_server(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        from notellm2_core.runtime.fork_server import ForkServer
        command = ["-m", {COMMAND!r}, "sleep", {str(tmp_path / "out")!r}]
        with ForkServer([], os.environ) as server:
            server.start(command, os.environ, sys.stderr.fileno()).wait()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_for(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text())
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) == 2  # the server and the command
    process.kill()
    process.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in descendants), 20)


def test_a_server_that_died_starts_nothing(tmp_path: Path) -> None:
    server = ForkServer([], os.environ)
    child = _start(server, "sleep", tmp_path)
    psutil.Process(child.pid).parent().kill()  # type: ignore[union-attr]
    assert child.wait() == -signal.SIGKILL
    (tmp_path / "out").unlink(missing_ok=True)  # the killed command may have written it
    with pytest.raises(OSError):
        _start(server, "end", tmp_path)
    assert not (tmp_path / "out").exists()
    server.__exit__()
