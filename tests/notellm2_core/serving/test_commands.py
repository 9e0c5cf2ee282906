"""`notellm2 serve` as a process: it is killed, and has lost nothing that it acknowledged. `notellm2 keys`."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from notellm2_core.cli import main
from notellm2_core.config.section import http_address
from notellm2_core.config.settings import ServingSettings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.release.promotion import promote
from notellm2_core.release.served import served_releases
from notellm2_core.serving.commands import require_local_or_keys
from notellm2_core.serving.events import Event, keep_events, write_event_files
from notellm2_core.serving.experiment import answer_prefix
from notellm2_core.serving.keys import Keys, add_key
from notellm2_core.serving.log import NoteLog
from tests.support.cluster import free_port
from tests.support.released import write_release
from tests.support.served import serve_release
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[3]
START_SECONDS = 300
CLI = [sys.executable, "-W", "ignore", "-c", "from notellm2_core.cli import main; main()"]


@contextmanager
def serving(config: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """A server that has read its log, and a client. It is killed at the end."""
    port = free_port()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*CLI, "serve", "--config", str(config), "--port", str(port), *options],
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + START_SECONDS
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.3)
            yield process, client
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _if_ok(answer: httpx.Response) -> dict[str, Any] | None:
    return answer.json() if answer.status_code == 200 else None


@pytest.mark.slow
def test_a_killed_server_has_lost_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor has one whose log is compacted, and that follows the ledger to another release, which is then compared with
    the one before; so it is after a start, too.
    """
    lake, source = Lake(tmp_path / "lake"), write_release(tmp_path / "small").source
    release = serve_release(lake, "aaaa1111", source)
    serve_release(lake, "bbbb2222", source, seed=1, dim=16)
    config = tmp_path / "tiny.yaml"
    settings = yaml.safe_load((ROOT / "pipelines/configs/tiny.yaml").read_text())
    config.write_text(yaml.safe_dump(settings | {"name": "tiny", "lake": str(lake.root)}))
    promote(lake, Ledger(lake.root, "tiny"), release.id)
    note = {"title": "note 7", "topics": ["red"], "content": "red tea"}
    with serving(config, tmp_path / "serve.log") as (process, client):
        for n in range(5):
            assert client.put(f"/notes/new{n}", json=note).status_code in (201, 202)  # the model may still load
        assert client.delete("/notes/n01").status_code == 200
        process.kill()
    experiment = ("--experiment", "interleave", "--challenger", "previous", "--share", "1")
    query = {"history": ["n02"], "user_id": "somebody", "k": 10}
    with serving(config, tmp_path / "serve.log", *experiment) as (process, client):
        assert client.post("/recall", json=query).json()["answer"][0] == "n"  # there is none before it
        answer = client.get("/notes/new0/similar", params={"k": 100}).json()
        found = {hit["note_id"] for hit in answer["hits"]}
        assert {f"new{n}" for n in range(1, 5)} <= found and "n01" not in found and answer["release"] == release.id
        main(["compact", "--config", str(config)])
        assert f"{release.id}: notes taken in up to entry 6: 6; in all: " in capsys.readouterr().out
        wait_for(lambda: "notellm2_new_notes 0.0" in client.get("/metrics").text)
        again = client.get("/notes/new0/similar", params={"k": 100}).json()
        assert {hit["note_id"] for hit in again["hits"]} == found and again["seq"] == answer["seq"]
        promote(lake, Ledger(lake.root, "tiny"), "bbbb2222")
        wait_for(lambda: client.get("/readyz").json()["release"] == "bbbb2222")
        wait_for(lambda: served_releases(lake) == {"aaaa1111", "bbbb2222"})
        _require_both(client.post("/recall", json=query).json())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    with serving(config, tmp_path / "serve.log", *experiment) as (_, client):
        _require_both(client.post("/recall", json=query).json())
    _require_a_report(config, tmp_path, capsys)


def _require_both(answer: dict[str, Any]) -> None:
    assert answer["answer"].startswith(answer_prefix("interleave", "bbbb2222", "aaaa1111"))
    assert {hit["release"] for hit in answer["hits"]} == {"aaaa1111", "bbbb2222"}


def _require_a_report(config: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`notellm2 experiments` prints what the events of both releases say."""
    log = NoteLog.open(f"sqlite:///{folder / 'events.db'}")
    prefix = answer_prefix("ab", "aaaa1111", "bbbb2222")
    shown = [(f"u{n}", f"{prefix}{n}", "aaaa1111" if n % 2 else "bbbb2222") for n in range(20)]
    keep_events(log, [Event(user, "n02", "view", datetime(2025, 1, 19), answer, by) for user, answer, by in shown])
    write_event_files(log, folder / "events")
    log.close()
    command = ["experiments", "ab", "--config", str(config), "--champion", "aaaa", "--challenger", "bbbb"]
    main([*command, "--events", str(folder / "events")])
    text = capsys.readouterr().out
    assert "20 users; 10 exposures of the champion, 10 of the challenger." in text
    assert "| hit rate | 0 [0, 0] | 0 [0, 0] | 0 [0, 0] |" in text and "| coverage | 0.05 [" in text


def test_other_machines_need_keys(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.json", "feed", "read")
    for host in ("127.0.0.1", "::1", "localhost"):
        require_local_or_keys(host, Keys())
    for host in ("0.0.0.0", "::", "feed.example.org"):
        with pytest.raises(ValueError, match="needs --keys"):
            require_local_or_keys(host, Keys())
        require_local_or_keys(host, Keys.load(tmp_path / "keys.json"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "needs --keys"),
        (["--model", "folder", "--release", "aaaa"], "takes the place of --config and --release"),
        (["--model", "folder"], "folder holds no model"),
    ],
)
def test_an_embedder_that_cannot_be_started_says_why(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["embedder", *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("url", ["gpu-box:8090", "ftp://gpu-box", "http://", "http://me:secret@gpu-box:8090"])
def test_the_address_of_an_embedder(url: str) -> None:
    assert ServingSettings(embedder="https://gpu-box:8090/v1").embedder == "https://gpu-box:8090/v1"
    with pytest.raises(ValueError, match="is no address like http://HOST:PORT"):
        ServingSettings(embedder=url)
    with pytest.raises(ValueError, match="gpu-box:8090 is no address") as error:
        http_address("http://me:secret@gpu-box:8090")
    assert "secret" not in str(error.value)


def test_keys_are_printed_once_and_kept_as_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    main(["keys", "add", "--keys", str(file), "--name", "feed", "--scope", "write"])
    secret = capsys.readouterr().out.strip()
    keys = Keys.load(file)
    assert secret not in file.read_text() and file.stat().st_mode & 0o077 == 0
    assert keys.scope_of(secret) == "write" and keys.scope_of(secret + "x") is None and keys.scope_of(None) is None
    assert keys.allows("write", "read") and not keys.allows("write", "admin") and not keys.allows(None, "read")
    with pytest.raises(ValueError, match="has a key 'feed' already"):
        add_key(file, "feed", "read")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"keys": []}', '{"keys": [{"name": "a", "scope": "all", "sha256": ""}]}']
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: str) -> None:
    """Above all, it never means that everything is allowed."""
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="keys.json"):
        Keys.load(file)
