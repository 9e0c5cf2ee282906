"""A follower of the log: what it shows after every kind of failure on its way."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.notes.note import Note
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.neighbour_table import NeighbourTable, write_neighbours
from notellm2_core.serving import follower as following
from notellm2_core.serving.base import Base
from notellm2_core.serving.embedding import BadNote, Embedded, EmbedderBusy, EmbedderDied, EmbedderDown
from notellm2_core.serving.follower import Follower
from notellm2_core.serving.live_index import LiveIndex
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import LogUnavailable, NoteLog, Write

DIM = 4


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


@dataclass
class Model:
    """Embeds each note at once, or fails as `errors` says, one by one."""

    errors: list[Exception] = field(default_factory=list)
    busy: int = 0
    embedded: list[str] = field(default_factory=list)

    def submit(self, note: Note, image: bytes | None = None) -> "Future[Embedded]":
        if self.busy:
            self.busy -= 1
            raise EmbedderBusy("busy")
        done: Future[Embedded] = Future()
        if self.errors:
            done.set_exception(self.errors.pop(0))
        else:
            self.embedded.append(note.note_id)
            done.set_result(Embedded(unit(len(note.title)), "ok"))
        return done


class Failing:
    """A log whose next call of `method` fails."""

    def __init__(self, log: NoteLog, method: str) -> None:
        self._log, self._method = log, method

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._log, name)

        def fail(*arguments: object) -> None:
            self._method = ""
            raise LogUnavailable("gone")

        return fail


@pytest.fixture
def log(tmp_path: Path) -> NoteLog:
    return NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")


def live_release(tmp_path: Path, model: Model, cut_seq: int = 0, waiting: tuple[int, ...] = ()) -> LiveRelease:
    vectors = np.stack([unit(100 + n) for n in range(6)])
    index = make_index(Embeddings(tuple(f"n{n}" for n in range(6)), vectors, Path("x")), IndexSettings(factory="Flat"))
    if not (tmp_path / "table").exists():
        write_neighbours(index, vectors, tmp_path / "table")
    base = Base(index, NeighbourTable.load(tmp_path / "table", index), cut_seq, "mark", waiting)
    live = LiveIndex(index, base.table, base.seq)
    release = SimpleNamespace(id="release", week="2025-01-05")
    return LiveRelease(release, "weights", base, live, model, None)  # type: ignore[arg-type]


def write(note_id: str, title: str = "", vector: np.ndarray | None = None, deleted: bool = False) -> Write:
    note = Note(note_id, title, (), "")
    return Write(note, None, deleted, vectors={} if vector is None else {"weights": vector})


def shown(release: LiveRelease) -> set[str]:
    return {hit.note_id for hit in release.index.similar(unit(0), 100).hits}


@pytest.mark.parametrize("method", ["tail", "vectors", "put_vectors", ""])
def test_a_failure_of_the_log_skips_nothing(log: NoteLog, tmp_path: Path, method: str) -> None:
    release = live_release(tmp_path, Model())
    log.append([write("with", vector=unit(1)), write("without", "a"), write("n1", deleted=True)])
    follower = Follower(Failing(log, method), release, threading.Event())  # type: ignore[arg-type]
    failures = 0
    for _ in range(5):
        try:
            follower.advance()
        except LogUnavailable:
            failures += 1
    assert failures == (method != "")
    assert shown(release) == {"n0", "n2", "n3", "n4", "n5", "with", "without"}
    assert follower.shows_upto(3) and log.vectors("weights", 0)[0] == [1, 2]


def test_a_note_that_waits_for_its_vector_holds_nobody_up(log: NoteLog, tmp_path: Path) -> None:
    model = Model(busy=1)
    release = live_release(tmp_path, model)
    log.append([write("slow", "a"), write("quick", vector=unit(1))])
    follower = Follower(log, release, threading.Event())
    follower.advance()
    assert "quick" in shown(release) and "slow" not in shown(release)
    assert follower.shows(2) and not follower.shows(1) and not follower.shows_upto(2)
    for _ in range(3):
        follower.advance()
    assert "slow" in shown(release) and follower.shows_upto(2)


def test_a_newer_write_replaces_one_that_waits(log: NoteLog, tmp_path: Path) -> None:
    model = Model(busy=1)
    release = live_release(tmp_path, model)
    follower = Follower(log, release, threading.Event())
    log.append([write("note", "old")])
    follower.advance()
    log.append([write("note", deleted=True)])
    for _ in range(3):
        follower.advance()
    assert "note" not in shown(release) and follower.shows_upto(2) and not model.embedded


def test_a_model_that_is_down_costs_no_note(log: NoteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_PAUSE_SECONDS", 0.0)
    release = live_release(tmp_path, Model([EmbedderDown("no memory")] * 10))
    log.append([write("n1", "changed")])
    follower = Follower(log, release, threading.Event())
    for _ in range(15):
        follower.advance()
        assert "n1" in shown(release)  # as it was, or as it is now
    for _ in range(10):
        follower.advance()
    assert follower.shows_upto(1) and not follower.unusable


@pytest.mark.parametrize("errors", [[BadNote("broken")], [EmbedderDied("died")] * 3])
def test_a_note_that_cannot_be_embedded_is_told(log: NoteLog, tmp_path: Path, errors: list[Exception]) -> None:
    release = live_release(tmp_path, Model(errors))
    log.append([write("n1", "changed")])
    follower = Follower(log, release, threading.Event())
    for _ in range(10):
        follower.advance()
    assert set(follower.unusable) == {"n1"} and follower.unusable["n1"] in ("broken", "died")
    assert "n1" not in shown(release) and follower.shows_upto(1)
    log.append([write("n1", vector=unit(3))])
    follower.advance()
    assert not follower.unusable and "n1" in shown(release)


def test_a_note_that_was_deleted_and_written_again_is_not_found_with_its_old_text(log: NoteLog, tmp_path: Path) -> None:
    """Both are read together, and the new text waits for the model. The deletion was acknowledged, so it holds."""
    model = Model(busy=2)
    release = live_release(tmp_path, model)
    log.append([write("n1", deleted=True), write("n1", "again")])
    follower = Follower(log, release, threading.Event())
    follower.advance()
    assert follower.shows(1) and "n1" not in shown(release) and follower.has_read(2) and follower.lacking == {2}
    for _ in range(4):
        follower.advance()
    assert "n1" in shown(release) and not follower.lacking


def test_a_follower_of_the_same_model_knows_the_bad_notes(log: NoteLog, tmp_path: Path) -> None:
    log.append([write("bad", "a"), write("good", "b")])
    model = Model([BadNote("broken")])
    release = live_release(tmp_path, model)
    first = Follower(log, release, threading.Event())
    for _ in range(3):
        first.advance()
    again = Follower(log, live_release(tmp_path, model), threading.Event(), first)
    for _ in range(3):
        again.advance()
    assert again.unusable == first.unusable == {"bad": "broken"} and model.embedded == ["good"] and not again.lacking


def test_what_a_base_waits_for_is_taken_first(log: NoteLog, tmp_path: Path) -> None:
    """A base up to entry 4 that lacks the vectors of 1, 2 and 3; 2 has been written again, and 3 has its vector now."""
    log.append(
        [write("n1", "changed"), write("n2", "changed"), write("n3", vector=unit(3)), write("n4", vector=unit(4))]
    )
    log.append([write("n2", deleted=True), write("later", vector=unit(5))])
    model = Model(busy=2)
    release = live_release(tmp_path, model, cut_seq=4, waiting=(1, 2, 3))
    follower = Follower(log, release, threading.Event())
    assert not follower.shows_upto(1) and not follower.shows(2) and follower.shows(4)
    for _ in range(8):
        follower.advance()
    assert follower.shows_upto(6) and model.embedded == ["n1"]
    assert shown(release) == {"n0", "n1", "n3", "n4", "n5", "later"}
    np.testing.assert_array_equal(release.index.vector("n3"), unit(3))
