"""`notellm2 embedder`, and a service that has its notes embedded by one: as by a process of its own, or refused."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from fastapi.testclient import TestClient

from notellm2_core.lake.lake import Lake
from notellm2_core.notes.note import Note
from notellm2_core.release.release import Release
from notellm2_core.serving import embedder
from notellm2_core.serving.app import make_app
from notellm2_core.serving.embedder import Models, models_in, only_model
from notellm2_core.serving.embedder_client import KEY_VARIABLE, EmbedderClient
from notellm2_core.serving.embedding import MAX_WAITING, BadNote, Embedded, EmbedderBusy, EmbedderDied, EmbedderDown
from notellm2_core.serving.embedding_process import EmbeddingProcess
from notellm2_core.serving.keys import Keys, add_key
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.service import Service
from tests.support.cluster import free_port
from tests.support.released import png
from tests.support.served import TwoReleases
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[3]
CLI = [sys.executable, "-W", "ignore", "-c", "from notellm2_core.cli import main; main()"]
RED = Note("x", "note 7", ("red",), "red tea")


@dataclass
class Server:
    """`notellm2 embedder` as a process, with a key that clients have in their environment."""

    command: list[str]
    port: int
    log: Path
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen([*CLI, *self.command], stdout=out, stderr=out, start_new_session=True)
        wait_for(self.answers)

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(f"{self.url}/healthz", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def models(self) -> list[psutil.Process]:
        """The processes of the models that are loaded."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if any("libtorch" in m.path for m in child.memory_maps())]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Site:
    lake: Lake
    source: Path
    first: Release
    second: Release
    server: Server

    def client(self, release: Release | None = None, waits: bool = True) -> EmbedderClient:
        """Of the model of a release; by default of the first one."""
        release = release or self.first
        assert release.weights_id is not None
        return EmbedderClient(self.server.url, release.weights_id, 32 if release is self.first else 16, waits)


@pytest.fixture(scope="module")
def site(two_releases: TwoReleases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root, lake = tmp_path_factory.mktemp("site"), two_releases.lake
    settings = yaml.safe_load((ROOT / "pipelines/configs/tiny.yaml").read_text())
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings | {"name": "tiny", "lake": str(lake.root)}))
    port, keys = free_port(), root / "keys.json"
    command = ["embedder", "--config", str(root / "tiny.yaml"), "--release", "aaaa", "--port", str(port)]
    server = Server([*command, "--keys", str(keys)], port, root / "embedder.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, add_key(keys, "service", "read"))
        server.start()
        yield Site(lake, two_releases.source, two_releases.first, two_releases.second, server)
        server.kill()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[EmbedderClient]:
    client = site.client()
    yield client
    client.close()


@pytest.mark.slow
def test_the_vectors_are_those_of_a_process_of_its_own(site: Site, client: EmbedderClient) -> None:
    own = EmbeddingProcess(site.first.path / "model")
    notes = [(Note("", f"note {n}", ("red",) * n, "old ship " * n), png(n) if n % 2 else None) for n in range(6)]
    asked = [(*note, "multimodal") for note in notes] + [(*notes[1], kind) for kind in ("text", "image")]
    theirs = [client.submit(*note) for note in asked]  # type: ignore[arg-type]
    for note, answer in zip(asked, theirs, strict=True):
        expected, found = own.submit(*note).result(300), answer.result(300)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.vector, expected.vector, atol=1e-5)
        assert found.image == expected.image == ("ok" if note[1] else "missing")
    assert len({answer.result().vector.tobytes() for answer in theirs}) == len(asked)
    own.close()
    wait_for(lambda: client.num_waiting == 0)
    headers = {"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"}
    assert httpx.get(f"{site.server.url}/metrics").status_code == 401
    shown = httpx.get(f"{site.server.url}/metrics", headers=headers).text
    assert f'notellm2_model_loaded{{weights_id="{site.first.weights_id}"}} 1.0' in shown
    assert f'notellm2_embedding_waiting{{weights_id="{site.first.weights_id}"}} 0.0' in shown
    counted = 'notellm2_request_seconds_count{method="POST",route="/models/{weights_id}/embed",status="200"} 8.0'
    assert counted in shown


@pytest.mark.slow
def test_a_bad_picture_fails_its_note_alone(client: EmbedderClient) -> None:
    answers = [client.submit(RED, picture) for picture in (png(1), b"no picture", png(2), png(3)[:60])]
    for answer, message in zip(answers, (None, "cannot be used", None, "cannot be used"), strict=True):
        if message is None:
            assert answer.result(300).image == "ok"
        else:
            with pytest.raises(BadNote, match=message):
                answer.result(300)
    with pytest.raises(BadNote, match="neither text nor picture"):
        client.submit(Note("", "", (), "")).result(300)


@pytest.mark.slow
def test_more_notes_than_may_wait_are_refused(site: Site, client: EmbedderClient) -> None:
    """By the embedder, of all its callers, and by a client, of its own. Nobody else's note is lost."""
    (process,) = site.server.models()
    url, num = f"{site.server.url}/models/{site.first.weights_id}/embed", MAX_WAITING + 40  # a batch is not waiting
    headers = {"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"}

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=headers, timeout=300, limits=limits) as http:
            asking = [asyncio.ensure_future(http.post(url, json={"title": f"note {n}"})) for n in range(num)]
            refused, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            assert {answer.result().status_code for answer in refused} == {429}
            process.resume()
            return await asyncio.gather(*asking)

    process.suspend()
    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429} and len(refused) >= 40 - 16 - 1
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    process.suspend()
    waiting = [client.submit(RED) for _ in range(MAX_WAITING)]
    with pytest.raises(EmbedderBusy, match=f"{MAX_WAITING} notes wait"):
        client.submit(RED)
    for answer in waiting[16:]:
        answer.cancel()
    process.resume()
    assert [answer.result(300).image for answer in waiting[:16]] == ["missing"] * 16
    wait_for(lambda: client.num_waiting == 0)


@pytest.mark.slow
def test_a_note_that_is_cancelled_or_whose_client_is_closed_leaves_the_embedder(site: Site) -> None:
    """Also one that is being embedded: its place there is free for others."""
    client, (process,) = site.client(), site.server.models()
    headers = {"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"}

    def num_waiting() -> int:
        models = httpx.get(f"{site.server.url}/models", headers=headers, timeout=60).json()
        return int(next(model["waiting"] for model in models if model["weights_id"] == site.first.weights_id))

    process.suspend()
    try:
        embeddings = [client.submit(RED) for _ in range(12)]
        wait_for(lambda: num_waiting() > 0)
        assert all(embedding.cancel() for embedding in embeddings[:4])
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < 30
    finally:
        process.resume()
    for embedding in embeddings[4:]:
        with pytest.raises(EmbedderDown, match="closed"):
            embedding.result(60)
    wait_for(lambda: num_waiting() == 0)


@pytest.mark.slow
def test_a_note_that_the_model_dies_of_is_told_apart(site: Site, client: EmbedderClient) -> None:
    (process,) = site.server.models()
    process.kill()
    with pytest.raises(EmbedderDied, match="died of this note"):
        client.submit(RED).result(300)
    assert client.submit(RED).result(300).image == "missing"


@pytest.mark.slow
def test_wrong_keys_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    with pytest.raises(ValueError, match="401: a key is needed"):
        site.client()
    waiting = site.client(waits=False)
    with pytest.raises(EmbedderDown, match="401"):
        waiting.submit(RED).result(300)
    waiting.close()
    with pytest.raises(EmbedderDown, match="closed"):
        waiting.submit(RED)


@pytest.mark.slow
def test_the_interface_keeps_what_its_description_says(site: Site) -> None:
    """And answers nobody without a key."""
    key = f"Authorization: Bearer {os.environ[KEY_VARIABLE]}"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{site.server.url}/openapi.json", "--checks", "all"]
    options = ["--phases", "examples,coverage", "--generation-deterministic", "--header", key]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for path, operations in httpx.get(f"{site.server.url}/openapi.json").json()["paths"].items():
        for method in operations:
            answer = httpx.request(method, site.server.url + path.replace("{weights_id}", "aa"), timeout=60)
            assert answer.status_code == (200 if path == "/healthz" else 401), path


@pytest.mark.slow
def test_a_model_that_is_not_there_is_told(site: Site) -> None:
    with pytest.raises(ValueError, match="404: there is no model 0123456789abcdef here"):
        EmbedderClient(site.server.url, "0123456789abcdef", 32)


@pytest.mark.slow
def test_a_service_with_an_embedder(site: Site, tmp_path: Path) -> None:
    """Its notes are found at once. While the embedder is away, recall goes on; a switch has two models there."""
    log = NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")
    service = Service(site.lake, log, site.first.id, site.source, embedder=site.server.url)
    wait_for(lambda: service.current.model.is_running)
    note = {"title": "note 7", "topics": ["red"], "content": "red tea"}
    with TestClient(make_app(service, Keys()), base_url="http://127.0.0.1") as client:
        assert client.put("/notes/before", json=note).status_code == 201
        assert site.server.process is not None
        children = psutil.Process(site.server.process.pid).children(recursive=True)
        site.server.kill()
        refused = client.put("/notes/meanwhile", json=note)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1", refused.text
        assert client.post("/recall", json={"history": ["n01", "before"]}).status_code == 200
        assert client.delete("/notes/n02").status_code == 200
        assert not psutil.wait_procs(children, timeout=60)[1]  # nothing outlives the embedder
        assert "notellm2_model_loaded 0.0" in client.get("/metrics").text
        assert client.post("/releases/bbbb:activate").status_code == 409  # its model cannot be loaded
        site.server.start()
        wait_for(lambda: service.current.model.is_running)
        assert client.put("/notes/meanwhile", json=note).status_code == 201
        assert client.post("/releases/bbbb:activate").json() == {"release": "bbbb2222"}
        hits = client.get("/notes/before/similar", params={"k": 1}).json()["hits"]
        assert hits[0]["note_id"] == "meanwhile" and hits[0]["score"] == pytest.approx(1, abs=1e-4)
        assert client.put("/notes/after", json=note).status_code == 201
        assert service.current.index.vector("after").shape == (16,)  # type: ignore[union-attr]
        assert len(site.server.models()) == 2
    service.close()
    log.close()


@contextmanager
def answering(model: dict[str, Any], vector: dict[str, Any]) -> Iterator[str]:
    """The address of an embedder that has these answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(model)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._send(vector)

        def _send(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


LOADED = {"weights_id": "aa", "is_loaded": True, "waiting": 0, "problem": None}
RIGHT = {"weights_id": "aa", "vector": [0.6, 0.8], "image": "ok"}


@pytest.mark.parametrize(
    ("model", "vector", "said"),
    [
        ({}, {}, None),
        ({"weights_id": "bb"}, {}, "answers by model bb, not by aa"),
        ({}, {"weights_id": "bb"}, "answers by model bb, not by aa"),
        ({}, {"vector": [0.6, 0.8, 0.0]}, r"the shape \(3,\), not \(2,\)"),
        ({}, {"vector": [0.6, 0.9]}, "not unit vectors"),
        ({}, {"vector": [0.6, float("nan")]}, "not unit vectors"),
        ({}, {"vector": [0.6, None]}, "answers wrongly"),
        ({}, {"vector": "0.6 0.8"}, "answers wrongly"),
        ({}, {"image": "blurred"}, "'blurred' is nothing"),
        ({"is_loaded": False, "problem": "no memory"}, {}, "no memory"),
    ],
)
def test_what_an_embedder_answers_is_not_trusted(model: dict[str, Any], vector: dict[str, Any], said: str) -> None:
    with answering(LOADED | model, RIGHT | vector) as url:
        client = EmbedderClient(url, "aa", 2, waits=False)
        embedding: Future[Embedded] = client.submit(RED)
        if said is None:
            assert embedding.result(60).vector.tolist() == pytest.approx([0.6, 0.8])
        else:
            with pytest.raises(EmbedderDown, match=said):
                embedding.result(60)
        client.close()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="onnect"):
        EmbedderClient(f"http://127.0.0.1:{free_port()}", "aa", 2)


@dataclass
class Process:
    """In place of a process with a model."""

    model: Path
    waits: bool
    weights_id: str
    gives_way: bool
    closed: list[str] = field(default_factory=list)

    def close(self) -> None:
        self.closed.append(self.weights_id)


def test_two_models_are_in_memory_and_one_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "EmbeddingProcess", Process)
    models = Models({name: Path(name) for name in "abc"}.__getitem__)
    first, second = models.get("a"), models.get("b")
    assert (first.gives_way, second.gives_way) == (False, True)  # type: ignore[attr-defined]
    assert models.get("a") is first  # asked for again, so that b is the one that may leave
    with pytest.raises(EmbedderBusy, match="2 other models are in use"):
        models.get("c")
    with pytest.raises(KeyError):
        models.get("d")
    monkeypatch.setattr(embedder, "_IN_USE_SECONDS", -1.0)
    third = models.get("c")
    assert second.closed == ["b"] and not first.closed and set(models.loaded) == {"a", "c"}  # type: ignore[attr-defined]
    models.close()
    assert first.closed == ["a"] and third.closed == ["c"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_models_are_found_by_their_weights(site: Site, tmp_path: Path) -> None:
    find = models_in(site.lake)
    for release in (site.first, site.second):
        assert find(str(release.weights_id)) == release.path / "model"
        alone, weights_id = only_model(release.path / "model")
        assert weights_id == release.weights_id and alone(weights_id) == release.path / "model"
    with pytest.raises(KeyError):
        find("0123456789abcdef")
    with pytest.raises(ValueError, match="holds no model"):
        only_model(tmp_path)
    wrong = EmbeddingProcess(site.second.path / "model", waits=False, weights_id=site.first.weights_id)
    with pytest.raises(EmbedderDown, match=f"its weights are {site.second.weights_id}, not {site.first.weights_id}"):
        wrong.submit(RED).result(300)
    assert wrong.problem is not None
    wrong.close()
