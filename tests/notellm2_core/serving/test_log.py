"""The log: what it holds after any writes, that readers miss nothing, and that kills and full disks take nothing."""

import asyncio
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import event, text

from notellm2_core.notes.note import Note
from notellm2_core.serving import database, rows
from notellm2_core.serving.database import reading, writing
from notellm2_core.serving.group_commit import GroupCommit, LogBusy
from notellm2_core.serving.log import Entry, LogFull, LogUnavailable, NoteLog, Receipt, Write
from notellm2_core.serving.tables import METADATA, VERSION_TABLE
from tests.notellm2_core.serving.writers import NOTES_OF_A_WRITE, Writers, notes
from tests.support.waiting import wait_for


def without_vectors(log: NoteLog, weights_id: str, after: int, limit: int) -> list[Entry]:
    """The first `limit` newest entries of notes above `after` that are not deleted and have no vector of the model."""
    newest = {entry.note.note_id: entry for entry in log.tail(0, 10_000)}
    known = set(log.vectors(weights_id, 0)[0])
    missing = (entry for entry in newest.values() if not entry.deleted and entry.seq not in known)
    return sorted((entry for entry in missing if entry.seq > after), key=lambda entry: entry.seq)[:limit]


def _vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


X, Y = _vector(1, 0), _vector(0.6, 0.8)


@contextmanager
def _opened(url: str) -> Iterator[NoteLog]:
    with closing(NoteLog.open(url)) as log:
        yield log


def _note(note_id: str = "a", title: str = "title") -> Note:
    return Note(note_id, title, ("topic", "\N{CAT FACE}"), "内容")


def _deletion(note_id: str = "a", version: int | None = None) -> Write:
    return Write(_note(note_id), deleted=True, version=version)


# What a write comes to


def test_entries_are_numbered_in_their_order_and_read_back_as_written(log_url: str) -> None:
    with _opened(log_url) as log:
        assert (log.last_seq(), log.tail(0), log.get("a"), log.image("?")) == (0, [], None, None)
        writes = [Write(_note("a"), image=b"png"), Write(_note("b"), image=b"png", version=7), _deletion("never seen")]
        assert log.append(writes) == [Receipt(1, 1, True), Receipt(2, 7, True), Receipt(3, 1, True)]
        assert log.append([]) == []
    with _opened(log_url) as log:
        entries, png = log.tail(0), sha256(b"png").hexdigest()
        now = entries[0].time
        assert abs(datetime.now(UTC) - now) < timedelta(minutes=5)
        gone = Note("never seen", "", (), "")
        assert entries == [
            Entry(1, _note("a"), False, 1, png, now),
            Entry(2, _note("b"), False, 7, png, now),
            Entry(3, gone, True, 1, None, now),
        ]
        assert [log.get(entry.note.note_id) for entry in entries] == entries
        assert log.image(png) == b"png" and log.last_seq() == 3
        assert log.tail(1, limit=1) == entries[1:2] and log.tail(3) == []


@pytest.mark.parametrize(
    ("write", "receipt"),
    [
        (Write(_note(), version=5), Receipt(1, 5, False)),  # the same again
        (Write(_note()), Receipt(1, 5, False)),
        (Write(_note(), version=4), Receipt(1, 5, False)),  # older
        (Write(_note(title="other"), version=4), Receipt(1, 5, False)),
        (_deletion(version=0), Receipt(1, 5, False)),
        (Write(_note(), version=6), Receipt(2, 6, True)),  # newer
        (Write(_note(), version=2**63 - 1), Receipt(2, 2**63 - 1, True)),
        (Write(_note(title="other")), Receipt(2, 6, True)),
        (Write(_note(), image=b"png"), Receipt(2, 6, True)),
        (_deletion(), Receipt(2, 6, True)),
    ],
)
def test_an_older_version_never_wins_and_a_repeated_write_changes_nothing(
    tmp_path: Path, write: Write, receipt: Receipt
) -> None:
    with _opened(f"sqlite:///{tmp_path}/log.db") as log:
        log.append([Write(_note(), version=5)])
        assert log.append([write]) == [receipt]
        newest = log.get("a")
        assert newest is not None and (newest.seq, newest.version) == (receipt.seq, receipt.version)
        assert newest.content == (write.content if receipt.applied else Write(_note()).content)
        assert log.last_seq() == receipt.seq
        if receipt.applied:
            assert log.append([write]) == [replace(receipt, applied=False)]


def test_a_deleted_note_comes_back_by_a_newer_version_only(log_url: str) -> None:
    with _opened(log_url) as log:
        log.append([Write(_note(), version=5), _deletion(version=6)])
        assert log.append([Write(_note(), version=5)]) == [Receipt(2, 6, False)]
        assert log.append([_deletion()]) == [Receipt(2, 6, False)]
        assert log.append([Write(_note(), version=7)]) == [Receipt(3, 7, True)]
        assert [entry.deleted for entry in log.tail(0)] == [False, True, False]


def test_writes_of_one_note_in_one_transaction_are_taken_in_order(log_url: str) -> None:
    with _opened(log_url) as log:
        log.append([Write(_note(title="0"))])
        writes = [
            Write(_note(title="1")),
            Write(_note(title="2"), vectors={"m": X}),
            Write(_note(title="2")),
            _deletion(),
        ]
        receipts = log.append([*writes, Write(_note(title="3"), vectors={"m": Y})])
        assert [(r.seq, r.version, r.applied) for r in receipts] == [
            (2, 2, True), (3, 3, True), (3, 3, False), (4, 4, True), (5, 5, True),
        ]  # fmt: skip
        assert [entry.note.title for entry in log.tail(0)] == ["0", "1", "2", "", "3"]
        assert log.vectors("m", 0)[0] == [5] and log.vectors("m", 0, upto=3)[0] == [3]


def test_other_content_under_a_version_is_an_error_that_spoils_no_other_write(log_url: str) -> None:
    with _opened(log_url) as log:
        log.append([Write(_note(), version=5)])
        good, bad = Write(_note("b")), Write(_note(title="other"), version=5)
        with pytest.raises(ValueError, match="note 'a' has other content in version 5"):
            log.append([good, bad])
        assert (log.last_seq(), log.get("b")) == (1, None)
        results = log.append_each([bad, good, bad])
        assert results[1] == Receipt(2, 1, True)
        assert [str(result) for result in results[::2]] == [str(results[0])] * 2 and "version 5" in str(results[0])
        with pytest.raises(ValueError, match="note 'c' has the highest version"):
            log.append([Write(_note("c"), version=2**63 - 1), _deletion("c")])


@pytest.mark.parametrize(
    ("note", "more", "sentence"),
    [
        (Note("", "", (), ""), {}, "a note id has 1 to 128 characters; '' has 0"),
        (Note("x" * 129, "", (), ""), {}, "has 129"),
        (Note("a\0", "", (), ""), {}, "has a NUL or a lone surrogate: 'a\\\\x00'"),
        (Note("a", "\ud800", (), ""), {}, "a text of note 'a' has a NUL or a lone surrogate: '\\\\ud800'"),
        (Note("a", "", ("b", "\ud83d\ude00"), ""), {}, "a text of note 'a' has"),
        (Note("a", "", (), "b\0"), {}, "a text of note 'a' has"),
        (_note(), {"version": -1}, "that of note 'a' is -1"),
        (_note(), {"version": 2**63}, "that of note 'a' is 9223372036854775808"),
        (_note(), {"vectors": {"m": _vector(np.nan, 0)}}, "that of note 'a' holds NaN"),
        (_note(), {"vectors": {"m": _vector(2, 0)}}, "that of note 'a' has length 2"),
        (_note(), {"vectors": {"m": X[None]}}, "the vector of note 'a' is an array of 2 dimensions"),
        (_note(), {"vectors": {"\0": X}}, "has a NUL"),
    ],
)
def test_what_no_database_or_index_could_hold_is_refused(note: Note, more: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Write(note, **more)


def test_the_longest_id_and_any_text_can_be_written(log_url: str) -> None:
    note = Note("\N{CAT FACE}" * 128, "x" * 100_000, ('a"\\b', "\x01'%s:q"), "\r\n\t\ufeff\U0010ffff")
    with _opened(log_url) as log:
        log.append([Write(note)])
        entry = log.get(note.note_id)
        assert entry is not None and entry.note == note


# Vectors


def test_vectors_are_those_of_the_newest_entries(log_url: str) -> None:
    with _opened(log_url) as log:
        seqs, none = log.vectors("m", 0)
        assert seqs == [] and none.shape == (0, 0) and none.dtype == np.float32
        log.append([Write(_note("a"), vectors={"m": X, "n": _vector(1)}), Write(_note("b"), vectors={"m": Y})])
        log.append([Write(_note("c")), _deletion("b"), Write(_note("a", "new"))])
        assert log.vectors("m", 0)[0] == [] and [entry.seq for entry in without_vectors(log, "m", 0, 9)] == [3, 5]
        assert [entry.seq for entry in without_vectors(log, "m", 3, 9)] == [5]
        assert [entry.seq for entry in without_vectors(log, "m", 0, 1)] == [3]
        log.put_vectors("m", {5: X, 3: Y, 99: X})  # 99: as if it were forgotten
        seqs, found = log.vectors("m", 0)
        assert seqs == [3, 5] and np.array_equal(found, [Y, X]) and found.dtype == np.float32
        assert log.vectors("m", 3)[0] == [5] and without_vectors(log, "m", 0, 9) == []
        earlier = {upto: log.vectors("m", 0, upto)[0] for upto in range(6)}
        assert earlier == {0: [], 1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 3], 5: [3, 5]}
        assert log.vectors("n", 0, upto=1)[0] == [1] and log.vectors("?", 0)[0] == []


def test_a_vector_that_is_there_stays_and_one_that_is_missing_is_added_by_a_repeated_write(log_url: str) -> None:
    with _opened(log_url) as log:
        log.append([Write(_note(), vectors={"m": X})])
        log.put_vectors("m", {1: Y})
        writes = [Write(_note(), vectors={"m": Y, "n": Y}), Write(_note("a", "old"), version=0, vectors={"k": X})]
        assert log.append(writes) == [Receipt(1, 1, False)] * 2
        assert np.array_equal(log.vectors("m", 0)[1], [X]) and np.array_equal(log.vectors("n", 0)[1], [Y])
        assert log.vectors("k", 0)[0] == []  # of other content


def test_vectors_of_a_model_have_one_length(log_url: str) -> None:
    long = _vector(1, 0, 0)
    with _opened(log_url) as log:
        with pytest.raises(ValueError, match="the vectors of model m have 2 numbers; one of 3 is not its"):
            log.append([Write(_note("a"), vectors={"m": X}), Write(_note("b"), vectors={"m": long})])
        log.append([Write(_note("a"), vectors={"m": X}), Write(_note("b"))])
        results = log.append_each([Write(_note("c"), vectors={"m": long}), Write(_note("c"))])
        assert isinstance(results[0], ValueError) and results[1] == Receipt(3, 1, True)
        with pytest.raises(ValueError, match="have 2 numbers; one of 3"):
            log.put_vectors("m", {2: long})
        with pytest.raises(ValueError, match="have 2 numbers; one of 3"):
            log.put_vectors("new", {2: X, 3: long})
        with pytest.raises(ValueError, match="that of note 'of entry 2' has length 2"):
            log.put_vectors("m", {2: 2 * X})
        assert log.vectors("m", 0)[0] == [1] and log.vectors("new", 0)[0] == []


# Forgetting


def test_forgetting_keeps_the_newest_entry_of_every_note(log_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notellm2_core.serving.log.BLOCK", 2)
    images = {name: sha256(name.encode()).hexdigest() for name in ("old", "shared", "new")}
    with _opened(log_url) as log:
        log.append([Write(_note("a", "1"), image=b"old", vectors={"m": X}), Write(_note("b"), image=b"shared")])
        log.append([Write(_note("a", "2"), image=b"shared", vectors={"m": X}), Write(_note("a", "3"), image=b"new")])
        log.append([Write(_note("b", "2")), _deletion("b"), Write(_note("c"), vectors={"m": Y})])
        log.append([Write(_note("c", "2"), image=b"shared")])
        kept = {note_id: log.get(note_id) for note_id in "abc"}
        assert log.forget(0) == 0
        assert log.forget(1) == 1 and log.image(images["old"]) is None and log.image(images["shared"]) == b"shared"
        assert log.forget(10**6) == 4 and log.forget(10**6) == 0
        assert {note_id: log.get(note_id) for note_id in "abc"} == kept
        assert [entry.seq for entry in log.tail(0)] == [4, 6, 8]
        assert {name for name, image_id in images.items() if log.image(image_id)} == {"shared", "new"}
        assert [entry.seq for entry in without_vectors(log, "m", 0, 9)] == [4, 8]
        assert _count(log, "log_vectors") == 0 and _count(log, "log_images") == 2
        assert log.append([Write(_note("d")), _deletion("a")]) == [Receipt(9, 1, True), Receipt(10, 4, True)]


def test_more_than_one_block_is_written_read_and_forgotten(log_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK", 7)
    with _opened(log_url) as log:
        writes = [Write(_note(str(n % 10), str(n)), image=bytes([n % 5]), vectors={"m": X}) for n in range(40)]
        assert [receipt.seq for receipt in log.append(writes)] == [*range(1, 41)]
        log.put_vectors("n", dict.fromkeys(range(1, 41), Y))
        assert log.forget(40) == 30 and log.vectors("n", 0)[0] == [*range(31, 41)]


def _count(log: NoteLog, table: str) -> int:
    with reading(log._engine) as connection:
        count: int = connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
        return count


# Any interleaving


class AnyWrites(RuleBasedStateMachine):
    """The log beside a list of entries, of which nothing is indexed, batched or committed."""

    new_url: Callable[[], str]

    def __init__(self) -> None:
        super().__init__()
        self.log = NoteLog.open(self.new_url())
        self.entries: list[Entry] = []  # those that are forgotten too
        self.forgotten: set[int] = set()
        self.vectors: dict[tuple[str, int], Sequence[float]] = {}

    _writes = st.builds(
        Write,
        note=st.builds(Note, st.sampled_from("abc"), st.sampled_from("xy"), st.just(("t",)), st.just("")),
        image=st.sampled_from([None, None, b"1", b"2"]),
        deleted=st.booleans(),
        version=st.none() | st.integers(0, 5),
        vectors=st.dictionaries(st.sampled_from("mn"), st.sampled_from([X, Y]), max_size=2),
    )

    def newest(self, note_id: str, upto: int | None = None) -> Entry | None:
        of_note = [e for e in self.entries[:upto] if e.note.note_id == note_id]
        return of_note[-1] if of_note else None

    def expected(self, write: Write) -> Receipt | None:
        """What the write must come to; None: an error. Changes the model."""
        newest = self.newest(write.note.note_id)
        image_id = sha256(write.image).hexdigest() if write.image is not None and not write.deleted else None
        note = Note(write.note.note_id, "", (), "") if write.deleted else write.note
        content = (note, write.deleted, image_id)
        is_same = newest is not None and (newest.note, newest.deleted, newest.image_id) == content
        version = (newest.version if newest else 0) + 1 if write.version is None else write.version
        if newest and not is_same and version == newest.version:
            return None
        applied = newest is None or (not is_same if write.version is None else version > newest.version)
        if applied:
            newest = Entry(len(self.entries) + 1, note, write.deleted, version, image_id, datetime.now(UTC))
            self.entries.append(newest)
        assert newest is not None
        if (applied or is_same) and not write.deleted:
            for weights_id, vector in write.vectors.items():
                self.vectors.setdefault((weights_id, newest.seq), vector.tolist())
        return Receipt(newest.seq, newest.version, applied)

    @rule(writes=st.lists(_writes, max_size=5))
    def append_each(self, writes: list[Write]) -> None:
        results = self.log.append_each(writes)
        assert [None if isinstance(r, ValueError) else r for r in results] == [self.expected(w) for w in writes]

    @rule(writes=st.lists(_writes, max_size=3))
    def append(self, writes: list[Write]) -> None:
        before = [*self.entries], dict(self.vectors)
        expected = [self.expected(write) for write in writes]
        if None in expected:
            self.entries, self.vectors = before
            with pytest.raises(ValueError):
                self.log.append(writes)
        else:
            assert self.log.append(writes) == expected

    @rule(weights_id=st.sampled_from("mn"), seqs=st.sets(st.integers(1, 20)), vector=st.sampled_from([X, Y]))
    def put_vectors(self, weights_id: str, seqs: set[int], vector: np.ndarray) -> None:
        self.log.put_vectors(weights_id, dict.fromkeys(seqs, vector))
        for seq in seqs:
            if seq <= len(self.entries) and seq not in self.forgotten:
                self.vectors.setdefault((weights_id, seq), vector.tolist())

    @rule(upto=st.integers(0, 20))
    def forget(self, upto: int) -> None:
        newest = {e.seq for note_id in "abc" if (e := self.newest(note_id))}
        forgotten = {e.seq for e in self.entries if e.seq <= upto} - newest - self.forgotten
        assert self.log.forget(upto) == len(forgotten)
        self.forgotten |= forgotten
        self.vectors = {key: vector for key, vector in self.vectors.items() if key[1] not in forgotten}

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        log, there = self.log, [e for e in self.entries if e.seq not in self.forgotten]
        newest = {note_id: self.newest(note_id) for note_id in "abc"}
        assert [_untimed(e) for e in log.tail(0)] == [_untimed(e) for e in there]
        assert {note_id: _untimed(log.get(note_id)) for note_id in "abc"} == {n: _untimed(e) for n, e in newest.items()}
        assert log.last_seq() == len(self.entries)
        for image in (b"1", b"2"):
            image_id = sha256(image).hexdigest()
            assert log.image(image_id) == (image if any(e.image_id == image_id for e in there) else None)
        for weights_id in "mn":
            seqs, found = log.vectors(weights_id, 0)
            live = sorted(e.seq for e in newest.values() if e and not e.deleted)
            assert seqs == [seq for seq in live if (weights_id, seq) in self.vectors]
            assert found.tolist() == [self.vectors[weights_id, seq] for seq in seqs]
            missing = [e.seq for e in without_vectors(log, weights_id, 0, 100)]
            assert missing == [seq for seq in live if seq not in seqs]
            upto = len(self.entries) // 2
            past = [e for note_id in "abc" if (e := self.newest(note_id, upto)) and not e.deleted]
            expected = sorted(e.seq for e in past if (weights_id, e.seq) in self.vectors)
            assert log.vectors(weights_id, 0, upto)[0] == expected

    def teardown(self) -> None:
        self.log.close()


def _untimed(entry: Entry | None) -> Entry | None:
    return entry and replace(entry, time=datetime.min)


def test_any_interleaving_of_writes_leaves_what_a_list_would_hold(
    new_log_url: Callable[[], str],
) -> None:
    is_sqlite = new_log_url().startswith("sqlite")
    machine = type("AnyWritesHere", (AnyWrites,), {"new_url": staticmethod(new_log_url)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15 if is_sqlite else 4,
            stateful_step_count=12,
            database=None,
            suppress_health_check=[*HealthCheck],
        ),
    )


# Several writers and readers


def test_a_reader_sees_every_entry_once_and_in_order_while_processes_write(log_url: str, writers: Writers) -> None:
    """Three processes open a new log at once and write with two threads each, while two threads read."""
    num_entries = 3 * 2 * 8 * NOTES_OF_A_WRITE
    seen: list[list[Entry]] = [[], []]
    writers.start(log_url, ["x", "y", "z"], num_writes=8, num_threads=2)

    def read(entries: list[Entry], limit: int) -> None:
        with _opened(log_url) as log:
            deadline = time.monotonic() + 120
            while len(entries) < num_entries and time.monotonic() < deadline:
                entries += log.tail(entries[-1].seq if entries else 0, limit)

    readers = [threading.Thread(target=read, args=(seen[0], 1000)), threading.Thread(target=read, args=(seen[1], 7))]
    for reader in readers:
        reader.start()
    acknowledged = sorted(seq for seqs in writers.acknowledged() for seq in seqs)
    for reader in readers:
        reader.join()
    assert acknowledged == [*range(1, num_entries + 1)]
    assert [entry.seq for entry in seen[0]] == acknowledged and seen[1] == seen[0]
    assert len({entry.note.note_id for entry in seen[0]}) == num_entries


def test_a_new_log_is_opened_while_another_process_makes_it(tmp_path: Path) -> None:
    """SQLite refuses at once to change the journal of a file in which a transaction that writes has begun."""
    path, opened = tmp_path / "log.db", []
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.execute("BEGIN IMMEDIATE")

        def open_log() -> None:
            with _opened(f"sqlite:///{path}") as log:
                opened.append(log.last_seq())

        opening = threading.Thread(target=open_log)
        opening.start()
        opening.join(0.3)
        assert opening.is_alive() and not opened
        other.execute("COMMIT")
        opening.join(60)
    assert opened == [0]


@pytest.mark.slow
def test_what_was_acknowledged_survives_twenty_kills(tmp_path: Path, writers: Writers) -> None:
    url, num_kills, rng = f"sqlite:///{tmp_path}/log.db", 20, random.Random(0)
    acknowledged: list[int] = []
    for kill in range(num_kills):
        (pid,) = writers.start(url, [f"w{kill}"], num_writes=10**6)
        time.sleep(rng.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        acknowledged += [seq for seqs in writers.acknowledged() for seq in seqs]
        with _opened(url) as log:
            there = log.tail(0, limit=10**9)
        assert {entry.seq for entry in there} >= set(acknowledged), "an acknowledged write was lost"
        assert [entry.seq for entry in there] == [*range(1, len(there) + 1)]
        assert len(there) % NOTES_OF_A_WRITE == 0, "half of a transaction is there"
        _require_whole(there)
    assert len(acknowledged) > num_kills and len(acknowledged) == len(set(acknowledged))
    unacknowledged = len(there) - len(acknowledged)
    assert unacknowledged <= num_kills * NOTES_OF_A_WRITE


def _require_whole(entries: Sequence[Entry]) -> None:
    for start in range(0, len(entries), NOTES_OF_A_WRITE):
        part = entries[start : start + NOTES_OF_A_WRITE]
        name, number, _ = part[0].note.note_id.rsplit("-", 2)
        assert [entry.note for entry in part] == notes(name, int(number))


def test_a_log_cut_at_any_byte_of_its_last_transaction_has_it_whole_or_not_at_all(tmp_path: Path) -> None:
    """As after a power failure: of the file before the log, the disk has written only a beginning."""
    path, cut = tmp_path / "log.db", tmp_path / "cut.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA page_size = 512")  # small pages: fewer bytes to cut at
        connection.execute("CREATE TABLE fixes_the_page_size (x)")
    with _opened(f"sqlite:///{path}") as log:
        log.append([Write(_note("a"), image=b"1"), Write(_note("b"), vectors={"m": X})])
        before, rows_before, start = log.tail(0), _all_rows(path), len(_wal(path).read_bytes())
        log.append([Write(_note("a", "new"), vectors={"m": X}), _deletion("b")])
        after, wal, main = log.tail(0), _wal(path).read_bytes(), path.read_bytes()
    assert len(after) == 4 and len(wal) - start > 2000
    for size in range(start, len(wal) + 1):
        cut.write_bytes(main)
        _wal(cut).write_bytes(wal[:size])
        if size % 200 and size < len(wal):
            assert _all_rows(cut) == rows_before
        else:  # as a service finds it
            with _opened(f"sqlite:///{cut}") as log:
                assert log.tail(0) == (after if size == len(wal) else before)
                assert log.append([Write(_note("c"))]) == [Receipt(5 if size == len(wal) else 3, 1, True)]


def _all_rows(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # quick: nothing is written but what SQLite finds
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}


def _wal(path: Path) -> Path:
    return Path(f"{path}-wal")


# Full disks, lost connections, locks


def test_a_full_disk_takes_nothing_and_leaves_the_log_readable(tmp_path: Path) -> None:
    with _opened(f"sqlite:///{tmp_path}/log.db") as log:
        pages = 60

        def limit(connection: Any, *_: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages}")

        event.listen(log._engine, "checkout", limit)
        log.append([Write(_note("a"), image=b"1", vectors={"m": X})])
        before = log.tail(0)
        big = Write(_note("big"), image=random.Random(0).randbytes(10**6))
        with pytest.raises(LogFull, match="the disk of the log is full") as error:
            log.append([Write(_note("b")), big, Write(_note("a", "new"))])
        assert isinstance(error.value, OSError) and error.value.errno == 28
        assert log.tail(0) == before and log.get("a") == before[0] and log.image(before[0].image_id or "") == b"1"
        with closing(GroupCommit(log)) as commit:
            futures = [commit.submit(write) for write in (Write(_note("c")), big)]
            assert {type(future.exception()) for future in futures} == {LogFull}
        assert log.tail(0) == before and _count(log, "log_images") == 1
        with pytest.raises(LogFull):
            for number in range(1000):
                log.append([Write(_note(f"{number}", "x" * 5000))])
        full_at = log.last_seq()
        assert 1 < full_at < 1000 and len(log.tail(0)) == full_at
        pages = 10**6  # somebody makes space
        assert log.append([big]) == [Receipt(full_at + 1, 1, True)]
    with _opened(f"sqlite:///{tmp_path}/log.db") as log:
        assert log.tail(0)[:1] == before and log.last_seq() == full_at + 1


@pytest.mark.slow
def test_a_full_disk_of_postgresql_takes_nothing(postgresql_url: str) -> None:
    with _opened(postgresql_url) as log:
        log.append([Write(_note("a"))])
        with writing(log._engine) as connection:  # the error that PostgreSQL raises
            connection.exec_driver_sql(
                "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.title = 'big' THEN "
                "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END IF; "
                "RETURN NEW; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER full_disk BEFORE INSERT ON log_entries FOR EACH ROW EXECUTE FUNCTION fail()"
            )
        with pytest.raises(LogFull, match="No space left on device"):
            log.append([Write(_note("b"), image=b"1"), Write(_note("a", "new")), Write(_note("c", "big"))])
        assert len(log.tail(0)) == 1 and _count(log, "log_images") == 0
        assert log.append([Write(_note("b"))]) == [Receipt(2, 1, True)]


def test_a_folder_on_a_full_disk_is_a_full_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(LogFull):
        NoteLog.open(f"sqlite:///{tmp_path}/new/log.db")


@pytest.mark.slow
def test_a_lost_connection_is_an_unavailable_log_that_comes_back(postgresql_url: str) -> None:
    url = postgresql_url
    with _opened(url) as log, closing(GroupCommit(log)) as commit, psycopg.connect(url, autocommit=True) as other:
        log.append([Write(_note("a"))])
        others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        with writing(log._engine):  # the writer waits for this transaction, until its connection is cut
            future = commit.submit(Write(_note("b")))
            wait_for(lambda: other.execute(f"SELECT 1 {others} AND wait_event_type = 'Lock'").fetchall(), seconds=30)
            other.execute(f"SELECT pg_terminate_backend(pid) {others} AND wait_event_type = 'Lock'")
            assert isinstance(future.exception(timeout=30), LogUnavailable)
        other.execute(f"SELECT pg_terminate_backend(pid) {others}")
        assert len(log.tail(0)) == 1  # by a new connection
        assert commit.submit(Write(_note("b"))).result(timeout=30) == Receipt(2, 1, True)


def test_a_server_that_does_not_answer_is_an_unavailable_log(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable, match="the database of the log cannot be used now") as error:
        NoteLog.open(f"postgresql://postgres:secret@/log?host={tmp_path}")
    assert isinstance(error.value, ConnectionError) and "secret" not in str(error.value)


def test_a_writer_waits_for_another_and_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    with _opened(url) as log:
        monkeypatch.setattr(database, "_BUSY_SECONDS", 0.1)
        with _opened(url) as other, writing(log._engine):
            assert other.tail(0) == [] and other.last_seq() == 0  # readers wait for nobody
            with pytest.raises(LogUnavailable, match="database is locked"):
                other.append([Write(_note())])
        assert log.last_seq() == 0


def test_a_commit_to_a_file_is_durable(tmp_path: Path) -> None:
    with _opened(f"sqlite:///{tmp_path}/log.db") as log, writing(log._engine) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


@pytest.mark.parametrize(("given", "expected"), [("off", "on"), ("remote_apply", "remote_apply")])
@pytest.mark.slow
def test_a_commit_to_a_server_is_durable_whatever_its_default(postgresql_url: str, given: str, expected: str) -> None:
    url = f"{postgresql_url}%20-csynchronous_commit%3D{given}%20-cdefault_transaction_isolation%3Dserializable"
    with _opened(url) as log, writing(log._engine) as transaction:
        assert transaction.exec_driver_sql("SHOW synchronous_commit").scalar() == expected
        assert transaction.exec_driver_sql("SHOW transaction_isolation").scalar() == "read committed"


# Opening


def test_a_new_log_has_the_tables_of_the_code(log_url: str) -> None:
    with _opened(log_url) as log:
        log.append([Write(_note())])
        with reading(log._engine) as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            assert compare_metadata(context, METADATA) == []
            assert context.get_current_revision() == "0004"
    with _opened(log_url) as log:
        assert log.last_seq() == 1


def test_a_log_of_a_newer_version_is_refused(log_url: str) -> None:
    with _opened(log_url) as log, writing(log._engine) as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(ValueError, match="has tables of version 9999, and this notellm2 knows those up to 0004"):
        NoteLog.open(log_url)


def test_a_migration_that_fails_leaves_nothing(log_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_table = op.create_table

    def fail_at_the_last(name: str, *columns: Any, **options: Any) -> Any:
        if name == "log_vectors":
            raise KeyboardInterrupt
        return create_table(name, *columns, **options)

    with monkeypatch.context() as patch:
        patch.setattr(op, "create_table", fail_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            NoteLog.open(log_url)
    with _opened(log_url) as log:
        assert log.append([Write(_note())]) == [Receipt(1, 1, True)]


@pytest.mark.parametrize("url", ["mysql://host/log", "log.db", "", "sqlite://", "sqlite:///:memory:"])
def test_only_a_file_or_postgresql_is_a_log(url: str) -> None:
    with pytest.raises(ValueError, match="sqlite:///FILE"):
        NoteLog.open(url)


# Group commit


class _Recorder:
    """A log that records its transactions, and makes them wait."""

    def __init__(self, log: NoteLog | None = None) -> None:
        self.log = log
        self.transactions: list[int] = []
        self.may_go = threading.Event()
        self.began = threading.Event()

    def append_each(self, writes: Sequence[Write]) -> list[Receipt | ValueError]:
        self.began.set()
        assert self.may_go.wait(60)
        self.transactions.append(len(writes))
        return self.log.append_each(writes) if self.log else [Receipt(1, 1, True)] * len(writes)


def test_writes_of_many_threads_share_transactions(log_url: str) -> None:
    receipts: dict[str, Receipt] = {}
    with _opened(log_url) as log:
        recorder: Any = _Recorder(log)
        recorder.may_go.set()
        with closing(GroupCommit(recorder, max_writes=16)) as commit:

            def write(name: str) -> None:
                for number in range(10):
                    receipts[f"{name}{number}"] = commit.submit(Write(_note(f"{name}{number}"))).result()

            threads = [threading.Thread(target=write, args=(name,)) for name in "abcdefgh"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert {entry.note.note_id: entry.seq for entry in log.tail(0)} == {n: r.seq for n, r in receipts.items()}
        assert sorted(receipt.seq for receipt in receipts.values()) == [*range(1, 81)]
        assert sum(recorder.transactions) == 80 and len(recorder.transactions) < 60


def test_a_bad_write_fails_only_its_own_future(log_url: str) -> None:
    with _opened(log_url) as log, closing(GroupCommit(log, window_seconds=0.2)) as commit:
        log.append([Write(_note(), version=3)])
        writes = [Write(_note("b")), Write(_note(title="other"), version=3), Write(_note("c"))]
        b, bad, c = (commit.submit(write) for write in writes)
        assert (b.result(), c.result()) == (Receipt(2, 1, True), Receipt(3, 1, True))
        with pytest.raises(ValueError, match="note 'a' has other content in version 3"):
            bad.result()


def test_tasks_can_wait_for_their_writes(tmp_path: Path) -> None:
    async def write(commit: GroupCommit) -> list[Receipt]:
        futures = [asyncio.wrap_future(commit.submit(Write(_note(name)))) for name in "abc"]
        return await asyncio.gather(*futures)

    with _opened(f"sqlite:///{tmp_path}/log.db") as log, closing(GroupCommit(log)) as commit:
        assert [receipt.seq for receipt in asyncio.run(write(commit))] == [1, 2, 3]


def test_what_may_not_wait_is_refused_and_what_is_cancelled_is_not_written() -> None:
    log: Any = _Recorder()
    commit = GroupCommit(log, window_seconds=0, max_writes=2, max_waiting=3)
    first = commit.submit(Write(_note("first")))
    assert log.began.wait(60)
    waiting = [commit.submit(Write(_note(name))) for name in "abc"]
    with pytest.raises(LogBusy, match="3 writes are waiting for the log"):
        commit.submit(Write(_note("d")))
    assert waiting[0].cancel() and not first.cancel()
    closer = threading.Thread(target=commit.close)
    closer.start()
    wait_for(lambda: commit._is_closed, seconds=30)
    with pytest.raises(RuntimeError, match="closed"):
        commit.submit(Write(_note("e")))
    log.may_go.set()
    closer.join()
    assert [future.result(timeout=0).applied for future in (first, *waiting[1:])] == [True] * 3
    assert log.transactions == [1, 1, 1]  # the first; of two, one was cancelled; the last
    commit.close()


def test_an_error_of_the_log_reaches_every_caller_and_the_next_group_is_served() -> None:
    log: Any = _Recorder()
    log.may_go.set()
    with closing(GroupCommit(log)) as commit:
        works, log.append_each = log.append_each, _fail
        futures: list[Future[Receipt]] = [commit.submit(Write(_note(name))) for name in "ab"]
        assert {type(future.exception()) for future in futures} == {LogUnavailable}
        log.append_each = works
        assert commit.submit(Write(_note())).result() == Receipt(1, 1, True)


def _fail(_: Sequence[Write]) -> list[Receipt | ValueError]:
    raise LogUnavailable("no")
