"""The service by its HTTP interface: notes are written and found, releases are switched, faults are told."""

import base64
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from notellm2_core.notes.note import Note
from notellm2_core.serving import guard
from notellm2_core.serving.app import make_app
from notellm2_core.serving.compaction import compact
from notellm2_core.serving.embedding_process import EmbeddingProcess
from notellm2_core.serving.events import Event, keep_events, write_event_files
from notellm2_core.serving.experiment import NO_EXPERIMENT, PREVIOUS, Experiment, answer_prefix
from notellm2_core.serving.keys import Keys, Scope, add_key
from notellm2_core.serving.live_index import Answer, LiveIndex
from notellm2_core.serving.log import LogUnavailable, NoteLog, Write
from notellm2_core.serving.service import Service
from notellm2_core.serving.workers import Busy, Workers
from tests.notellm2_core.serving.test_pictures import MOST_MB, forget_peak, peak_mb
from tests.support.bombs import refused
from tests.support.released import png
from tests.support.served import TwoReleases, listening
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow
URL = "http://127.0.0.1"


@dataclass(frozen=True)
class Running:
    service: Service
    client: TestClient
    log: NoteLog
    source: Path


@pytest.fixture(scope="module")
def running(two_releases: TwoReleases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for all tests: each starts a process with a model. A test writes notes of names of its own."""
    log = NoteLog.open(f"sqlite:///{tmp_path_factory.mktemp('log') / 'log.db'}")
    service = Service(two_releases.lake, log, two_releases.first.id, two_releases.source)
    wait_for(lambda: service.current.model.is_running)
    with TestClient(make_app(service, Keys()), base_url=URL) as client:
        yield Running(service, client, log, two_releases.source)
    service.close()
    log.close()


def note(note_id: str, seed: int | None = None, **more: object) -> dict[str, object]:
    image = {} if seed is None else {"image": base64.b64encode(png(seed)).decode()}
    return {"note_id": note_id, "title": "note 7", "topics": ["red"], "content": "red tea", **image, **more}


def model_process(running: Running) -> psutil.Process:
    model = running.service.current.model
    assert isinstance(model, EmbeddingProcess) and model._process is not None
    return psutil.Process(model._process.pid)


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def vector_of(running: Running, note_id: str) -> np.ndarray:
    vector = running.service.current.index.vector(note_id)
    assert vector is not None
    return vector


def ids(answer: dict) -> list[str]:
    return [hit["note_id"] for hit in answer["hits"]]


def test_a_note_is_found_by_the_next_request_and_gone_after_its_deletion(running: Running) -> None:
    client = running.client
    written = client.post("/notes", json=note("new", seed=7))
    assert written.status_code == 201, written.text
    body = written.json()
    seq = body["seq"]
    assert (body["version"], body["applied"], body["image"]) == (1, True, "ok")
    assert body["release"] == "aaaa1111" and written.headers["location"] == "/notes/new"
    client.post("/notes", json=note("twin", seed=7))
    similar = client.get("/notes/new/similar", params={"k": 3}).json()
    assert ids(similar)[0] == "twin" and similar["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert similar["seq"] == seq + 1 and similar["release"] == "aaaa1111"
    asked = client.post(
        "/similar", json={key: note("x", seed=7)[key] for key in ("title", "topics", "content", "image")}
    )
    assert set(ids(asked.json())[:2]) == {"new", "twin"}
    recalled = client.post(
        "/recall", json={"history": ["n03", {"note_id": "twin", "weight": 2}, "nobody"], "k": 30}
    ).json()
    assert ids(recalled)[0] == "new" and recalled["hits"][0]["because"] == ["n03", "twin"]
    assert recalled["unknown"] == ["nobody"] and not {"n03", "twin"} & set(ids(recalled)) and not recalled["partial"]
    assert client.delete("/notes/twin").json()["seq"] == seq + 2
    assert "twin" not in ids(client.get("/notes/new/similar", params={"k": 30}).json())
    assert client.get("/notes/twin").status_code == 404
    assert client.get("/notes/new").json()["title"] == "note 7"


def test_a_note_may_be_a_form(running: Running) -> None:
    """It has the vector of the same note in JSON, and refuses a bad picture as that does."""
    client, texts = running.client, {"title": "note 7", "topics": ["red"], "content": "red tea"}
    for method, path, own in (("POST", "/notes", {"note_id": "form"}), ("PUT", "/notes/form-2", {})):
        answer = client.request(method, path, data=texts | own, files={"image": png(7)})
        assert answer.status_code == 201 and answer.json()["image"] == "ok", answer.text
    client.post("/notes", json=note("json", seed=7))
    for note_id in ("form", "form-2"):
        np.testing.assert_allclose(vector_of(running, note_id), vector_of(running, "json"), atol=1e-5)
    found = client.post("/similar", data=texts | {"k": "3"}, files={"image": png(7)})
    assert len(ids(found.json())) == 3 and found.json()["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    for wrong, said in ((texts, "note_id"), (texts | {"note_id": "x", "colour": "red"}, "colour")):
        assert said in client.post("/notes", data=wrong, files={"image": png(7)}).json()["detail"]
    refused = client.put("/notes/x", data=texts, files={"image": b"no picture"})
    assert refused.status_code == 422 and "picture cannot be used" in refused.json()["detail"]
    assert client.put("/notes/x", data={"title": "a\0b"}, files={"image": png(7)}).status_code == 422


def test_a_note_of_the_release_is_replaced_and_deleted(running: Running) -> None:
    client, before = running.client, vector_of(running, "n05")
    changed = {"title": "something else", "content": "old ship on a hill"}
    assert client.put("/notes/n05", json=changed).status_code == 201
    assert not np.allclose(before, vector_of(running, "n05"))
    assert "n05" in ids(client.get("/notes/n06/similar", params={"k": 30}).json())
    client.delete("/notes/n05")
    assert "n05" not in ids(client.get("/notes/n06/similar", params={"k": 30}).json())
    assert client.get("/notes/n05/similar").status_code == 404


def test_texts_and_pictures_of_notes(running: Running) -> None:
    client = running.client
    of_release = client.get("/notes/n01").json()
    assert (of_release["title"], of_release["seq"]) == ("note 1", None)
    for note_id, status in {"n03": 204, "n04": 204, "nobody": 404}.items():  # none, a broken one, no such note
        assert client.get(f"/notes/{note_id}/image").status_code == status
    assert client.get("/notes/nobody").status_code == 404
    client.post("/notes", json=note("pictured", seed=3))
    for note_id in ("n01", "pictured"):
        picture = client.get(f"/notes/{note_id}/image")
        assert picture.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(picture.content)).size == (20, 20)
    client.delete("/notes/pictured")
    assert client.get("/notes/pictured/image").status_code == 404


def test_the_same_query_by_its_text_or_its_picture_alone(running: Running) -> None:
    query = {key: value for key, value in note("x", seed=7).items() if key != "note_id"} | {"k": 30}
    scores = {
        inputs: [
            hit["score"] for hit in running.client.post("/similar", json=query | {"inputs": inputs}).json()["hits"]
        ]
        for inputs in ("multimodal", "text", "image")
    }
    assert len({tuple(values) for values in scores.values()}) == 3 and all(scores.values())
    assert running.client.post("/similar", json=query | {"inputs": "sound"}).status_code == 422
    assert running.client.post("/similar", json=query | {"release": "zzzz"}).status_code == 404


def test_a_stored_note_by_its_text_or_its_picture_alone(running: Running) -> None:
    client, content = running.client, note("parts", seed=7)
    client.post("/notes", json=content)
    query = {key: value for key, value in content.items() if key != "note_id"} | {"k": 30, "exclude": ["parts"]}
    for inputs in ("text", "image"):
        stored = client.get("/notes/parts/similar", params={"k": 30, "inputs": inputs}).json()
        assert stored["hits"] == client.post("/similar", json=query | {"inputs": inputs}).json()["hits"]
    picture = (running.source / "1.png").read_bytes()  # of a note of the release
    of_file = {"image": base64.b64encode(picture).decode(), "inputs": "image", "exclude": ["n01"]}
    for note_id, reason in {"n03": "there is no picture", "n04": "the picture cannot be used"}.items():
        refused = client.get(f"/notes/{note_id}/similar?inputs=image")
        assert refused.status_code == 404 and reason in refused.json()["detail"]
    hits = client.get("/notes/n01/similar?inputs=image").json()["hits"]
    assert hits and hits == client.post("/similar", json=of_file).json()["hits"]


def test_each_release_in_memory_has_examples(running: Running) -> None:
    client = running.client
    client.delete("/notes/n19")
    for release in client.get("/releases").json()["releases"]:
        assert len(release["examples"]) == len(set(release["examples"])) == 12 and "n19" not in release["examples"]
        for note_id in release["examples"]:
            found = client.get(f"/notes/{note_id}", params={"release": release["release"]}).json()
            assert found["note_id"] == note_id and found["release"] == release["release"]


def metrics(client: TestClient) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in client.get("/metrics").text.splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_metrics_by_route(running: Running) -> None:
    client = running.client
    client.post("/recall", json={"history": ["n01", "nobody"], "k": 500})
    found = metrics(client)
    asked = 'notellm2_request_seconds_count{method="POST",route="/recall",status="200"}'
    assert found[asked] >= 1 and found["notellm2_unknown_history_notes_total"] >= 1
    for stage in ("wait", "run"):  # one search per recall, and parts of its time
        assert found[f"notellm2_search_{stage}_seconds_count"] >= found[asked]
    assert 0 < found["notellm2_search_run_seconds_sum"] < sum(v for k, v in found.items() if "request_seconds_sum" in k)
    assert found["notellm2_short_answers_total"] >= 1 and found["notellm2_ready"] == 1
    assert 'notellm2_release_info{release="aaaa1111",week="2025-01-05"}' in found
    assert found["notellm2_log_lag_entries"] == 0
    assert not any("/notes/n01" in name for name in found)  # a series per route, not per note


def test_metrics_of_what_waits(running: Running, two_releases: TwoReleases, tmp_path: Path) -> None:
    """Each has the value that it says: nothing after a compaction, then what was written since, and when."""
    client, log = running.client, running.log
    client.delete("/notes/n19")
    compact(two_releases.lake, two_releases.first, log)
    running.service.releases.refresh()
    write_event_files(log, tmp_path)
    names = ("oldest_new_note_seconds", "oldest_waiting_note_seconds", "events_waiting", "new_notes", "gone_share")
    assert [metrics(client)[f"notellm2_{name}"] for name in names] == [0.0] * 5
    started = time.time()
    keep_events(log, [Event(f"u{n}", "n01", "view", datetime(2025, 1, 19)) for n in range(3)])
    client.delete("/notes/n18")
    with suspended(model_process(running)):
        (receipt,) = log.append([Write(Note("waits", "note 7", ("red",), "red tea"))])
        running.service.releases.read_on()
        wait_for(lambda: running.service.releases.follower.lacking == {receipt.seq})
        time.sleep(0.2)
        found, elapsed = metrics(client), time.time() - started
        assert 0.2 <= found["notellm2_oldest_waiting_note_seconds"] <= found["notellm2_oldest_new_note_seconds"]
        assert found["notellm2_oldest_new_note_seconds"] <= elapsed and found["notellm2_events_waiting"] == 3
        assert found["notellm2_gone_share"] == 1 / len(running.service.current.index.index.note_ids)
    wait_for(lambda: metrics(client)["notellm2_oldest_waiting_note_seconds"] == 0)
    found = metrics(client)
    assert found["notellm2_new_notes"] == 1 and found["notellm2_oldest_new_note_seconds"] >= 0.2


def test_metrics_while_the_log_is_away(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are asked of the database are missing; the others are what an operator needs then."""

    def fail(*_: object) -> None:
        raise LogUnavailable("gone")

    monkeypatch.setattr(running.log, "first_after", fail)
    found = metrics(running.client)
    assert "notellm2_log_failures" in found and "notellm2_events_waiting" not in found


@pytest.mark.parametrize(
    ("scope", "phases"), [(None, "examples,coverage"), ("admin", "examples,coverage,fuzzing,stateful")]
)
def test_the_interface_keeps_what_its_description_says(
    running: Running, tmp_path: Path, scope: Scope | None, phases: str
) -> None:
    """Schemathesis makes requests from the description, right ones and wrong ones, alone and in sequence."""
    keys, header = Keys(), []
    if scope is not None:
        header = ["--header", f"Authorization: Bearer {add_key(tmp_path / 'keys.json', 'test', scope)}"]
        keys = Keys.load(tmp_path / "keys.json")
    with listening(running.service, keys, takes_events=True) as address:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--checks", "all"]
        options = ["--phases", phases, "--max-examples", "4", "--generation-deterministic", *header]
        options += ["--suppress-health-check", "all", "--request-timeout", "60"]  # of a busy machine
        done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_versions_and_repeated_writes(running: Running) -> None:
    client = running.client
    first, again = (client.post("/notes", json=note("v", version=5)) for _ in range(2))
    assert (first.status_code, first.json()["applied"]) == (201, True)
    assert (again.status_code, again.json()["applied"], again.json()["seq"]) == (200, False, first.json()["seq"])
    for older in (
        client.post("/notes", json=note("v", version=4, content="older")),
        client.delete("/notes/v?version=4"),
    ):
        assert older.status_code == 409 and "has a newer version, 5, which stays" in older.json()["detail"]
    other = client.post("/notes", json=note("v", version=5, content="other"))
    assert other.status_code == 409 and "version" in other.json()["detail"]
    assert client.get("/notes/v").json()["content"] == "red tea"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/notes", {"note_id": "x"}, 422, "neither text nor picture"),
        ("POST", "/notes", note("x", image=base64.b64encode(b"no picture").decode()), 422, "picture cannot be used"),
        ("POST", "/notes", note("x" * 129), 422, "note_id"),
        ("POST", "/notes", note("a\0b"), 422, "NUL"),
        ("POST", "/notes", note("a/b"), 422, "part of an address"),
        ("POST", "/notes", note(".."), 422, "part of an address"),
        ("POST", "/notes", note("x", version=2**63), 422, "version"),
        ("GET", "/notes/a%00b", None, 422, "NUL"),
        ("GET", "/notes/n01/similar?release=zzzz", None, 404, "not in memory"),
        ("POST", "/notes", note("x", colour="red"), 422, "colour"),
        ("POST", "/notes", note("x", title=5), 422, "title"),
        ("POST", "/recall", {"history": [], "k": 5}, 422, "history"),
        ("POST", "/recall", {"history": ["n01"], "k": 0}, 422, "k"),
        ("POST", "/recall", {"history": ["n01"], "merge": "mean"}, 422, "merge"),
        ("POST", "/similar", {}, 422, "neither text nor picture"),
        ("POST", "/similar", {"title": "tea", "inputs": "image"}, 422, "there is no picture"),
        ("POST", "/similar", {"image": base64.b64encode(png(7)).decode(), "inputs": "text"}, 422, "there is no text"),
        ("GET", "/notes/nobody/similar?inputs=text", None, 404, "nobody"),
        ("GET", "/notes/n01?release=zzzz", None, 404, "not in memory"),
        ("GET", "/notes/n01/image?release=zzzz", None, 404, "not in memory"),
        ("GET", "/notes/nobody/similar", None, 404, "nobody"),
        ("GET", "/notes/nobody/image", None, 404, "nobody"),
        ("PATCH", "/notes/n01", {}, 405, "Not Allowed"),
        ("GET", "/notes/n01/similar?min_seq=99999", None, 409, "beyond the end of the log"),
        ("POST", "/recall", {"history": ["n01"], "k": 1.5}, 422, "k"),
        ("POST", "/recall", {"history": [{"note_id": "n01", "weight": True}]}, 422, "body.history.0.weight: "),
        ("POST", "/releases/cccc3333:activate", None, 409, "aaaa1111 stays"),
    ],
)
def test_faults_are_told_in_a_sentence(
    running: Running, method: str, path: str, body: object, status: int, said: str
) -> None:
    before = running.log.last_seq()
    answer = running.client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert said in answer.json()["detail"] and answer.json()["status"] == status
    assert running.log.last_seq() == before


def test_a_path_names_what_may_be_done_with_it(running: Running) -> None:
    assert running.client.options("/notes/n01").headers["allow"] == "DELETE, GET, PUT"


def test_a_whole_number_may_have_a_point(running: Running) -> None:
    assert running.client.post("/recall", json={"history": ["n01"], "k": 5.0, "min_seq": 0.0}).status_code == 200


def test_lone_surrogates_and_wrong_utf8_are_refused(running: Running) -> None:
    for body in (b'{"note_id": "\\ud800", "title": "x"}', b'{"note_id": "\xff", "title": "x"}', b"{", b"[]"):
        answer = running.client.post("/notes", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500 and answer.json()["detail"], body


def test_without_keys_only_this_machine_is_answered(running: Running) -> None:
    """A page from elsewhere, or a name from elsewhere that leads here (DNS rebinding), gets nothing."""
    for headers in ({"Host": "evil.example.org"}, {"Origin": "https://evil.example.org"}):
        answer = running.client.post("/releases/bbbb2222:activate", headers=headers)
        assert answer.status_code == 403 and answer.headers["content-type"] == "application/problem+json"
    assert running.client.get("/releases", headers={"Origin": URL}).status_code == 200


def test_large_bodies_are_refused_before_they_are_read(running: Running) -> None:
    for path, size in (("/recall", (1 << 20) + 1), ("/notes", (24 << 20) + 1)):
        parts = iter([b"x" * (size // 2)] * 3)  # a body that does not say how large it is
        for content in (b"x" * size, parts):
            answer = running.client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413, answer.text
            assert answer.headers["content-type"] == "application/problem+json"


def test_large_bodies_in_memory_have_a_bound(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come while others are being read are refused; small ones are not."""
    monkeypatch.setattr(guard, "_MAX_HELD_BYTES", 5 << 20)
    large = b'{"title": "' + b" " * (3 << 20) + b'"}'
    with listening(running.service, Keys()) as address:
        host, port = address.removeprefix("http://").split(":")
        head = f"PUT /notes/x HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"{head}Content-Length: {len(large)}\r\n\r\n".encode() + large[:1000])
            options: dict[str, Any] = {"content": large, "headers": {"Content-Type": "application/json"}}
            wait_for(lambda: httpx.put(f"{address}/notes/y", **options, timeout=60).status_code == 429)
            assert httpx.get(f"{address}/releases", timeout=60).status_code == 200
            slow.sendall(large[1000:])
            assert slow.recv(100).startswith(b"HTTP/1.1 422")  # its title is too long
        assert httpx.put(f"{address}/notes/y", **options, timeout=60).status_code == 422


def test_searches_without_a_place_are_refused_before_their_body_is_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two searches run, 32 wait, and the next one is refused at its head; what does not search goes on."""
    free = threading.Event()

    def slow(*_: object) -> Answer:
        free.wait(60)
        return Answer((), 0)

    monkeypatch.setattr(LiveIndex, "recall", slow)
    with listening(running.service, Keys()) as address, ThreadPoolExecutor(34) as callers:
        recall: dict[str, Any] = {"url": f"{address}/recall", "json": {"history": ["n00001"]}, "timeout": 60}
        answers = [callers.submit(httpx.post, **recall) for _ in range(34)]
        try:
            wait_for(lambda: refused_at_head(address, "/recall"))
            assert refused_at_head(address, "/similar")
            answer = httpx.get(f"{address}/notes/n00001/similar", timeout=60)
            assert answer.status_code == 429 and answer.json()["detail"] == "too many requests wait (search)"
            for path, status in {"/releases": 200, "/notes/similar": 404, "/notes/recall": 404}.items():
                assert httpx.get(f"{address}{path}", timeout=60).status_code == status
            text = httpx.get(f"{address}/metrics", timeout=60).text
            assert "\nnotellm2_refused_searches_total 3.0\n" in text
        finally:
            free.set()
        assert {answer.result().status_code for answer in answers} == {200}
        assert httpx.post(**recall).status_code == 200


def refused_at_head(address: str, path: str) -> bool:
    """Whether a request of which only the head comes is refused; if not, its body is waited for.

    A refused one may go on: its body is skipped, and the connection takes the next request.
    """
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as caller:
        caller.settimeout(1)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        caller.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        try:
            answer = caller.recv(4096)
        except TimeoutError:
            return False
        caller.settimeout(60)
        caller.sendall(b"x" * 1000 + f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert caller.recv(4096).startswith(b"HTTP/1.1 200")
    return answer.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in answer.lower()


def test_a_place_for_two_is_for_both_or_none() -> None:
    refused: list[None] = []
    workers = Workers("search", 1, 1, refused=lambda: refused.append(None))
    workers.require(2)
    with pytest.raises(Busy, match=r"too many requests wait \(search\)"):
        workers.require(3)
    assert len(refused) == 1


def test_bombs_are_refused_and_take_little_memory(running: Running) -> None:
    """Neither the service nor the model takes 100 MB more, at any time; the third process is in test_pictures."""
    client, bombs = running.client, refused()
    assert client.post("/notes", json=note("pictured", seed=3)).status_code == 201
    processes = [psutil.Process(), model_process(running)]
    before = [forget_peak(process) for process in processes]
    for name, data in bombs.items():
        answer = client.put("/notes/bomb", json={"title": name, "image": base64.b64encode(data).decode()})
        assert answer.status_code == 422 and "the picture cannot be used" in answer.json()["detail"], name
    assert max(peak_mb(process) - mb for process, mb in zip(processes, before, strict=True)) < MOST_MB
    assert client.post("/recall", json={"history": ["n01", "pictured"]}).status_code == 200


def test_notes_written_before_the_start_are_there_after_it(two_releases: TwoReleases, tmp_path: Path) -> None:
    """Those without a vector are embedded then; nobody waits for them."""
    log = NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")
    log.append(
        [Write(Note("kept", "note 7", ("red",), "red tea"), png(7)), Write(Note("n01", "", (), ""), deleted=True)]
    )
    service = Service(two_releases.lake, log, two_releases.first.id)
    with TestClient(make_app(service, Keys()), base_url=URL) as client:
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            early = client.get("/notes/n01/similar")  # its deletion may not have been read yet
            assert early.status_code in (404, 503), early.text
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.get("/notes/n01/similar").status_code == 404
        wait_for(lambda: "kept" in ids(client.get("/notes/n02/similar", params={"k": 30}).json()))
    wait_for(lambda: log.vectors(service.current.weights_id, 0)[0] == [1])  # it is shown first, and saved then
    service.close()
    log.close()


def test_a_damaged_release_is_refused_and_the_present_one_stays(running: Running, two_releases: TwoReleases) -> None:
    file = two_releases.second.path / "index" / "index.faiss"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\1\2\3\4")
    try:
        answer = running.client.post("/releases/bbbb2222:activate")
    finally:
        file.write_bytes(content)
    assert answer.status_code == 409 and "checksum" in answer.json()["detail"]
    assert running.client.get("/releases").json()["releases"][0]["release"] == "aaaa1111"


def test_compaction_changes_no_answer(running: Running, two_releases: TwoReleases) -> None:
    client, log = running.client, running.log
    client.post("/notes", json=note("compacted", seed=5))
    client.delete("/notes/n09")
    query = {"history": ["n01", "compacted"], "k": 50}
    before = client.post("/recall", json=query).json()
    model = running.service.current.model
    assert compact(two_releases.lake, two_releases.first, log).cut_seq == log.last_seq() == before["seq"]
    assert running.service.releases.refresh() == 1 and running.service.releases.refresh() == 0
    assert len(running.service.current.index.delta.view.vectors) == 0 and running.service.current.model is model
    after = client.post("/recall", json=query).json()
    assert [(hit["note_id"], hit["because"]) for hit in after["hits"]] == [
        (hit["note_id"], hit["because"]) for hit in before["hits"]
    ]
    assert [h["score"] for h in after["hits"]] == pytest.approx([h["score"] for h in before["hits"]], abs=1e-5)
    assert after["seq"] == before["seq"]
    client.post("/notes", json=note("after", seed=5))
    assert {"after"} == set(ids(client.get("/notes/compacted/similar", params={"k": 1}).json()))
    client.delete("/notes/compacted")
    assert "compacted" not in ids(client.get("/notes/after/similar", params={"k": 50}).json())


def test_a_switch_under_load_drops_nothing_and_going_back_loses_nothing(running: Running) -> None:
    client, service = running.client, running.service
    client.post("/notes", json=note("before", seed=3))
    stop, wrong, seen = threading.Event(), [], set()

    def ask() -> None:
        while not stop.is_set():
            answer = client.post("/recall", json={"history": ["n01", "before", "n02"], "k": 10})
            if answer.status_code != 200 or answer.json()["unknown"]:
                wrong.append(answer.text)
                continue
            body = answer.json()
            seen.add(body["release"])
            release = next(r for r in service.releases.in_memory if r.id == body["release"])
            for hit in body["hits"]:  # every answer is of one release: its scores are
                vector = release.index.vector(hit["note_id"])
                best = max(float(release.index.vector(h) @ vector) for h in hit["because"])
                if abs(best - hit["score"]) > 1e-4:
                    wrong.append(f"{hit} of {body['release']}: {best}")

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    assert client.post("/releases/bbbb2222:activate").json() == {"release": "bbbb2222"}
    between = client.post("/notes", json=note("between", seed=4))
    assert between.status_code == 201
    for release in ("aaaa1111", "bbbb2222"):  # also the one before shows it, or says that it does not yet
        answer = client.get(f"/notes/n01/similar?k=30&release={release}&min_seq={between.json()['seq']}")
        assert answer.status_code == 503 or "between" in ids(answer.json())
    time.sleep(0.5)
    started = time.perf_counter()
    assert client.post("/releases/aaaa1111:activate").json() == {"release": "aaaa1111"}
    seconds = time.perf_counter() - started
    stop.set()
    for thread in asking:
        thread.join()
    assert not wrong, wrong[:3]
    assert seen == {"aaaa1111", "bbbb2222"} and seconds < 30
    assert {"before", "between"} <= set(ids(client.get("/notes/n01/similar", params={"k": 30}).json()))


def test_an_experiment_gives_each_user_one_release_or_lists_of_both(
    running: Running, two_releases: TwoReleases
) -> None:
    client, service = running.client, running.service
    users = [f"user {n}" for n in range(40)]
    query = {"history": ["n02", "n08"], "k": 10}
    service.releases.begin(Experiment("ab", "bbbb2222", 0.5))
    alone = {
        release: client.post("/recall", json=query | {"release": release}).json()["hits"]
        for release in ("aaaa1111", "bbbb2222")
    }
    try:
        experiment = service.releases.experiment
        assert experiment is not None
        for user in users:
            answer = client.post("/recall", json=query | {"user_id": user}).json()
            assert answer["release"] == ("bbbb2222" if experiment.includes(user) else "aaaa1111")
            assert answer["hits"] == alone[answer["release"]]
            assert answer["answer"][0] == "a"
        assert {experiment.includes(user) for user in users} == {True, False}
        of_nobody = client.post("/recall", json=query).json()
        assert (of_nobody["release"], of_nobody["answer"][0]) == ("aaaa1111", "n")
        service.releases.begin(Experiment("interleave", "bbbb2222", 1.0))
        answers = [client.post("/recall", json=query | {"user_id": user}).json() for user in users]
        assert len({answer["answer"] for answer in answers}) == len(users)
        for answer in answers:
            assert {hit["release"] for hit in answer["hits"]} == {"aaaa1111", "bbbb2222"}
            assert len(set(ids(answer))) == len(answer["hits"]) == 10 and answer["answer"][0] == "i"
            for hit in answer["hits"]:
                own = {key: value for key, value in hit.items() if key != "release"}
                assert own in alone[hit["release"]]
        with pytest.raises(ValueError, match="aaaa1111 answers already"):
            service.releases.begin(Experiment("ab", "aaaa1111", 0.5))
        service.releases.activate("bbbb2222")  # the challenger has won: everybody has it, and the experiment is over
        assert service.releases.experiment is None
        assert {client.post("/recall", json=query | {"user_id": user}).json()["release"] for user in users} == {
            "bbbb2222"
        }
    finally:
        service.releases.experiment = None
        service.releases.activate("aaaa1111")


def test_each_new_release_is_compared_with_the_one_before(running: Running) -> None:
    """Until somebody goes back: then nobody gets what was left."""
    releases = running.service.releases
    releases.after_switch = Experiment("interleave", PREVIOUS, 1.0)
    try:
        with releases._switching:  # the other release leaves the memory, as it does before a new one
            for served in releases._served[1:]:
                served.release.close()
            releases._served = releases._served[:1]
        releases.activate("bbbb2222")
        assert releases.experiment == Experiment("interleave", "aaaa1111", 1.0)
        prefix, chosen = releases.of_user("somebody")
        assert [release.id for release in chosen] == ["bbbb2222", "aaaa1111"]
        assert prefix == answer_prefix("interleave", "bbbb2222", "aaaa1111")
        releases.activate("aaaa1111")
        assert releases.experiment is None and releases.of_user("somebody")[0] == NO_EXPERIMENT
    finally:
        releases.after_switch = None
        releases.activate("aaaa1111")


def test_events_are_kept_and_become_files(running: Running, tmp_path: Path) -> None:
    body = {"events": [{"user_id": "of this test", "note_id": "n01", "event": "view", "timestamp": 1737289800.5}]}
    refused = running.client.post("/events", json=body)
    assert refused.status_code == 409 and "serving.events" in refused.json()["detail"]
    with TestClient(make_app(running.service, Keys(), takes_events=True), base_url=URL) as client:
        assert client.post("/events", json=body).json() == {"kept": 1, "repeated": 0}
        own = {"events": [{**body["events"][0], "user_id": "other", "event_id": "e1"}]}
        assert [client.post("/events", json=own).json()["repeated"] for _ in range(2)] == [0, 1]
        body["events"][0] |= {"timestamp": None, "answer": "a", "release": "aaaa1111"}
        assert client.post("/events", json=body).status_code == 200
        for wrong in (
            {"events": []},
            {"events": [{"user_id": "u"}]},
            {"events": [{**body["events"][0], "event": "\0"}]},
        ):
            assert client.post("/events", json=wrong).status_code == 422
    write_event_files(running.log, tmp_path)
    rows = [row for row in pq.read_table(*tmp_path.iterdir()).to_pylist() if row["user_id"] == "of this test"]
    assert rows[0]["timestamp"].isoformat() == "2025-01-19T12:30:00.500000+00:00"
    assert abs(rows[1]["timestamp"].timestamp() - time.time()) < 600 and rows[1]["release"] == "aaaa1111"


def test_every_route_needs_a_key_of_its_scope(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secrets = {scope: add_key(file, scope, scope) for scope in ("read", "write", "admin")}
    assert all(secret not in file.read_text() for secret in secrets.values())
    app = make_app(running.service, Keys.load(file))
    open_routes = {"/healthz", "/readyz"}
    with TestClient(app, base_url=URL) as client:
        for path, operations in client.get("/openapi.json").json()["paths"].items():
            for method in operations:
                bare = client.request(method, path.replace("{", "").replace("}", ""), content=b"no json")
                wrong = client.request(
                    method, path.replace("{", "").replace("}", ""), json={}, headers={"Authorization": "Bearer wrong"}
                )
                if path in open_routes:
                    assert bare.status_code == 200, path
                else:
                    assert (bare.status_code, wrong.status_code) == (401, 401), path
        read = {"Authorization": f"Bearer {secrets['read']}"}
        assert client.get("/notes/n01/similar", headers=read).status_code == 200
        assert client.post("/notes", json=note("x"), headers=read).status_code == 403
        write = {"Authorization": f"Bearer {secrets['write']}"}
        assert client.post("/notes", json=note("x"), headers=write).status_code == 201
        assert client.post("/releases/bbbb2222:activate", headers=write).status_code == 403
