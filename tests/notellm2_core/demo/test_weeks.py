"""The weeks after the demo world's log: the same users, new notes, and clicks that no feed changes."""

from dataclasses import replace

import numpy as np
import pytest

from notellm2_core.config.source import DemoSettings
from notellm2_core.demo.images import SIZE
from notellm2_core.demo.logs import CLICK_ON_ANYTHING, CLICK_ON_TASTE, DAY, TASTE_SHARE, simulate
from notellm2_core.demo.weeks import LaterWeeks, Visit, Week, unix_time
from notellm2_core.demo.world import lay_out
from notellm2_core.vision.images import decode

SETTINGS = DemoSettings(num_notes=600, num_users=60, num_days=17, seed=3)


@pytest.fixture(scope="module")
def lived() -> tuple[LaterWeeks, list[Week]]:
    world = LaterWeeks(SETTINGS)
    return world, [world.week(number) for number in (1, 2)]


def test_it_is_the_world_of_the_log() -> None:
    world, layout = LaterWeeks(SETTINGS), lay_out(np.random.default_rng([3, 0]), 600, 17)
    log = simulate(np.random.default_rng([3, 1]), layout.topic, layout.published, 60, 17)  # as `generate` draws it
    for name in ("user", "note", "second", "clicked_after"):
        assert (getattr(world.log, name) == getattr(log, name)).all()
    fits = [world.crowd.likes(user, layout.topic[note]) for user, note in zip(log.user, log.note, strict=True)]
    assert np.mean(fits) > 0.5  # by chance, 2 of 30; those that fit run out
    seen = world.seen_in_log()
    assert sum(map(len, seen.values())) == len(log.user)
    assert sum(clicked for looks in seen.values() for _, _, clicked in looks) == (log.clicked_after > 0).sum()


def test_equal_seeds_give_equal_weeks(lived: tuple[LaterWeeks, list[Week]]) -> None:
    again = LaterWeeks(SETTINGS)
    assert [again.week(number) for number in (1, 2)] == lived[1]
    assert LaterWeeks(SETTINGS.model_copy(update={"seed": 4})).week(1) != lived[1][0]
    with pytest.raises(AssertionError, match="one after the other"):
        again.week(2)


def test_notes_come_at_the_rate_of_the_log(lived: tuple[LaterWeeks, list[Week]]) -> None:
    """90 % of 600 notes in 17 days are 222 a week. The first week begins with the next Sunday, day 21."""
    world, weeks = lived
    assert [len(week.notes) for week in weeks] == [222, 222] and [week.first_day for week in weeks] == [21, 28]
    assert [str(week.date) for week in weeks] == ["2025-01-26", "2025-02-02"]
    assert unix_time(21 * DAY) == 1737849600  # 2025-01-26 00:00:00 UTC
    notes = [note for week in weeks for note in week.notes]
    assert len({note.note_id for note in notes} | {*world.note_ids[:600]}) == 600 + 444
    assert all(world.has(note.note_id) and world.published(note.note_id) == note.day for note in notes)
    for week in weeks:
        days = [note.day for note in week.notes]
        assert days == sorted(days) and {*days} == {*range(week.first_day, week.first_day + 7)}
    poor = [note for note in notes if not note.content]
    assert 0.1 < len(poor) / len(notes) < 0.2 and len({note.title for note in poor}) == len(poor)
    assert all(note.image is not None for note in poor)
    for note in notes[::40]:
        if note.image is not None:
            kind, image = decode(note.image, SIZE * SIZE)
            assert kind == "ok" and image is not None and image.size == (SIZE, SIZE)


def test_nobody_finds_a_note_twice_or_before_its_day(lived: tuple[LaterWeeks, list[Week]]) -> None:
    world, weeks = lived
    before = {(user, note) for user, looks in world.seen_in_log().items() for _, note, _ in looks}
    for week in weeks:
        starts = [visit.second for visit in week.visits]
        assert starts == sorted(starts) and [visit.number for visit in week.visits] == [*range(len(starts))]
        assert week.first_day * DAY <= starts[0] and starts[-1] < (week.first_day + 7) * DAY
        found = [(visit.user, look) for visit in week.visits for look in visit.elsewhere]
        assert all(look.second // DAY >= world.published(look.note_id) for _, look in found)
        pairs = {(user, look.note_id) for user, look in found}
        assert len(pairs) == len(found) and not pairs & before
        before |= pairs
        assert any(world.published(look.note_id) >= week.first_day for _, look in found)
        assert 0.4 < np.mean([look.clicked_after > 0 for _, look in found]) < 0.65


def test_users_look_at_a_feed_and_click_by_their_tastes(lived: tuple[LaterWeeks, list[Week]]) -> None:
    """From top to bottom; at all notes that fit, and at 15 % of the others. The same visit is always alike."""
    world, weeks = lived
    looked: dict[bool, list[bool]] = {True: [], False: []}
    clicked: dict[bool, list[bool]] = {True: [], False: []}
    notes = world.note_ids[:600:3]
    for visit in weeks[0].visits:
        looks = world.look_at_feed(1, visit, notes)
        assert looks == world.look_at_feed(1, visit, notes)
        assert visit.second < looks[0].second and (np.diff([look.second for look in looks]) > 0).all()
        found = {look.note_id: look.clicked_after > 0 for look in looks}
        assert [*found] == [note for note in notes if note in found]
        for note in notes:
            fits = world.crowd.likes(visit.user, world._topic[world.note_ids.index(note)])
            looked[fits].append(note in found)
            if note in found:
                clicked[fits].append(found[note])
    assert all(looked[True]) and np.mean(looked[False]) == pytest.approx(1 - TASTE_SHARE, abs=0.01)
    assert np.mean(clicked[True]) == pytest.approx(CLICK_ON_TASTE, abs=0.03)
    assert np.mean(clicked[False]) == pytest.approx(CLICK_ON_ANYTHING, abs=0.02)
    other: Visit = replace(weeks[0].visits[0], number=1)
    assert world.look_at_feed(1, other, notes) != world.look_at_feed(1, weeks[0].visits[0], notes)
    assert world.look_at_feed(1, other, []) == []
