"""What the benchmarks of the service share: a release of given vectors with a tiny model, and a server of it."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config, IndexSettings
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.embeddings.table import WEIGHTS_ID, Embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.model.build import build_model
from notellm2_core.notes.note import Note
from notellm2_core.release.golden import NUM_QUERIES, golden_queries
from notellm2_core.release.promotion import promote
from notellm2_core.release.release import LINEAGE_FILE, NAME
from notellm2_core.release.verdict import VERDICT_FILE
from notellm2_core.retrieval.build import save_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import write_neighbours_of
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NEIGHBOURS_FOLDER
from notellm2_core.serving.log import NoteLog, Write
from notellm2_core.serving.log_url import log_url
from notellm2_core.training.state.save import save_model
from notellm2_core.vision.encoder import load_vision_encoder

ROOT = Path(__file__).parents[1]
RELEASE = "0123456789abcdef"
WEIGHTS = f"of {RELEASE}"  # the name of its model
TRAIN_DAYS = ("2025-01-05", "2025-01-19")
SUMMARY = {"steps": 0, "num_train_pairs": 0, "num_train_notes": 0, "num_validation_pairs": 0,
            "validation_recall_at_10": 0.0}  # fmt: skip
_WRITES = 1000  # of a transaction


@dataclass(frozen=True)
class Site:
    """A lake with one release that is live, and its configuration."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "site.yaml"

    def configure(self, events: Path | None = None, **model: Any) -> Config:
        """Write its configuration: the tiny one with these settings of the model. events: see `serving.events`."""
        settings = yaml.safe_load((ROOT / "pipelines/configs/tiny.yaml").read_text())
        settings |= {"name": "site", "lake": str(self.folder / "lake")}
        settings |= {"serving": {"events": None if events is None else str(events)}}
        settings["model"] |= model
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(yaml.safe_dump(settings))
        return load_config(self.config_file)

    @property
    def log(self) -> str:
        """The URL of its log."""
        config = load_config(self.config_file)
        return log_url(config, Ledger(config.lake, config.name))

    @contextmanager
    def serving(self, port: int, output: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """`notellm2 serve`, ready; killed at the end."""
        command = [sys.executable, "-W", "ignore", "-m", "notellm2_core.cli", "serve"]
        command += ["--config", str(self.config_file), *options]
        with output.open("ab") as out:
            process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, cwd=ROOT)
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    raise RuntimeError(output.read_text()[-2000:])
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def make_site(folder: Path, vectors: np.ndarray, factory: str) -> Site:
    """A release of these vectors [N, d], whose notes are n0000000, n0000001, ..., by a tiny model of width d."""
    site = Site(folder)
    add_release(site, RELEASE, vectors, factory)
    lake = Lake(load_config(site.config_file).lake)
    promote(lake, Ledger(lake.root, "site"), RELEASE)
    return site


def add_release(site: Site, release_id: str, vectors: np.ndarray, factory: str) -> None:
    """The same notes by another tiny model, of the width of these vectors."""
    config = site.configure(projection_dim=vectors.shape[1])

    def save(out: Path) -> None:
        load_vision_encoder(config.model.vision).save_pretrained(out.parent / "vision")
        model, processor = build_model(config, site.folder / "cache")
        save_model(model, processor, out.parent / "vision", out, config, TRAIN_DAYS, SUMMARY)

    ids = tuple(f"n{n:07d}" for n in range(len(vectors)))
    write_release(Lake(config.lake), release_id, Embeddings(ids, vectors, weights_id=f"of {release_id}"), save, factory)


def write_release(
    lake: Lake, release_id: str, embeddings: Embeddings, save: Callable[[Path], None], factory: str = "Flat"
) -> None:
    """A release of these vectors, whose model `save` writes into the folder that it is given."""
    ids, vectors = list(embeddings.note_ids), embeddings.vectors
    with lake.publish(NAME, release_id, {"checkpoint": f"of {release_id}"}, {}) as draft:
        save(draft.path / "model")
        (draft.path / "embeddings").mkdir()
        metadata = {WEIGHTS_ID.decode(): str(embeddings.weights_id)}
        write_shard(draft.path / "embeddings" / "part.parquet", ids, vectors, metadata)
        save_index(embeddings, draft.path / INDEX_FOLDER, IndexSettings(factory=factory, search_k=100), 2)
        write_neighbours_of(draft.path / INDEX_FOLDER, draft.path / "embeddings", draft.path / NEIGHBOURS_FOLDER)
        rows = np.linspace(0, len(ids) - 1, NUM_QUERIES).astype(int)
        index = Index.load(draft.path / INDEX_FOLDER)
        files = {
            GOLDEN_FILE: golden_queries(index, [ids[row] for row in rows], vectors[rows]),
            LINEAGE_FILE: {"week": "2025-01-05", "weeks": ["2025-01-05"], "releases": []},
            VERDICT_FILE: {"outcome": "passed", "why": "All gates passed.", "gates": [], "figures": {}},
        }
        for name, content in files.items():
            (draft.path / name).write_text(json.dumps(content))


def write_log(site: Site, fresh: np.ndarray, deleted: Sequence[str]) -> None:
    """Write new notes f000000, f000001, ... with these vectors, and deletions."""
    weights_id, log = WEIGHTS, NoteLog.open(site.log)
    writes = [Write(Note(f"f{n:06d}", "x", (), ""), None, False, 1, {weights_id: v}) for n, v in enumerate(fresh)]
    writes += [Write(Note(note_id, "", (), ""), None, True, 1) for note_id in deleted]
    for start in range(0, len(writes), _WRITES):
        log.append(writes[start : start + _WRITES])
    log.close()
