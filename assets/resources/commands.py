"""Run a command that can be pasted as a step: progress to the terminal, Pipes messages to Dagster, no orphans."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg

from notellm2_core.runtime.errors import ERROR_FILE
from notellm2_core.runtime.fork_server import Child, ForkServer, can_fork
from notellm2_core.runtime.processes import die_with_parent
from notellm2_core.runtime.progress import TO_TERMINAL

_TAIL_BYTES = 65_536
# Imports that take the commands' first seconds; the commands' own modules are not among them.
_PRELOADED = ("notellm2_core.training.data.dataset", "notellm2_core.model.build", "timm")
# Variables of a surrounding launcher: with them, a command would act as one of its ranks.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FORKS: ContextVar["_Forks | None"] = ContextVar("forks", default=None)
_STAND_INS: dict[str, Callable[[Sequence[str]], None]] = {}  # module -> the function that is called in its place


class _Forks(ExitStack):
    """A fork server that starts when it is first asked for."""

    @cached_property
    def server(self) -> ForkServer:
        return self.enter_context(ForkServer(_PRELOADED, _environment()))


@contextmanager
def forked_commands() -> Iterator[None]:
    """Inside, commands are forked from one process that has already imported torch, if this machine can fork."""
    if not can_fork():
        yield
        return
    with _Forks() as forks:
        token = _FORKS.set(forks)
        try:
            yield
        finally:
            _FORKS.reset(token)


def import_ahead() -> None:
    """Start the imports of `forked_commands` now, so that they run while other work comes before the first command."""
    if (forks := _FORKS.get()) is not None:
        _ = forks.server


@contextmanager
def stand_ins(functions: Mapping[str, Callable[[Sequence[str]], None]]) -> Iterator[None]:
    """Inside, the commands `python -m MODULE arguments` of these modules are calls of functions: for simulations."""
    _STAND_INS.update(functions)
    try:
        yield
    finally:
        for module in functions:
            del _STAND_INS[module]


def run_command(context: dg.AssetExecutionContext, command: Sequence[str], reports: bool = False) -> None:
    """Run `command` to its end in its own process group. reports: it sends messages to Dagster through Pipes.

    The group is killed when this step ends in any way, and by the kernel when this process is killed. Raises dg.Failure
    with the command's own sentence and without retries if the user can correct the cause
    (`notellm2_core.runtime.errors`), and with the end of its output if it crashed.
    """
    context.log.info(f"running: {shlex.join(command)}")
    if (module := next((part for part in command if part in _STAND_INS), None)) is not None:
        _STAND_INS[module](command[command.index(module) + 1 :])
        return
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
    ours = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    if sys.stderr.isatty():  # `_forward` copies the command's errors to it
        ours[TO_TERMINAL] = "1"
    # Passive: on a busy machine, threads that spin while waiting take cores from threads that work.
    return {"OMP_WAIT_POLICY": "PASSIVE", **ours, "PYTHONUNBUFFERED": "1"}


def _start(command: Sequence[str], env: Mapping[str, str], stderr: int) -> "subprocess.Popen[bytes] | Child":
    """Start `command` in its own process group, with its errors written to the descriptor `stderr`; then close that."""
    forks = _FORKS.get()
    try:
        if forks is not None and command[1] == "-m" and command[2].startswith("notellm2_core."):
            with suppress(OSError):  # the server has died; nothing but its speed is lost
                return forks.server.start(command[1:], env, stderr)
        return subprocess.Popen(command, env=env, stderr=stderr, start_new_session=True, preexec_fn=die_with_parent)
    finally:
        os.close(stderr)


def _forward(output: int) -> str:
    """Copy the child's errors to ours at once (progress bars included). Returns their last _TAIL_BYTES."""
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
