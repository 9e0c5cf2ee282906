"""A process that has already imported torch and forks a copy of itself for each command.

Starting Python and importing torch and transformers takes longer than many commands take themselves. On a CPU, commands
that follow each other start from here at once. GPUs cannot use it: CUDA does not survive a fork.

    with ForkServer(["torch", "transformers"], os.environ) as server:
        child = server.start(["-m", "notellm2_core.model.tokenise", "--config", ...], os.environ, stderr)
        code = child.wait()

A command runs as `python -m MODULE ARGUMENTS` would: in a process group of its own, with its own arguments and
environment, and with the variables that the imports set and it does not. It ends with the server, and the server ends
with the process that started it, however they die.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, Self

from notellm2_core.runtime.processes import die_with_parent

_MAX_REQUEST_BYTES = 1 << 20


def can_fork() -> bool:
    """Whether commands may be forked on this machine: it has no GPU."""
    return not Path("/dev/nvidiactl").exists()


@dataclass
class Child:
    """A command that a server has started. The next one may start only after `wait`."""

    pid: int
    _connection: socket.socket
    _code: int | None = None

    def wait(self) -> int:
        """The exit code; -SIGNAL where a signal ended the command or the server."""
        if self._code is None:
            answer = self._connection.recv(_MAX_REQUEST_BYTES)
            self._code = int(answer) if answer else -signal.SIGKILL
        return self._code


class ForkServer:
    """The server, as the process that starts it sees it. It runs one command at a time."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts the server, which imports `modules` while this process continues.

        `env`: its environment. Libraries read variables at import (OMP_WAIT_POLICY), before a command sets its own.
        """
        self._connection, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._connection, server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST_BYTES)
        command = [sys.executable, "-m", __name__, str(server.fileno()), *modules]
        with server:
            self._process = subprocess.Popen(command, env=env, pass_fds=[server.fileno()], start_new_session=True)

    def start(self, command: Sequence[str], env: Mapping[str, str], stderr: int) -> Child:
        """Run ["-m", MODULE, *arguments] with the environment `env` and the file descriptor `stderr`.

        Raises OSError where the server has died. The command has then not been started, or has died with it.
        """
        module, *arguments = command[1:]
        request = json.dumps({"module": module, "arguments": arguments, "env": dict(env), "folder": os.getcwd()})
        socket.send_fds(self._connection, [request.encode()], [stderr])
        answer = self._connection.recv(_MAX_REQUEST_BYTES)
        if not answer:
            raise ConnectionResetError("the process that starts the commands has died")
        return Child(int(answer), self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it may still be importing
        self._process.wait()
        self._connection.close()


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        before = dict(os.environ)
        for name in sys.argv[2:]:
            importlib.import_module(name)
        gc.freeze()  # a command's garbage collections pass over what was imported
        set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
        while True:
            request, descriptors, *_ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 1)
            if not request:
                return
            server, pid = os.getpid(), os.fork()
            if pid == 0:
                connection.close()
                request = json.loads(request)
                request["env"] = set_by_imports | request["env"]
                _run(request, descriptors[0], server)
            _lead_group(pid)
            os.close(descriptors[0])
            connection.send(str(pid).encode())
            connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def _lead_group(pid: int) -> None:
    """Give a command a process group of its own. Parent and child both call it, so it is done whichever is faster."""
    with suppress(ProcessLookupError, PermissionError):  # it has already ended, or started another program
        os.setpgid(pid, pid)


def _run(request: Mapping[str, object], stderr: int, server: int) -> NoReturn:
    """In the forked process: become the command."""
    _lead_group(0)
    die_with_parent()
    if os.getppid() != server:  # it died before die_with_parent was called
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stderr, 2)
    os.close(stderr)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(dict(request["env"]))  # type: ignore[call-overload]
    module = str(request["module"])
    if find_spec(module).submodule_search_locations is not None:  # type: ignore[union-attr]  # a package's command
        module += ".__main__"
    sys.argv = [module, *request["arguments"]]  # type: ignore[misc]
    try:
        importlib.import_module(module).main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
