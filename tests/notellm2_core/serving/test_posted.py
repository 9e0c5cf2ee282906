"""What was posted reaches the next weekly run, and the release that is made of it knows what it holds of the log."""

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.config.settings import Config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.notes.note import Note
from notellm2_core.schema import POSTED_FILE
from notellm2_core.serving import posted
from notellm2_core.serving.base import open_base
from notellm2_core.serving.log import NoteLog, Write
from notellm2_core.serving.log_url import log_url
from notellm2_core.serving.posted import publish_posted_notes
from tests.notellm2_core.serving.test_compaction import expected, publish_release, shown, write
from tests.support.world import tiny_config

TODAY = datetime.now(UTC).date()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config().model_copy(update={"lake": tmp_path / "lake"})


@pytest.fixture
def log(config: Config) -> Iterator[NoteLog]:
    with closing(_opened(config)) as log:
        yield log


def _opened(config: Config) -> NoteLog:
    return NoteLog.open(log_url(config, Ledger(config.lake, config.name)))


def _rows(config: Config) -> dict[str, tuple[bool, str, list[str], bytes | None]]:
    dataset = publish_posted_notes(config, TODAY)
    assert dataset is not None
    rows = pq.read_table(dataset.path / POSTED_FILE).to_pylist()
    assert (
        len({row["note_id"] for row in rows})
        == len(rows)
        == sum(dataset.manifest.metrics[n] for n in ("notes", "deleted"))
    )
    return {row["note_id"]: (row["deleted"], row["title"], row["topics"], row["image"]) for row in rows}


def test_the_newest_entry_of_every_note_is_taken(config: Config, log: NoteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posted, "_BLOCK", 2)
    monkeypatch.setattr(posted, "_NEWEST", posted._NEWEST.limit(2))
    log.append([write("a", "first"), Write(Note("b", "B", ("x", "y"), "text"), b"picture"), write("c", "C")])
    log.append([write("a", "second"), write("c", "", deleted=True), Write(Note("d", "D", (), ""), b"picture")])
    assert _rows(config) == {
        "a": (False, "second", [], None), "b": (False, "B", ["x", "y"], b"picture"), "c": (True, "", [], None),
        "d": (False, "D", [], b"picture"),
    }  # fmt: skip


def test_there_may_be_no_log_or_nothing_in_it(config: Config) -> None:
    assert publish_posted_notes(config, TODAY) is None
    assert not Path(log_url(config, Ledger(config.lake, config.name)).removeprefix("sqlite:///")).exists()
    _opened(config).close()
    assert publish_posted_notes(config, TODAY) is None


def test_the_log_is_read_once_a_week_and_again_if_it_is_another_one(
    config: Config, log: NoteLog, tmp_path: Path
) -> None:
    log.append([write("a", "A")])
    first = publish_posted_notes(config, TODAY)
    log.append([write("b", "B")])
    assert publish_posted_notes(config, TODAY) == first
    later = publish_posted_notes(config, TODAY + timedelta(weeks=1))
    assert first is not None and later is not None and later.manifest.metrics["cut_seq"] == 2
    other = config.model_copy(
        update={"serving": config.serving.model_copy(update={"log": f"sqlite:///{tmp_path}/other.db"})}
    )
    with closing(_opened(other)) as another:
        another.append([write("c", "C")])
    assert set(_rows(other)) == {"c"}


def test_a_run_keeps_the_notes_that_it_saw_first(config: Config, log: NoteLog, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = config.model_copy(update={"source": config.source.model_copy(update={"path": str(source)})})
    without = Catalog(config).fingerprint("notes")
    log.append([write("a", "A")])
    first = publish_posted_notes(config, TODAY)
    running = Catalog(config, run_id="run").fingerprint("notes")
    log.append([write("b", "B")])
    later = publish_posted_notes(config, TODAY + timedelta(weeks=1))
    assert first is not None and later is not None and first != later
    assert len({without, running, Catalog(config).fingerprint("notes")}) == 3
    assert Catalog(config, run_id="run").fingerprint("notes") == running
    assert Catalog(config, run_id="run").posted == first
    other = config.model_copy(update={"name": "other"})
    assert Catalog(other).posted is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_release_of_posted_notes_shows_the_same_as_the_whole_log(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Notes are written and deleted; the weekly run takes them, except some in quarantine; then notes are written and
    deleted again, and old entries are forgotten.
    """
    lake = Lake(tmp_path_factory.mktemp("posted"))
    config = tiny_config().model_copy(update={"lake": lake.root})
    titles = {"n0": "n0", "n1": "n1", "n2": "n2", "n3": "n3"}  # of the source
    changes = st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from(["", "x", "y", "bad z"]), st.booleans()), max_size=8
    )
    with closing(_opened(config)) as log:

        def change() -> None:
            for number, title, embedded in data.draw(changes):
                titles.pop(f"n{number}", None)
                if title:
                    titles[f"n{number}"] = title
                embeds = embedded and "bad" not in title
                log.append([write(f"n{number}", title, embeds, deleted=not title)])

        change()
        dataset = publish_posted_notes(config, TODAY)
        quarantined = data.draw(st.sets(st.sampled_from(["n4", "n5", "n6"])))
        taken = {i: title for i, title in titles.items() if i not in quarantined and "bad" not in title}
        mark = None if dataset is None else dataset.manifest.fingerprint
        release = publish_release(lake, "cccc1111", taken or {"rest": "rest"}, posted=mark)
        if not taken:
            titles["rest"] = "rest"
        change()
        if data.draw(st.booleans()):
            log.forget(log.last_seq())
        base = open_base(lake, release, log)
        assert base.cut_seq == (0 if dataset is None else dataset.manifest.metrics["cut_seq"])
        assert shown(lake, release, log) == expected(titles)


def test_a_release_of_another_log_holds_nothing_of_this_one(config: Config, log: NoteLog) -> None:
    lake = Lake(config.lake)
    release = publish_release(lake, "dddd1111", {"n0": "n0"}, posted="0123456789abcdef")
    log.append([write("n1", "n1")])
    assert open_base(lake, release, log).cut_seq == 0
    assert shown(lake, release, log) == expected({"n0": "n0", "n1": "n1"})
