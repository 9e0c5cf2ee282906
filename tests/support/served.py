"""A lake with releases of tiny models, as a service opens them."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference.embed_table import embed_notes
from notellm2_core.lake.lake import Lake
from notellm2_core.model.build import build_model
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.release.release import LINEAGE_FILE, NAME, Release, open_release
from notellm2_core.release.verdict import VERDICT_FILE
from notellm2_core.retrieval.build import build_index
from notellm2_core.retrieval.index import Index
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NOTES_TABLE
from notellm2_core.serving.app import make_app
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.service import Service
from notellm2_core.training.state.save import save_model
from notellm2_core.vision.encoder import load_vision_encoder
from tests.support.cluster import free_port
from tests.support.released import TRAINING_SUMMARY
from tests.support.tiny_model import tiny_config
from tests.support.waiting import wait_for

NUM_GOLDEN, NUM_NEIGHBOURS = 5, 3


def serve_release(lake: Lake, release_id: str, source: Path, seed: int = 0, dim: int = 32) -> Release:
    """A release of the notes of `source` by a random model of this seed and width."""
    config = tiny_config(seed=seed)
    config = config.model_copy(update={"model": config.model.model_copy(update={"projection_dim": dim})})
    if lake.find("verdict", "verdict") is None:
        with lake.publish("notes", "notes", {}, {}) as draft:
            (draft.path / NOTES_TABLE).mkdir()
            shutil.copy(source / "notes.parquet", draft.path / NOTES_TABLE)
        with lake.publish("verdict", "verdict", {"notes": "notes"}, {}):
            pass
    inputs = {"checkpoint": f"model of {release_id}", "verdict": "verdict"}
    with lake.publish(NAME, release_id, inputs, {}) as draft:
        work = draft.path / "model"
        encoder = load_vision_encoder(config.model.vision)
        encoder.save_pretrained(draft.path / "vision")
        model, processor = build_model(config, draft.path / "cache")
        save_model(
            model, processor, draft.path / "vision", work, config, ("2025-01-05", "2025-01-19"), TRAINING_SUMMARY
        )
        embed_notes(work, read_note_table(source, source), draft.path / "embeddings", "multimodal", None, 16)
        build_index(draft.path / "embeddings", draft.path / INDEX_FOLDER, IndexSettings(factory="Flat"))
        vectors, index = read_embeddings(draft.path / "embeddings").vectors, Index.load(draft.path / INDEX_FOLDER)
        golden = list(index.note_ids[:NUM_GOLDEN])
        found, _ = index.search(vectors[:NUM_GOLDEN], NUM_NEIGHBOURS, leave_out=golden)
        files = {
            GOLDEN_FILE: [{"note_id": i, "neighbours": list(row)} for i, row in zip(golden, found, strict=True)],
            LINEAGE_FILE: {"week": "2025-01-05", "weeks": ["2025-01-05"], "releases": []},
            VERDICT_FILE: {"outcome": "passed", "why": "All gates passed.", "gates": [], "figures": {}},
        }
        for name, content in files.items():
            (draft.path / name).write_text(json.dumps(content))
    return open_release(lake, release_id)


@contextmanager
def listening(service: Service, keys: Keys, takes_events: bool = False) -> Iterator[str]:
    """The address of a server of the service."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make_app(service, keys, takes_events), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
