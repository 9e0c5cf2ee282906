"""What messages say, and that each receiver gets each of them once, from a real web server."""

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from datetime import date
from email.message import Message as Headers
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from notellm2_core.config.messages import MessageSettings
from notellm2_core.lake.ledger import Ledger, Subject
from notellm2_core.release.messages import (
    SECRET,
    Message,
    NotDelivered,
    Outbox,
    of_decision,
    of_failed_run,
    of_late_week,
    of_stale_release,
    receivers,
)

FIGURES = {"k": 10, "recalls": {"challenger": 41.25, "champion": 47.0}}


class Hook(HTTPServer):
    """Keeps what is posted; answers with `code`."""

    code = 200
    posts: list[tuple[Headers, bytes]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    @property
    def ids(self) -> list[str]:
        return [headers["X-NoteLLM2-Id"] for headers, _ in self.posts]


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.code == 200:
            self.server.posts.append((self.headers, body))
        self.send_response(self.server.code)
        self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook(("127.0.0.1", 0), _Handler)
    server.posts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _ledger(folder: Path, *actions: str) -> Ledger:
    ledger = Ledger(folder, "demo")
    for n, action in enumerate(actions):
        ledger.decide(action, Subject(f"r{n}", f"m{n}", "2025-01-19"), "It lost.", "weekly_retrain", FIGURES)  # type: ignore[arg-type]
    return ledger


def test_a_message_is_made_of_the_figures(tmp_path: Path) -> None:
    (refused,) = _ledger(tmp_path, "refused").state().decisions
    message = of_decision("demo", refused)
    assert message is not None and (message.id, message.event, message.is_alarm) == ("demo/decision/1", "refused", True)
    assert message.title == "demo: release r0 of the week 2025-01-19 is refused; the champion stays"
    assert message.text == "It lost. R@10: challenger 41.2, champion 47.0. By weekly_retrain."


def test_some_decisions_need_no_message(tmp_path: Path) -> None:
    decisions = _ledger(tmp_path, "measured", "banned", "allowed", "promoted").state().decisions
    messages = [of_decision("demo", decision) for decision in decisions]
    assert messages[:3] == [None] * 3 and messages[3] is not None and not messages[3].is_alarm


def test_the_other_messages(tmp_path: Path) -> None:
    failed = of_failed_run("demo", "ab12", "weekly_retrain", "2025-01-19", "notes: no notes.")
    assert (failed.title, failed.text) == (
        "demo: weekly_retrain of the week 2025-01-19 failed",
        "notes: no notes. Run ab12.",
    )
    late = of_late_week("demo", date(2025, 1, 19), ["2025-01-24", "2025-01-25"])
    assert late.id == "demo/late/2025-01-19" and late.text == "The logs of 2025-01-24, 2025-01-25 have not arrived."
    state = _ledger(tmp_path, "promoted").state()
    known = date(2025, 1, 25)
    assert of_stale_release("demo", state, known, date(2025, 2, 3), 9) is None
    stale = of_stale_release("demo", state, known, date(2025, 2, 4), 9)
    assert stale is not None and stale.text == "Release r0 knows the log until 2025-01-25, 10 days ago."
    assert of_stale_release("demo", Ledger(tmp_path, "x").state(), known, date(2026, 1, 1), 9) is None


def _messages(*ids: str) -> list[Message]:
    return [Message(i, "refused", f"title {i}", "text") for i in ids]


def test_each_message_is_posted_once_and_signed(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "s3cret")
    to, outbox = receivers(MessageSettings(webhook=hook.url)), Outbox(tmp_path)
    assert outbox.send(_messages("old"), to) == [] and hook.posts == []  # before the receiver was known
    assert outbox.send(_messages("old", "a", "b"), to) == [] and hook.ids == ["a", "b"]
    assert Outbox(tmp_path).send(_messages("old", "a", "b", "c"), to) == [] and hook.ids == ["a", "b", "c"]
    headers, body = hook.posts[0]
    assert json.loads(body)["title"] == "title a" and json.loads(body)["alarm"] is True
    assert headers["X-NoteLLM2-Signature"] == "sha256=" + hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    assert "s3cret" not in (tmp_path / "messages.json").read_text()


def test_what_a_receiver_did_not_take_is_sent_again_in_order(hook: Hook, tmp_path: Path) -> None:
    other: list[str] = []
    to = receivers(MessageSettings(webhook=hook.url)) | {"other": lambda message: other.append(message.id)}
    outbox = Outbox(tmp_path)
    outbox.send([], to)
    hook.code = 500
    (failure,) = outbox.send(_messages("a", "b"), to)
    assert failure == f"a to {hook.url}: Internal Server Error" and (hook.ids, other) == ([], ["a", "b"])
    hook.code = 200
    assert outbox.send(_messages("a", "b"), to) == [] and (hook.ids, other) == (["a", "b"], ["a", "b"])


def test_a_redirect_is_no_delivery(hook: Hook) -> None:
    """It would be followed without the message."""
    hook.code = 301
    with pytest.raises(NotDelivered, match="Moved"):
        receivers(MessageSettings(webhook=hook.url))[hook.url](_messages("a")[0])


def test_a_dead_receiver_and_a_missing_library_are_failures() -> None:
    dead = receivers(MessageSettings(webhook="http://127.0.0.1:9/"))
    with pytest.raises(NotDelivered, match="refused"):
        dead["http://127.0.0.1:9/"](_messages("a")[0])
    wrong = receivers(MessageSettings(apprise=("nonsense://",)))
    with pytest.raises(NotDelivered, match="pip install apprise|could not send"):
        wrong["nonsense://"](_messages("a")[0])
