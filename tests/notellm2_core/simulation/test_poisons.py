"""The simulated world, and what each change does to the delivery of a week."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from notellm2_core.check.verdicts import dropped_share
from notellm2_core.config.drift import DATA_GATES
from notellm2_core.config.source import EventSettings
from notellm2_core.demo.logs import DAY
from notellm2_core.lake.lineage import STAGES
from notellm2_core.release.verdict import GATES
from notellm2_core.simulation import world as worlds
from notellm2_core.simulation.poisons import CHANGES, NO_GATE, Delivered, clean
from notellm2_core.simulation.world import WEEK, World, deliver, first_day

NUM_WEEKS, NEWEST = 4, 2


@pytest.fixture(scope="module")
def world() -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "NOTES_A_WEEK", 120)
        patch.setattr(worlds, "NUM_USERS", 200)
        patch.setattr(worlds, "ROBOT_EVENTS", 100)
        yield World(NUM_WEEKS)


def _changed(world: World, name: str) -> Delivered:
    return CHANGES[name].apply(world, NEWEST, np.random.default_rng(0))


def test_weeks_are_parts_of_one_log(world: World) -> None:
    logs = [world.log(week) for week in range(NUM_WEEKS)]
    for week, log in enumerate(logs):
        assert week * WEEK <= log.second.min() and log.second.max() < (week + 1) * WEEK
        assert log.is_click.any() and set(log.event) == {"view", "click"}
    assert len(world.catalogue(0).note) < len(world.catalogue(1).note) < len(world.catalogue(NUM_WEEKS - 1).note)
    published = set(world.catalogue(NEWEST).note.tolist())
    assert published.issuperset(logs[NEWEST].note.tolist())  # nobody sees a note that is not published


def test_a_delivery_is_a_source(world: World, tmp_path: Path) -> None:
    deliver(tmp_path, NEWEST, *clean(world, NEWEST))
    notes = pq.read_table(tmp_path / "source" / "notes.parquet")
    assert len(notes) == len(world.catalogue(NEWEST).note) and notes["image"].null_count > 0
    events = pq.read_table(tmp_path / "source" / "events" / f"{first_day(NEWEST)}.parquet")
    assert len(events) == len(world.log(NEWEST)) and events["timestamp"][0].as_py().date() >= first_day(NEWEST)


def test_every_change_names_a_gate_that_exists() -> None:
    gates = {*DATA_GATES, *GATES, *STAGES, dropped_share.__name__}
    assert all(change.gate in gates for change in CHANGES.values() if change.gate != NO_GATE)
    assert [name for name, change in CHANGES.items() if change.gate == NO_GATE] == [
        "holiday", "larger_catalogue", "new_topic",
    ]  # fmt: skip
    assert sum(change.gate != NO_GATE for change in CHANGES.values()) == 12


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_the_same_each_time_and_changes_something(world: World, name: str) -> None:
    (notes, log), (again, same), (was, had) = _changed(world, name), _changed(world, name), clean(world, NEWEST)
    assert notes.texts == again.texts and notes.images == again.images
    for ours, theirs in ((log.user, same.user), (log.note, same.note), (log.second, same.second)):
        assert np.array_equal(ours, theirs)
    unchanged = notes.texts == was.texts and notes.images == was.images and len(log) == len(had)
    assert not (unchanged and np.array_equal(log.note, had.note) and np.array_equal(log.second, had.second)
                and np.array_equal(log.event, had.event))  # fmt: skip


def test_robots_stay_under_the_limit() -> None:
    """Of an ordinary size: no day has more events of one user than source.max_events_per_day."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "NOTES_A_WEEK", 60)
        patch.setattr(worlds, "NUM_USERS", 50)
        robots = World(1).robots(0, 3, np.random.default_rng(0))
    _, by_day = np.unique(np.stack([robots.user, robots.second // DAY]), axis=1, return_counts=True)
    limit = EventSettings().max_events_per_day
    assert limit is not None and by_day.max() < limit


def test_poisons_are_what_they_say(world: World) -> None:
    (notes, log), newest = clean(world, NEWEST), NEWEST * WEEK
    assert sorted(map(str, _changed(world, "swapped_images")[0].images)) == sorted(map(str, notes.images))
    assert sorted(_changed(world, "shuffled_clicks")[1].note) == sorted(log.note)
    again = _changed(world, "week_before_again")[1]
    assert np.array_equal(again.note, world.log(NEWEST - 1).note) and again.second.min() >= newest
    assert _changed(world, "half_a_week")[1].second.max() < newest + WEEK // 2
    assert "Ã©" in _changed(world, "mojibake")[0].texts[0][0]
    assert _changed(world, "test_clicks_in_training")[1].second.min() < newest
    assert 0.55 < len(_changed(world, "holiday")[1]) / len(log) < 0.65
    flooded = _changed(world, "flooded_note")[1]
    assert np.bincount(flooded.note).max() / len(flooded) > 0.2
    assert set(_changed(world, "renamed_event")[1].event) == {"view", "tap"}
