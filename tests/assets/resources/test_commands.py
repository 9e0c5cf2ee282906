"""A command as a step: its error message, its crash, and that none of its processes outlives the step."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import dagster as dg
import psutil
import pytest

from assets.resources import commands
from assets.resources.commands import forked_commands, run_command
from notellm2_core.runtime.fork_server import Child, can_fork
from tests.support.waiting import wait_for


def _step(tmp_path: Path, command: list[str]) -> dg.ExecuteInProcessResult:
    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        run_command(context, command)

    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        return dg.materialize([one], instance=instance, raise_on_error=False)


def _failure(result: dg.ExecuteInProcessResult) -> dg.Failure | None:
    data = result.get_step_failure_events()[0].step_failure_data
    return data.user_failure_data  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone"]])
def test_a_users_error_is_the_description_of_the_failure(tmp_path: Path, launcher: list[str]) -> None:
    """A launcher between the step and the command, which ends with another message and exit code, changes nothing."""
    script = tmp_path / "command.py"
    script.write_text(
        "from notellm2_core.runtime.errors import user_errors\nwith user_errors(): raise ValueError('set x')"
    )
    failure = _failure(_step(tmp_path, [sys.executable, *launcher, str(script)]))
    assert failure is not None and failure.description == "set x"


@pytest.mark.slow
def test_a_crash_shows_its_traceback(tmp_path: Path) -> None:
    failure = _failure(_step(tmp_path, [sys.executable, "-c", "1 / 0"]))
    assert failure is not None and "exit code 1" in str(failure.description)
    assert "ZeroDivisionError" in str(failure.metadata)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.skipif(not can_fork(), reason="a machine with a GPU forks no commands")
def test_commands_are_forked_and_start_by_themselves_where_the_server_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_PRELOADED", ())
    started = []
    start = commands._start
    monkeypatch.setattr(commands, "_start", lambda *arguments: started.append(start(*arguments)) or started[-1])
    command = [sys.executable, "-m", "notellm2_core.model.tokenise"]
    with forked_commands():
        for number in range(2):
            failure = _failure(_step(tmp_path, command))
            assert failure is not None and "required: --config, --notes, --out" in str(failure.metadata)  # type: ignore[attr-defined]
            if number == 0:
                assert isinstance(started[0], Child)
                forks = commands._FORKS.get()
                assert forks is not None
                forks.server._process.kill()
                forks.server._process.wait()
    assert isinstance(started[1], subprocess.Popen)


@pytest.mark.slow
def test_a_command_never_takes_itself_for_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export would then write its share of the notes, and no other rank the rest."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code = "import os; assert not {'RANK', 'WORLD_SIZE'} & set(os.environ)"
    assert _step(tmp_path, [sys.executable, "-c", code]).success


@pytest.mark.slow
def test_nothing_outlives_a_killed_step(tmp_path: Path) -> None:
    """The step's process is killed; its command and the command's child end with it."""
    inner = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    code = f"""
        import sys, types
        from assets.resources.commands import run_command
        context = types.SimpleNamespace(log=types.SimpleNamespace(info=print))
        run_command(context, [sys.executable, "-c", {inner!r}])
    """
    step = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    command = int((tmp_path / "pid").read_text())
    os.kill(step.pid, signal.SIGKILL)
    step.wait()
    wait_for(lambda: not psutil.pid_exists(command))
