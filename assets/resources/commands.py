"""Run a pasteable command as a step: progress to the terminal, Pipes messages to Dagster, no orphan left behind."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg

from notellm2_core.runtime.errors import ERROR_FILE
from notellm2_core.runtime.fork_server import Child, ForkServer, can_fork
from notellm2_core.runtime.processes import die_with_parent

_TAIL_BYTES = 65_536
# What the commands spend their first seconds on. Their own modules are not among them.
_PRELOADED = ("notellm2_core.training.data.dataset", "notellm2_core.model.build", "timm")
_SERVER: ContextVar[ForkServer | None] = ContextVar("fork_server", default=None)


@contextmanager
def forked_commands() -> Iterator[None]:
    """Inside, commands are forked from one process that has imported torch already, where this machine allows it."""
    if not can_fork():
        yield
        return
    with ForkServer(_PRELOADED, _environment()) as server:
        token = _SERVER.set(server)
        try:
            yield
        finally:
            _SERVER.reset(token)


def run_command(context: dg.AssetExecutionContext, command: Sequence[str], reports: bool = False) -> None:
    """Run `command` to its end in a process group of its own. reports: it speaks to Dagster through Pipes.

    The group is killed when this step ends in any way, and by the kernel when this process is killed. Raises
    dg.Failure: with the command's own sentence and no retry where the cause is the user's to correct
    (notellm2_core.runtime.errors), with the end of its output where it crashed.
    """
    context.log.info(f"running: {shlex.join(command)}")
    with ExitStack() as stack:
        error_file = Path(stack.enter_context(TemporaryDirectory())) / "error.txt"
        env = {**_environment(), ERROR_FILE: str(error_file)}
        if reports:
            injector, reader = dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader()
            env |= stack.enter_context(dg.open_pipes_session(context, injector, reader)).get_bootstrap_env_vars()
        output, stderr = os.pipe()
        stack.callback(os.close, output)
        process = _start(command, env, stderr)
        try:
            tail = _forward(output)
            code = process.wait()
        finally:
            _kill_group(process)
        if code == 0:
            return
        if error_file.exists():
            raise dg.Failure(error_file.read_text(), allow_retries=False)
    raise dg.Failure(
        f"the command ended with exit code {code}: {shlex.join(command)}",
        metadata={"output": dg.MetadataValue.md(f"```\n{tail[-4000:]}\n```")},
    )


def _environment() -> dict[str, str]:
    # Passive: on a busy machine, threads that spin while they wait take the cores from those that work.
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"}


def _start(command: Sequence[str], env: Mapping[str, str], stderr: int) -> "subprocess.Popen[bytes] | Child":
    """Start `command` in a session of its own, with its errors written to `stderr`, which is closed here."""
    server = _SERVER.get()
    try:
        if server is not None and command[1] == "-m" and command[2].startswith("notellm2_core."):
            return server.start(command[1:], env, stderr)
        return subprocess.Popen(command, env=env, stderr=stderr, start_new_session=True, preexec_fn=die_with_parent)
    finally:
        os.close(stderr)


@cache
def end_with_run() -> None:
    """Kill this process when that of the run, which started it for a step, is killed. Dagster would let it go on, and
    the next run would meet its training. Does nothing where the step is run by the process of the run itself.
    """
    if (run := multiprocessing.parent_process()) is not None:

        def watch() -> None:
            run.join()
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True, name="end-with-run").start()


def _forward(output: int) -> str:
    """Copy the child's errors to ours as they come (progress bars included); return their last part."""
    tail = b""
    while chunk := os.read(output, 4096):
        os.write(sys.stderr.fileno(), chunk)
        tail = (tail + chunk)[-_TAIL_BYTES:]
    return tail.decode(errors="replace").replace("\r", "\n")


def _kill_group(process: "subprocess.Popen[bytes] | Child") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
