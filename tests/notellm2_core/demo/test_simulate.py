"""The demo world's users with a service: what counts as foreseen, and a client that is killed and started again."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from notellm2_core.cli import main
from notellm2_core.config.source import DemoSettings
from notellm2_core.demo.client import ServiceClient
from notellm2_core.demo.commands import KEY_VARIABLE
from notellm2_core.demo.journal import Journal
from notellm2_core.demo.logs import DAY
from notellm2_core.demo.simulate import FeedSettings, Simulation, in_turns
from notellm2_core.demo.weeks import LaterWeeks, Look, NewNote, Visit, Week
from notellm2_core.demo.world import generate
from notellm2_core.lake.lake import Lake
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.serving.events import write_event_files
from notellm2_core.serving.keys import Keys, add_key
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.service import Service
from tests.support.served import listening, serve_release
from tests.support.waiting import wait_for

FEED = FeedSettings(size=2, history=2, k=9, shelf_days=7)


class SmallWorld(LaterWeeks):
    """One user, who has clicked a and b, and comes twice. a is old; c, d and e are new. A note of a feed is clicked if
    its name says so.
    """

    def __init__(self) -> None:
        days = {"a": 0, "b": 9, "c click": 14, "d": 14, "e click": 15, "f": 13}
        self.note_ids, self._rows = [*days], {note: row for row, note in enumerate(days)}
        self._published = np.array([*days.values()])
        self.crowd = LaterWeeks(DemoSettings(num_notes=50, num_users=20)).crowd

    def seen_in_log(self) -> dict[int, list[tuple[int, str, bool]]]:
        return {0: [(100, "a", True), (9 * DAY, "b", True)]}

    def week(self, number: int) -> Week:
        found = (
            (Look("c click", 14 * DAY + 500, 3), Look("d", 14 * DAY + 600, 4)),
            (Look("e click", 15 * DAY + 500, 5), Look("f", 15 * DAY + 600, 6)),
        )
        visits = tuple(Visit(n, 0, (14 + n) * DAY + 60, looks) for n, looks in enumerate(found))
        new = (NewNote("c click", "c", (), "c", None, 14), NewNote("e click", "e", (), "e", None, 15))
        return Week(1, 14, new, visits)

    def look_at_feed(self, week: int, visit: Visit, feed: Sequence[str]) -> list[Look]:
        return [Look(note, visit.second + 9 * n, 2 * note.endswith("click")) for n, note in enumerate(feed, start=1)]


class Answers:
    """A service that knows what it will be asked, and keeps what it gets."""

    def __init__(self, *hits: list[dict[str, str]] | None) -> None:
        self._hits = iter(hits)
        self.asked: list[tuple[Any, ...]] = []
        self.events: list[dict[str, Any]] = []
        self.written: list[str] = []

    def write(self, note: NewNote) -> bool:
        self.written.append(note.note_id)
        return True

    def recall(self, *asked: Any) -> dict[str, Any] | None:
        self.asked.append(asked)
        hits = next(self._hits)
        return None if hits is None else {"answer": f"n{len(self.asked)}", "release": "r1", "hits": hits}

    def send(self, events: Sequence[dict[str, Any]]) -> bool:
        self.events += events
        return True


def test_the_figures_of_a_week_by_hand(tmp_path: Path) -> None:
    """Monday: the feed shows c and d (a is too old, "other" is of nobody, f does not fit in); c is clicked there.
    Elsewhere, c is found again, and d is clicked: both were shown. Tuesday: the feed shows f alone, since the others
    were seen. Elsewhere, e is clicked, which was never shown, and f, which was. So of four clicks elsewhere, three are
    foreseen; each note counted once, the four clicks are on c, d, e and f: three of four.
    """
    ids = [["a", "other", "c click", "d", "f"], ["f", "d"]]
    answers = Answers(*([{"note_id": i} | ({"release": "r2"} if i == "d" else {}) for i in hits] for hits in ids))
    with closing(Journal(tmp_path / "journal.jsonl", {})) as journal:
        (counts,) = Simulation(SmallWorld(), answers, journal, FEED).run(1)  # type: ignore[arg-type]
        run = journal.run
    assert answers.asked == [
        ("u00000", ["b", "a"], 9, []),
        ("u00000", ["d", "c click"], 9, ["b"]),  # the newest two; what was seen of the last seven days is left out
    ]
    assert (counts.requests, counts.shown, counts.fresh_shown, counts.errors) == (2, 3, 2, 0)
    assert [int(part.sum()) for part in (counts.in_feed, counts.elsewhere, counts.foreseen, counts.again)] == [
        1,
        4,
        3,
        1,
    ]
    assert (counts.foreseen_share, counts.foreseen_of_all) == (0.75, 0.75)
    assert [*counts.releases] == ["r1", "r2"]
    sent = [
        (e["note_id"], e["event"], e["timestamp"] - 1736035200 - 14 * DAY, e.get("release")) for e in answers.events
    ]
    assert sent == [
        ("c click", "view", 69, "r1"), ("c click", "click", 71, "r1"), ("d", "view", 78, "r2"),
        ("d", "view", 600, None), ("d", "click", 604, None),  # c, which is found again, was read already
        ("f", "view", DAY + 69, "r1"), ("e click", "view", DAY + 500, None), ("e click", "click", DAY + 505, None),
        ("f", "view", DAY + 600, None), ("f", "click", DAY + 606, None),
    ]  # fmt: skip
    assert [e["event_id"] for e in answers.events] == [
        *(f"{run}-1-0-{n}" for n in range(5)), *(f"{run}-1-1-{n}" for n in range(5))
    ]  # fmt: skip
    with closing(Journal(tmp_path / "journal.jsonl", {})) as journal:  # once more: nothing is asked or sent again
        idle = Answers()
        (again,) = Simulation(SmallWorld(), idle, journal, FEED).run(1)  # type: ignore[arg-type]
    assert (again.foreseen == counts.foreseen).all() and again.releases == counts.releases
    assert (idle.asked, idle.events, idle.written) == ([], [], [])


def test_a_feed_takes_hits_of_both_releases_in_turns() -> None:
    hits = [["a", "r1"], ["b", "r1"], ["c", "r1"], ["d", "r2"], ["e", "r1"], ["f", "r2"]]
    assert [note for note, _ in in_turns(hits)] == ["a", "d", "b", "f", "c", "e"]
    of_one = [["b", "r1"], ["a", "r1"]]
    assert in_turns(of_one) == of_one and in_turns([]) == []


def test_an_error_is_a_visit_without_a_feed(tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the journal
        with closing(Journal(tmp_path / "journal.jsonl", {})) as journal:
            answers = Answers(None, [{"note_id": "f"}])
            (counts,) = Simulation(SmallWorld(), answers, journal, FEED).run(1)  # type: ignore[arg-type]
        assert (counts.errors, counts.requests, counts.shown, int(counts.foreseen.sum())) == (1, 2, 1, 1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, NoteLog, Path]]:
    """The address of a service of the small demo world's notes, its log, and the folder of keys."""
    root = tmp_path_factory.mktemp("site")
    generate(root / "world", DemoSettings(num_notes=50, num_users=20, num_days=14))
    lake, log = Lake(root / "lake"), NoteLog.open(f"sqlite:///{root / 'log.db'}")
    release = serve_release(lake, "aaaa1111", root / "world")
    service = Service(lake, log, release.id, root / "world")
    add_key(root / "keys.json", "reader", "read")
    (root / "key").write_text(add_key(root / "keys.json", "platform", "write") + "\n")
    wait_for(lambda: service.current.model.is_running)
    with listening(service, Keys.load(root / "keys.json"), takes_events=True) as url:
        yield url, log, root
    service.close()
    log.close()


def events_of(log: NoteLog, folder: Path) -> list[tuple[Any, ...]]:
    write_event_files(log, folder)
    rows = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return sorted((r["user_id"], r["timestamp"].timestamp(), r["note_id"], r["event"], r["answer"] or "") for r in rows)


@pytest.mark.slow
def test_a_killed_simulation_goes_on_and_its_events_are_there_once(
    served: tuple[str, NoteLog, Path], tmp_path: Path
) -> None:
    """Two weeks, killed twice. The events are those that follow from what the journal says that users were shown."""
    url, log, root = served
    journal, weeks = tmp_path / "journal.jsonl", tmp_path / "weeks.txt"
    cli = [sys.executable, "-W", "ignore", "-c", "from notellm2_core.cli import main; main()", "demo", "simulate"]
    world = ["--notes", "50", "--users", "20", "--days", "14", "--feed", "5", "--k", "50", "--weeks", "2"]
    command = [*cli, "--url", url, *world, "--journal", str(journal), "--api-key-file", str(root / "key")]
    command += ["--after-week", f'echo "$WEEK $WEEK_NUMBER" >> {weeks}', "--notes-table", str(tmp_path / "notes")]
    num_lines = 0
    for least in (50, 200):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        wait_for(lambda least=least: journal.exists() and journal.read_bytes().count(b"\n") >= least)
        process.kill()
        process.communicate()
        assert journal.read_bytes().count(b"\n") > num_lines
        num_lines = journal.read_bytes().count(b"\n")
    finished, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert finished.returncode == 0, finished.stderr
    rows = finished.stdout.splitlines()
    assert len(rows) == 4 and rows[2].startswith("| 1 | 2025-01-19 | aaaa1111 | 22 |") and rows[3].endswith("| 0 |")
    assert (again.stdout, again.returncode) == (finished.stdout, 0)
    assert weeks.read_text() == "2025-01-19 1\n2025-01-26 2\n"
    settings = DemoSettings(num_notes=50, num_users=20, num_days=14)
    feed = FeedSettings(size=5, history=30, k=50, shelf_days=14)
    with closing(Journal(journal, {**settings.model_dump(), **vars(feed)})) as known:
        known._records = {key: value for key, value in known._records.items() if key[0] == "visit"}
        known.add = lambda value, *key: value  # type: ignore[method-assign]
        expected = Answers()  # it is asked for nothing
        counts = [*Simulation(LaterWeeks(settings), expected, known, feed).run(2)]  # type: ignore[arg-type]
    events = [
        (e["user_id"], float(e["timestamp"]), e["note_id"], e["event"], e.get("answer") or "") for e in expected.events
    ]
    found = events_of(log, tmp_path / "events")
    assert found == sorted(events) and len(found) == len({*found}) > 500
    assert len(expected.written) == 44 and all(log.get(note) is not None for note in expected.written)
    table = read_note_table(tmp_path / "notes", tmp_path)  # the platform's own
    assert sorted(table.note_ids) == sorted(expected.written) and not table.dropped
    assert sum(week.shown for week in counts) > 300 and sum(week.fresh_shown for week in counts) > 50


def test_what_the_service_refuses_is_said(
    served: tuple[str, NoteLog, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, _, root = served
    command = [
        "demo",
        "simulate",
        "--url",
        url,
        "--notes",
        "50",
        "--users",
        "20",
        "--journal",
        str(tmp_path / "j.jsonl"),
    ]
    refused = "the service refuses POST /notes (401)"
    for key, why in {"": refused, "wrong": refused, "a line\nand another": "cannot be asked at"}.items():
        monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2 and why in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be asked at 127"), closing(ServiceClient("127.0.0.1:1")) as client:
        client.wait()
    with pytest.raises(SystemExit):
        main([*command, "--weeks", "0"])
    assert "are 1 or more" in capsys.readouterr().err
    with closing(ServiceClient(url, (root / "key").read_text().strip())) as client:
        assert client.recall("u", [], 5, []) is None and client.recall("u", ["n000001"], 5, []) is not None
        assert [*client.faults.values()] == [1] and "POST /recall: 422" in next(iter(client.faults))
    monkeypatch.setenv(KEY_VARIABLE, (root / "key").read_text().strip())
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--weeks", "1", "--journal", str(tmp_path / "k.jsonl"), "--users", "20", "--days", "14",
              "--after-week", "exit 3"])  # fmt: skip
    assert stopped.value.code == 2 and "the command after week 1 ended with 3" in capsys.readouterr().err


class _Busy(BaseHTTPRequestHandler):
    """Answers the first requests with 503 and 429."""

    statuses: list[int] = []

    def do_GET(self) -> None:
        self.send_response(self.statuses.pop(0) if self.statuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_busy_service_is_waited_for_and_one_that_is_away_is_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(_Busy, "statuses", [503, 429])
    with closing(ServiceClient(url)) as client:
        client.wait()
        assert not client.faults and not _Busy.statuses
    monkeypatch.setattr(_Busy, "statuses", [503] * 100)
    with closing(ServiceClient(url, patience=0.3)) as client, pytest.raises(ConnectionError, match="it answers 503"):
        client.wait()
    server.shutdown()
    server.server_close()
    with closing(ServiceClient(url, patience=0.3)) as client, pytest.raises(ConnectionError, match="has not answered"):
        client.wait()
