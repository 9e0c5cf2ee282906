"""Compaction: after it, a release and its log answer as before, wherever it was cut."""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.lake.lake import Lake
from notellm2_core.notes.note import Note
from notellm2_core.release.golden import golden_queries
from notellm2_core.release.release import LINEAGE_FILE, NAME, Release, open_release
from notellm2_core.release.served import LEASE_SECONDS, mark_served, served_releases
from notellm2_core.retrieval.build import build_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import write_neighbours_of
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NEIGHBOURS_FOLDER
from notellm2_core.serving import compaction
from notellm2_core.serving.base import base_folder, marked_bases, open_base
from notellm2_core.serving.compaction import Compacted, compact
from notellm2_core.serving.embedding import BadNote, Embedded
from notellm2_core.serving.follower import Follower
from notellm2_core.serving.live_index import LiveIndex
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import NoteLog, Write

DIM, WEIGHTS, NUM_NOTES = 4, "weights", 8


def unit(text: str) -> np.ndarray:
    vector = np.random.default_rng(list(text.encode())).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Model:
    """Embeds a note by its title; those that are bad it refuses."""

    def submit(self, note: Note, image: bytes | None = None) -> "Future[Embedded]":
        done: Future[Embedded] = Future()
        if "bad" in note.title:
            done.set_exception(BadNote("broken"))
        else:
            done.set_result(Embedded(unit(note.title), "ok"))
        return done


def publish(lake: Lake, factory: str = "Flat") -> Release:
    return publish_release(lake, "aaaa1111", {f"n{n}": f"n{n}" for n in range(NUM_NOTES)}, factory)


def publish_release(
    lake: Lake, release_id: str, titles: dict[str, str], factory: str = "Flat", posted: str | None = None
) -> Release:
    """A release of the notes of these titles. posted: the mark of the log that it holds the notes of."""
    ids = [*titles]
    with lake.publish(NAME, release_id, {}, {}) as draft:
        vectors = np.stack([unit(title) for title in titles.values()])
        (draft.path / "embeddings").mkdir()
        write_shard(draft.path / "embeddings" / "part.parquet", ids, vectors, {"weights": WEIGHTS})
        build_index(draft.path / "embeddings", draft.path / INDEX_FOLDER, IndexSettings(factory=factory))
        write_neighbours_of(draft.path / INDEX_FOLDER, draft.path / "embeddings", draft.path / NEIGHBOURS_FOLDER)
        golden = golden_queries(Index.load(draft.path / INDEX_FOLDER), ids[:2], vectors[:2])
        (draft.path / GOLDEN_FILE).write_text(json.dumps(golden))
        lineage = {"week": "2025-01-05", "weeks": [], "releases": [], "posted": posted}
        (draft.path / LINEAGE_FILE).write_text(json.dumps(lineage))
    return open_release(lake, release_id)


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Lake, Release, NoteLog]]:
    lake = Lake(folder / "lake")
    release = open_release(lake, "aaaa1111") if lake.find(NAME, "aaaa1111") else publish(lake)
    log = NoteLog.open(f"sqlite:///{folder / 'log.db'}")
    yield lake, release, log
    log.close()


def newest_cut(lake: Lake, release: Release, log: NoteLog) -> int:
    return marked_bases(lake, release, log)[-1][1]


def write(note_id: str, title: str, embedded: bool = True, deleted: bool = False) -> Write:
    vectors = {WEIGHTS: unit(title)} if embedded and not deleted else {}
    return Write(Note(note_id, title, (), ""), None, deleted, vectors=vectors)


def shown(lake: Lake, release: Release, log: NoteLog) -> dict[str, float]:
    """What a service that starts now shows: the score of each note beside a query."""
    base = open_base(lake, release, log)
    live = LiveIndex(base.index, base.table, base.seq)
    opened = LiveRelease(release, WEIGHTS, base, live, Model(), None)  # type: ignore[arg-type]
    follower = Follower(log, opened, threading.Event())
    for _ in range(20):
        follower.advance()
    assert follower.shows_upto(log.last_seq())
    return {hit.note_id: round(hit.score, 5) for hit in live.similar(unit("query"), 1000).hits}


def expected(titles: dict[str, str]) -> dict[str, float]:
    return {i: round(float(unit(title) @ unit("query")), 5) for i, title in titles.items() if "bad" not in title}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_compacted_release_answers_as_before(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Notes are written with a vector, without one, or with a text that cannot be embedded; they are deleted; the
    release is compacted, and a service follows the log, at any time.
    """
    titles = {f"n{n}": f"n{n}" for n in range(NUM_NOTES)}
    with opened(tmp_path_factory.mktemp("compaction")) as (lake, release, log):
        steps = st.sampled_from(["write", "write", "waits", "bad", "delete", "compact", "serve"])
        for number, step in enumerate(data.draw(st.lists(steps, min_size=1, max_size=25))):
            note_id = data.draw(st.sampled_from([*(f"n{n}" for n in range(NUM_NOTES)), "x", "y"]))
            if step == "compact":
                compact(lake, release, log)
            elif step == "serve":
                assert shown(lake, release, log) == expected(titles)
            elif step == "delete":
                log.append([write(note_id, "", deleted=True)])
                titles.pop(note_id, None)
            else:
                titles[note_id] = f"{'bad' if step == 'bad' else 'good'} {number}"
                log.append([write(note_id, titles[note_id], embedded=step == "write")])
        before = shown(lake, release, log)
        assert before == expected(titles)
        done = compact(lake, release, log)
        assert shown(lake, release, log) == before
        assert done.num_waiting == sum("bad" in title for title in titles.values())
        assert compact(lake, release, log).num_changes == 0


def test_what_a_compaction_says_and_leaves(tmp_path: Path) -> None:
    with opened(tmp_path) as (lake, release, log):
        assert compact(lake, release, log) == Compacted(0, NUM_NOTES, 0, 0)
        for number in range(1, 5):
            log.append([write("x", f"x{number}"), write(f"n{number}", "", deleted=True), write("slow", "s", False)])
            done = compact(lake, release, log)
            assert done == Compacted(log.last_seq(), NUM_NOTES + 1 - number, 2, 1)
        kept = [path.name for path in (lake.root / "serving" / release.id).iterdir()]
        assert [seq for _, seq in log.marked(kept)] == [7, 9] and len(kept) == 2 and log.last_seq() == 9
        assert [entry.note.note_id for entry in log.tail(0)] == ["n1", "slow", "n2", "n3", "x", "n4"]
        assert str(done) == "notes taken in up to entry 9: 2; in all: 5; waiting for the model: 1"
        assert str(Compacted(9, 5, 0, 0)) == "nothing new"


def test_a_vector_that_comes_later_makes_a_newer_base_at_the_same_place(tmp_path: Path) -> None:
    with opened(tmp_path) as (lake, release, log):
        log.append([write("x", "x"), write("slow", "s", embedded=False)])
        assert compact(lake, release, log).num_waiting == 1
        log.put_vectors(WEIGHTS, {2: unit("s")})
        assert compact(lake, release, log) == Compacted(2, NUM_NOTES + 2, 1, 0)
        assert "slow" in open_base(lake, release, log).index.rows


def test_a_note_that_was_deleted_and_written_again_is_not_found_with_its_old_text(tmp_path: Path) -> None:
    with opened(tmp_path) as (lake, release, log):
        log.append([write("n1", "", deleted=True), write("n1", "new", embedded=False), write("x", "x")])
        assert compact(lake, release, log) == Compacted(3, NUM_NOTES, 2, 1)
        base = open_base(lake, release, log)
        assert "n1" not in base.index.rows and base.waiting == (2,)
        assert shown(lake, release, log)["n1"] == pytest.approx(float(unit("new") @ unit("query")), abs=1e-4)


def test_two_compactions_at_once_are_one(tmp_path: Path) -> None:

    lake = Lake(tmp_path)
    with (
        compaction._alone(lake),
        pytest.raises(ValueError, match="another compaction is running"),
        compaction._alone(lake),
    ):
        pass
    with compaction._alone(lake):
        pass


def test_the_base_of_one_log_is_not_that_of_another(tmp_path: Path) -> None:
    with opened(tmp_path) as (lake, release, log):
        log.append([write("x", "x")])
        compact(lake, release, log)
        other = NoteLog.open(f"sqlite:///{tmp_path / 'other.db'}")
        other.append([write("y", "y"), write("z", "z")])
        assert newest_cut(lake, release, log) == 1 and newest_cut(lake, release, other) == 0
        assert {"y", "z"} <= shown(lake, release, other).keys() and "x" not in shown(lake, release, other)
        other.close()


def test_a_base_of_a_log_that_was_restored_from_a_backup_does_not_count(tmp_path: Path) -> None:
    with opened(tmp_path) as (lake, release, log):
        log.append([write("x", "x")])
        log.close()
        backup = (tmp_path / "log.db").read_bytes()
        log = NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")
        log.append([write("y", "y")])
        compact(lake, release, log)
        log.close()
        for file in tmp_path.glob("log.db*"):
            file.unlink()
        (tmp_path / "log.db").write_bytes(backup)
        log = NoteLog.open(f"sqlite:///{tmp_path / 'log.db'}")
        log.append([write("z", "z")])  # the entry that was y's
        assert newest_cut(lake, release, log) == 0
        assert shown(lake, release, log) == expected(
            {f"n{n}": f"n{n}" for n in range(NUM_NOTES)} | {"x": "x", "z": "z"}
        )
        log.close()


def test_a_compaction_that_is_killed_leaves_the_base_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as (lake, release, log):
        log.append([write("x", "x"), write("n1", "", deleted=True)])
        before = shown(lake, release, log)
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "golden_queries", lambda *_: exec("raise KeyboardInterrupt"))
            with pytest.raises(KeyboardInterrupt):
                compact(lake, release, log)
        assert newest_cut(lake, release, log) == 0 and shown(lake, release, log) == before
        assert compact(lake, release, log).num_changes == 2 and shown(lake, release, log) == before


def test_a_damaged_base_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as (lake, release, log):
        log.append([write("x", "x")])
        before = shown(lake, release, log)
        compact(lake, release, log)
        file = base_folder(lake, release.id, marked_bases(lake, release, log)[-1][0]) / INDEX_FOLDER / "index.faiss"
        file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
        caplog.clear()
        assert open_base(lake, release, log).cut_seq == 0 and "does not match its checksum" in caplog.text
        assert shown(lake, release, log) == before
        assert compact(lake, release, log).num_changes == 1 and shown(lake, release, log) == before
        (release.path / INDEX_FOLDER / "index.faiss").unlink()
        file.unlink()
        for base in (lake.root / "serving" / release.id).glob("*/index/index.faiss"):
            base.unlink()
        with pytest.raises(ValueError, match=r"index\.faiss does not match its checksum"):
            open_base(lake, release, log)


def test_a_release_is_in_use_for_a_lease(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    assert served_releases(lake) == set()
    for name in ("aaaa1111", "bbbb2222"):
        mark_served(lake, name)
    file = tmp_path / "serving" / "aaaa1111" / "in_use"
    os.utime(file, (0, time.time() - LEASE_SECONDS - 1))
    assert served_releases(lake) == {"bbbb2222"}
