"""The service with Milvus as its engine: from a write to a rollback, and while a server is down."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from notellm2_core.cli import main
from notellm2_core.lake.lake import Lake
from notellm2_core.notes.note import Note
from notellm2_core.release.release import open_release
from notellm2_core.retrieval.index import IndexedNotes
from notellm2_core.schema import INDEX_FOLDER
from notellm2_core.serving.app import make_app
from notellm2_core.serving.base import marked_bases
from notellm2_core.serving.compaction import compact
from notellm2_core.serving.engine import Engine, open_engine
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.log import NoteLog, Write
from notellm2_core.serving.milvus import ALIAS, MilvusEngine
from notellm2_core.serving.service import Service
from tests.support.bases import unit_vectors
from tests.support.milvus_server import MilvusServer
from tests.support.released import NUM_NOTES, write_release
from tests.support.served import serve_release
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
RED_TEA = {"title": "note 7", "topics": ["red"], "content": "red tea"}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Two releases, of models of different widths."""
    root = tmp_path_factory.mktemp("site")
    source, lake = write_release(root / "small").source, Lake(root / "lake")
    serve_release(lake, "aaaa1111", source, seed=0, dim=32)
    serve_release(lake, "bbbb2222", source, seed=1, dim=16)
    return lake


@contextmanager
def running(lake: Lake, log: NoteLog, engine: Engine) -> Iterator[tuple[Service, TestClient]]:
    with (
        closing(Service(lake, log, "aaaa1111", engine=engine)) as service,
        TestClient(make_app(service, Keys()), base_url="http://127.0.0.1") as client,
    ):
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield service, client


def found(client: TestClient, **query: object) -> list[str]:
    """The notes like a text, from the engine."""
    answer = client.post("/similar", json=RED_TEA | {"k": 100} | query)
    assert answer.status_code == 200, answer.text
    return [hit["note_id"] for hit in answer.json()["hits"]]


def current(engine: Engine) -> str:
    """The collection that others read."""
    assert isinstance(engine, MilvusEngine)
    return str(engine._client.describe_alias(ALIAS)["collection_name"])


def test_from_a_write_to_a_rollback(lake: Lake, tmp_path: Path) -> None:
    """With milvus-lite: written, found, deleted, switched, rolled back, compacted, and started again."""
    url = f"milvus://{tmp_path}/milvus/notes.db"
    with closing(NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")) as log:
        with closing(open_engine(url, lake)) as engine, running(lake, log, engine) as (service, client):
            wait_for(lambda: service.current.model.is_running)
            assert client.put("/notes/new", json=RED_TEA).status_code == 201
            assert client.delete("/notes/n05").status_code == 200
            before = found(client)
            assert before[0] == "new" and "n05" not in before and len(before) == NUM_NOTES
            recalled = client.post("/recall", json={"history": ["new", "n01"], "k": 100}).json()
            assert len(recalled["hits"]) == NUM_NOTES - 2 and not recalled["partial"]
            assert current(engine).startswith("notes_aaaa1111_release_")
            assert client.post("/releases/bbbb2222:activate").json() == {"release": "bbbb2222"}
            assert found(client)[0] == "new" and {*found(client)} == {*before}
            assert current(engine).startswith("notes_bbbb2222_release_")
            assert found(client, release="aaaa1111") == before
            assert client.put("/notes/later", json=RED_TEA).status_code == 201
            assert client.post("/releases/aaaa1111:activate").json() == {"release": "aaaa1111"}
            assert {*found(client)} == {*before, "later"} and current(engine).startswith("notes_aaaa1111_release_")
            after = found(client)
            assert compact(lake, open_release(lake, "aaaa1111"), log).num_changes == 3
            assert service.releases.refresh() == 1
            assert found(client) == after and not service.current.index.delta.view.note_ids
            mark = marked_bases(lake, open_release(lake, "aaaa1111"), log)[-1][0]
            assert current(engine).startswith(f"notes_aaaa1111_{mark}_")
            vector = service.current.index.vector("new")
            assert vector is not None
            expected = service.current.index.similar(vector, 9)
        with closing(open_engine(url, lake)) as engine, running(lake, log, engine) as (service, client):
            assert service.current.base.mark == mark and service.current.index.similar(vector, 9) == expected


def test_a_server_is_killed_and_comes_back(lake: Lake, server: MilvusServer, tmp_path: Path) -> None:
    """Meanwhile the service answers what its table knows, and says why it answers no more. No vector is lost."""
    new = Write(Note("new", "new", (), ""), vectors={model_of(lake): unit_vectors(0, 1, 32)[0]})
    with (
        closing(NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")) as log,
        closing(open_engine(server.url, lake)) as engine,
    ):
        log.append([new])
        with running(lake, log, engine) as (_, client):
            before = {path: client.get(path).json() for path in ("/notes/new/similar?k=9", "/notes/n01/similar?k=9")}
            assert all(len(answer["hits"]) == 9 for answer in before.values())
            server.kill()
            assert client.get("/notes/n01/similar?k=9").json() == before["/notes/n01/similar?k=9"]
            refused = client.get("/notes/new/similar?k=9")
            assert refused.status_code == 503 and refused.headers["content-type"] == "application/problem+json"
            assert "the search engine cannot be reached now" in refused.json()["detail"]
            assert "127.0.0.1" not in refused.text and refused.headers["retry-after"] == "1"
            recalled = client.post("/recall", json={"history": ["new", "n01"], "k": 9}).json()
            assert recalled["partial"] and {tuple(hit["because"]) for hit in recalled["hits"]} == {("n01",)}
            activated = client.post("/releases/bbbb2222:activate")
            assert activated.status_code == 503 and client.get("/readyz").json()["release"] == "aaaa1111"
            server.start()
            wait_for(lambda: client.get("/notes/new/similar?k=9").status_code == 200)
            assert {path: client.get(path).json() for path in before} == before


def test_the_command_takes_the_engine_of_the_configuration_or_another(
    lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with a sentence where that cannot be used."""
    config = tmp_path / "tiny.yaml"
    settings = yaml.safe_load((ROOT / "pipelines/configs/tiny.yaml").read_text())
    changed = {"name": "tiny", "lake": str(lake.root), "serving": {"engine": "milvus://127.0.0.1:1"}}
    config.write_text(yaml.safe_dump(settings | changed))
    command = ["serve", "--config", str(config), "--release", "aaaa1111"]
    for options, said in (
        ([], "error: the Milvus 127.0.0.1:1 cannot be used now"),
        (["--engine", "milvus://127.0.0.1:2"], "error: the Milvus 127.0.0.1:2 cannot be used now"),
        (["--engine", "faiss://here"], "error: an engine is milvus://HOST:PORT for a server"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def model_of(lake: Lake) -> str:
    weights_id = IndexedNotes.load(open_release(lake, "aaaa1111").path / INDEX_FOLDER).weights_id
    assert weights_id is not None
    return weights_id
