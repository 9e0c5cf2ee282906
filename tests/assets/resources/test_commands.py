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

from assets.resources.commands import run_command
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


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone"]])
def test_a_users_error_is_the_description_of_the_failure(tmp_path: Path, launcher: list[str]) -> None:
    """A launcher between the step and the command, which ends with another message and exit code, changes nothing."""
    script = tmp_path / "command.py"
    script.write_text(
        "from notellm2_core.runtime.errors import user_errors\nwith user_errors(): raise ValueError('set x')"
    )
    failure = _failure(_step(tmp_path, [sys.executable, *launcher, str(script)]))
    assert failure is not None and failure.description == "set x"


def test_a_crash_shows_its_traceback(tmp_path: Path) -> None:
    failure = _failure(_step(tmp_path, [sys.executable, "-c", "1 / 0"]))
    assert failure is not None and "exit code 1" in str(failure.description)
    assert "ZeroDivisionError" in str(failure.metadata)  # type: ignore[attr-defined]


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


def test_a_step_ends_with_its_killed_run(tmp_path: Path) -> None:
    """Dagster's executor starts a process for a step. That process would continue if the run's process were killed."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
            import multiprocessing, os, pathlib, time
            from assets.resources.commands import end_with_run

            def step():
                end_with_run()
                pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
                time.sleep(300)

            if __name__ == "__main__":
                multiprocessing.get_context("spawn").Process(target=step).start()
        """)
    )
    run = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    run.kill()
    run.wait()
    wait_for(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())), 10)
