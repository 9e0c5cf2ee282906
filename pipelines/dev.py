"""`make dev`: the Dagster UI, and the MLflow UI on the tracking store of this configuration."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from assets.resources.tracking import tracking_uri
from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.processes import die_with_parent

BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 10  # for a server to end after SIGTERM


def main() -> int:
    with user_errors():
        catalog = Catalog(config_in_force())
        uri = tracking_uri(catalog.config.tracking, catalog.lake.root)
        dagster, mlflow = _port("DAGSTER_PORT", "3000"), _port("MLFLOW_PORT", "5000")
    commands = [["dagster", "dev", "-m", "pipelines.definitions", "--host", "127.0.0.1", "--port", dagster]]
    if not uri.startswith("http"):
        store = catalog.lake.root / "mlflow"
        store.mkdir(parents=True, exist_ok=True)
        commands.append(["mlflow", "server", "--host", "127.0.0.1", "--port", mlflow, "--workers", "1",
                         "--backend-store-uri", uri, "--artifacts-destination", str(store / "artifacts")])  # fmt: skip
        uri = f"http://127.0.0.1:{mlflow}"
    print(f"Dagster: http://127.0.0.1:{dagster}   MLflow: {uri}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # `activate` sets the module for `dagster asset`. Dagster's children would get it twice, and hang.
    env = {k: v for k, v in os.environ.items() if k != "DAGSTER_MODULE_NAME"}
    env.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")  # of the libraries themselves
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # workers for judges of LLMs, which take 2 GB
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for name, *arguments in commands:
            command = [str(BIN / name), *arguments]
            servers.append(subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent))
        return servers[0].wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(servers)


def _port(setting: str, default: str) -> str:
    """The port from the environment. Raises ValueError if it is taken: the printed URL would show another server."""
    port = os.environ.get(setting, default)
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", int(port))) == 0:
            raise ValueError(f"port {port} is taken: stop what listens there, or set {setting}")
    return port


def _stop(servers: list[subprocess.Popen[bytes]]) -> None:
    """End the servers and all their children; a daemon left behind would keep retraining."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for server in servers:
        _signal(server, signal.SIGTERM)
    while any(_signal(server, 0) for server in servers) and time.monotonic() < deadline:
        time.sleep(0.1)
    for server in servers:
        _signal(server, signal.SIGKILL)


def _signal(server: subprocess.Popen[bytes], number: int) -> bool:
    """Send the signal to the server's process group. Returns whether any process of it is alive."""
    server.poll()  # reap a dead leader, which would count as alive
    try:
        os.killpg(server.pid, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
