"""The whole graph on the tiny configuration, run as a user runs it: by command, in its own Dagster home."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from notellm2_core.config.load import load_config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lineage import STAGES
from notellm2_core.notes.note import Note
from notellm2_core.runtime.files import sha256_of
from notellm2_core.serving.log import NoteLog, Write
from notellm2_core.serving.log_url import log_url
from tests.support.jvm import UNCOMPILED, quick_jvm
from tests.support.world import png_of

POSTED, DELETED = Note("posted", "written to a service", ("new",), "since the source was exported"), "n000159"
ROOT = Path(__file__).parents[2]
RECALL = (sys.executable, "-W", "ignore", "-m", "pipelines.recall")  # make recall


@dataclass(frozen=True)
class Workplace:
    """A Dagster home and a lake in one folder, with a configuration that points to it."""

    home: Path

    @property
    def config(self) -> Path:
        return self.home / "tiny.yaml"

    @property
    def catalog(self) -> Catalog:
        return Catalog(load_config(self.config))

    def environment(self, **more: str) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("SOURCE", "MLFLOW_TRACKING_URI")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        return env | {
            "PATH": path,
            "DAGSTER_HOME": str(self.home),
            "DAGSTER_MODULE_NAME": "pipelines.definitions",
            "NOTELLM2_CONFIG": str(self.config),
            "OMP_NUM_THREADS": "1",
            "JDK_JAVA_OPTIONS": quick_jvm(),
            **more,
        }

    def start(self, *command: str, **env: str) -> subprocess.Popen:
        """Run a command from the repository root in a process group of its own; output to `log`."""
        with self.log.open("w") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment(**env), stdout=log, stderr=log, start_new_session=True
            )

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        code = self.start(*command, **env).wait(timeout=800)
        return code, self.log.read_text()

    def recall(self, **env: str) -> tuple[int, str]:
        return self.run(*RECALL, **env)

    @property
    def log(self) -> Path:
        return self.home / "log.txt"

    def files(self) -> dict[str, str]:
        """A digest of each data file of this configuration's datasets; files that report times are left out.

        Tables are compared by content: two JVMs may list a column's encodings in another order in the footer.
        """
        digests = {}
        for name in STAGES:
            dataset = self.catalog.dataset(name)
            for file in dataset.manifest.files:
                if file.endswith(".parquet"):
                    digests[f"{name}/{file}"] = _content(dataset.path / file)
                elif file.endswith((".safetensors", ".faiss", "recall.json")):
                    digests[f"{name}/{file}"] = sha256_of(dataset.path / file)
        return digests

    def forget(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.catalog.lake.root / name, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """The live processes whose command line or environment names this workplace."""
        processes = []
        for process in psutil.process_iter():
            try:
                text = " ".join(process.cmdline()) + process.environ().get("DAGSTER_HOME", "")
            except psutil.Error:
                continue
            if str(self.home) in text and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        return processes


def _content(parquet: Path) -> str:
    table = pq.ParquetFile(parquet).read().replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def make_workplace(home: Path, changes: Mapping[str, object] | None = None) -> Workplace:
    home.mkdir(parents=True, exist_ok=True)
    # The folders in dagster.yaml are relative to the working directory: the user's home must not list the tests' runs.
    settings = (ROOT / "dagster.yaml").read_text().replace("base_dir: .dagster", f"base_dir: {home / '.dagster'}")
    (home / "dagster.yaml").write_text(settings)
    raw = yaml.safe_load((ROOT / "pipelines/configs/tiny.yaml").read_text())
    raw["lake"] = str(home / "lake")
    raw["spark"]["extra"] = dict(UNCOMPILED)
    for key, value in (changes or {}).items():
        section = raw
        *parts, leaf = key.split(".")
        for part in parts:
            section = section.setdefault(part, {})
        section[leaf] = value
    (home / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return Workplace(home)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace where the whole graph was made without a kill, of the demo world and of what was written to a
    service. Its settings/ lists the settings that each stage read (tests/support/recorder).
    """
    workplace = make_workplace(tmp_path_factory.mktemp("finished"), {"export.num_ranks": 1})
    with closing(NoteLog.open(log_url(workplace.catalog.config, workplace.catalog.ledger))) as log:
        log.append([Write(POSTED, png_of(seed=3)), Write(Note(DELETED, "", (), ""), deleted=True)])
    recorder = {"PYTHONPATH": str(ROOT / "tests/support/recorder"), "RECORD_SETTINGS": str(workplace.home / "settings")}
    code, output = workplace.recall(**recorder)
    assert code == 0, output[-6000:]
    return workplace


@pytest.fixture
def copy_of_finished(finished: Workplace, tmp_path: Path) -> Workplace:
    """The same lake in another home: datasets that a test removes there are made again, embeddings by two ranks."""
    workplace = make_workplace(tmp_path / "copy")
    shutil.copytree(finished.home / "lake", workplace.home / "lake", ignore=shutil.ignore_patterns(".work"))
    return workplace
