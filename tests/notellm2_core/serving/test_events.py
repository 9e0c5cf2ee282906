"""Events: each is in exactly one file, in both databases, wherever the writer is killed; the files are a log."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.check.check import DataSettings, check_source
from notellm2_core.serving import events
from notellm2_core.serving.events import SCHEMA, Event, EventWriter, keep_events, write_event_files
from notellm2_core.serving.log import NoteLog
from tests.support.waiting import wait_for

TIME = datetime(2025, 1, 19, 12, 30, 1, 5)


@pytest.fixture
def log(log_url: str) -> Iterator[NoteLog]:
    log = NoteLog.open(log_url)
    yield log
    log.close()


def event(number: int, **more: Any) -> Event:
    return Event(f"u{number}", f"n{number}", "view", TIME, **more)


def written(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.parquet"))
    return sorted(user for file in files for user in pq.read_table(file)["user_id"].to_pylist())


def test_events_become_a_file_of_the_contract(log: NoteLog, tmp_path: Path) -> None:
    keep_events(log, [event(1, answer="a", release="r"), event(2)])
    assert write_event_files(log, tmp_path / "events") == 2
    (file,) = (tmp_path / "events").iterdir()
    table = pq.read_table(file)
    assert table.schema.equals(SCHEMA)
    utc = TIME.isoformat() + "+00:00"
    assert [{**row, "timestamp": row["timestamp"].isoformat()} for row in table.to_pylist()] == [
        {"user_id": "u1", "note_id": "n1", "timestamp": utc, "event": "view", "answer": "a", "release": "r"},
        {"user_id": "u2", "note_id": "n2", "timestamp": utc, "event": "view", "answer": None, "release": None},
    ]
    assert write_event_files(log, tmp_path / "events") == 0 and len([*(tmp_path / "events").iterdir()]) == 1


@pytest.mark.parametrize("place", ["before the file", "in the file", "after the file"])
def test_an_event_is_in_one_file_wherever_the_writer_is_killed(
    log: NoteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    keep_events(log, [event(n) for n in range(5)])
    with monkeypatch.context() as patch:
        if place == "before the file":
            patch.setattr(events, "_write_file", kill)
        elif place == "in the file":
            patch.setattr(pq, "write_table", kill)
        else:
            patch.setattr(events, "delete", kill)
        with pytest.raises(KeyboardInterrupt):
            write_event_files(log, tmp_path)
    keep_events(log, [event(n) for n in range(5, 8)])
    assert write_event_files(log, tmp_path) == 8
    assert written(tmp_path) == [f"u{n}" for n in range(8)]


def test_an_event_that_is_sent_again_counts_once(log: NoteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one call, in a later one, and after the first is in a file; those without an id count each time."""
    assert keep_events(log, [event(1, event_id="a"), event(2), event(3, event_id="a")]) == 1
    assert keep_events(log, [event(4, event_id="a"), event(5, event_id="b"), event(2)]) == 1
    assert write_event_files(log, tmp_path) == 4
    assert keep_events(log, [event(6, event_id="b")]) == 1 and write_event_files(log, tmp_path) == 0
    assert written(tmp_path) == ["u1", "u2", "u2", "u5"]
    monkeypatch.setattr(events, "ID_DAYS", -1)  # a month later
    write_event_files(log, tmp_path)
    assert keep_events(log, [event(6, event_id="b")]) == 0 and write_event_files(log, tmp_path) == 1


def test_many_events_are_several_files(log: NoteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_FILE_EVENTS", 3)
    keep_events(log, [event(n) for n in range(7)])
    assert write_event_files(log, tmp_path) == 7 and len([*tmp_path.glob("*.parquet")]) == 3
    assert write_event_files(log, tmp_path) == 0
    assert written(tmp_path) == [f"u{n}" for n in range(7)]


def test_the_thread_writes_from_time_to_time_and_at_the_end(
    log: NoteLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in the way").touch()
    writer = EventWriter(log, tmp_path / "in the way" / "events", seconds=0.01)
    keep_events(log, [event(1)])
    wait_for(lambda: "cannot be written" in caplog.text)
    writer.close()
    writer = EventWriter(log, tmp_path / "events", seconds=0.01)
    wait_for(lambda: (tmp_path / "events").exists() and written(tmp_path / "events") == ["u1"])
    writer.close()
    writer = EventWriter(log, tmp_path / "events", seconds=3600)
    keep_events(log, [event(2)])
    writer.close()
    assert written(tmp_path / "events") == ["u1", "u2"]


def test_the_files_are_read_beside_the_source_s_own_log(tmp_path: Path) -> None:
    log = NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")
    source = tmp_path / "source"
    (source / "events").mkdir(parents=True)
    notes = {"note_id": ["n1", "n2"], "title": ["a", "b"], "topics": [["x"], []], "content": ["c", "d"]}
    pq.write_table(pa.table(notes), source / "notes.parquet")
    own = "user_id,note_id,timestamp,event\n" + "".join(f"u{n},n1,2025-01-{n + 1:02},click\n" for n in range(20))
    (source / "events" / "own.csv").write_text(own)
    keep_events(log, [event(1), event(2)])
    assert write_event_files(log, source / "events") == 2
    report = check_source(source, DataSettings())
    assert report["log"]["events"] == {"click": 20, "view": 2}
    log.close()
