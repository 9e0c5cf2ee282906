"""Experiments: who is in them, what an interleaved list is, and what their events say."""

import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.config.source import EventSettings
from notellm2_core.serving import exposures as of_exposures
from notellm2_core.serving.events import Event, keep_events, write_event_files
from notellm2_core.serving.experiment import Experiment, Kind, answer_prefix, team_draft
from notellm2_core.serving.experiment_report import read_exposures, to_markdown
from notellm2_core.serving.exposures import Exposures, Interval, compare, preference
from notellm2_core.serving.live_index import Hit
from notellm2_core.serving.log import NoteLog

TIME = datetime(2025, 1, 19)


def test_a_share_of_the_users_is_in_an_experiment() -> None:
    users = [f"user {n}" for n in range(4000)]
    experiment = Experiment("ab", "bbbb2222", 0.25)
    among = {user for user in users if experiment.includes(user)}
    assert 0.22 < len(among) / len(users) < 0.28
    larger = Experiment("ab", "bbbb2222", 0.5)
    assert among < {user for user in users if larger.includes(user)}  # who is in stays in
    other = {user for user in users if Experiment("ab", "cccc3333", 0.25).includes(user)}
    assert 0.04 < len(among & other) / len(users) < 0.09  # experiments are independent
    assert not any(Experiment("ab", "x", 0.0).includes(user) for user in users)
    assert all(Experiment("ab", "x", 1.0).includes(user) for user in users)
    with pytest.raises(ValueError, match="is 0 to 1, not 2"):
        Experiment("ab", "x", 2)


Ids = st.lists(st.integers(0, 20), unique=True, max_size=12)


@given(ours=Ids, theirs=Ids, k=st.integers(1, 15), seed=st.integers())
def test_an_interleaved_list(ours: list[int], theirs: list[int], k: int, seed: int) -> None:
    lists = [Hit(f"{n}", 1.0 / (place + 1)) for place, n in enumerate(ours)], [Hit(f"{n}", 5.0) for n in theirs]
    hits, by_challenger = team_draft(*lists, k, random.Random(seed))
    ids = [hit.note_id for hit in hits]
    assert len(ids) == len(set(ids)) == len(by_challenger) == min(k, len({*ours, *theirs}))
    for hit, by in zip(hits, by_challenger, strict=True):
        assert hit in lists[by]  # with the score of its own list
    for team in (False, True):  # each team's hits are in its own order, and none before them was left out
        own = [hit for hit, by in zip(hits, by_challenger, strict=True) if by is team]
        if own:
            last = lists[team].index(own[-1])
            assert {hit.note_id for hit in lists[team][:last]} <= set(ids)
    for end in range(2, len(ids) + 1, 2):  # in each round, both had a turn, as long as both had hits
        if set(ids[:end]) < {f"{n}" for n in ours} & {f"{n}" for n in theirs}:
            assert sum(by_challenger[:end]) == end // 2


def test_interleaving_two_equal_lists_is_fair() -> None:
    hits = [Hit(f"{n}", 1.0) for n in range(5)]
    first = [team_draft(hits, hits, 5, random.Random(seed))[1] for seed in range(2000)]
    assert all(0.46 < share < 0.54 for share in np.mean(first, axis=0))


def exposures(rng: np.random.Generator, rates: tuple[float, float], num_users: int = 300) -> Exposures:
    """Each user sees ten notes a time of either release, at a rate of clicks that also depends on the user."""
    users = np.repeat(np.arange(num_users), 10)
    challenger = np.repeat(np.arange(num_users) % 2 == 1, 10)
    taste = rng.beta(2, 2, num_users)[users] * 2
    clicked = rng.random(len(users)) < np.where(challenger, rates[1], rates[0]) * taste
    notes = rng.choice([f"n{n}" for n in range(50)], len(users)).astype(object)
    return Exposures(users, users, notes, challenger, clicked)


def test_of_equal_releases_one_in_twenty_seems_different_and_a_better_one_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(of_exposures, "NUM_DRAWS", 200)
    rng = np.random.default_rng(0)
    differences = [compare(exposures(rng, (0.2, 0.2)), set())[0].difference for _ in range(100)]
    assert 0 < sum(not d.low <= 0 <= d.high for d in differences) <= 11
    differences = [compare(exposures(rng, (0.2, 0.3)), set())[0].difference for _ in range(20)]
    assert all(d.low > 0 for d in differences) and np.mean([d.value for d in differences]) == pytest.approx(
        0.1, abs=0.02
    )


def write_events(folder: Path, shown: list[tuple[str, str, str, str]], clicks: list[tuple[str, str, str, str]]) -> None:
    """Views and clicks: user, answer, note, release. Some are sent twice; others belong to nothing, or to an experiment
    of A with another release.

    The first letter of an answer is that of the kind of its experiment, of the champion A and the challenger B; n: of
    none.
    """
    kinds: dict[str, Kind] = {"a": "ab", "i": "interleave"}

    def with_prefix(answer: str | None, challenger: str = "B") -> str | None:
        if answer is None or answer[0] not in kinds:
            return answer
        return answer_prefix(kinds[answer[0]], "A", challenger) + answer

    log = NoteLog.open(f"sqlite:///{folder / 'log.db'}")
    noise = [
        ("u9", "a9", "a", "another release"),
        ("u9", None, "a", "A"),
        ("u9", "n9", "a", "A"),
        ("u9", "n9", "b", "B"),
    ]
    for event, rows in {"view": [*shown, *shown[:2], *noise], "click": [*clicks, clicks[0]], "share": noise}.items():
        events = [Event(user, note, event, TIME, with_prefix(answer), release) for user, answer, note, release in rows]
        others = [Event("u9", "a", event, TIME, with_prefix(answer, "C"), "A") for answer in ("a9", "i9")]
        keep_events(log, [*events, *others])
    write_event_files(log, folder / "events")
    log.close()


def test_the_figures_of_an_ab_test_by_hand(tmp_path: Path) -> None:
    """Champion: 4 exposures of a, b, new; 1 click. Challenger: 4 exposures of a, c; 2 clicks."""
    shown = [
        ("u1", "a1", "a", "A"), ("u1", "a1", "b", "A"), ("u2", "a2", "a", "A"), ("u2", "a2", "new", "A"),
        ("u3", "a3", "a", "B"), ("u3", "a3", "c", "B"), ("u4", "a4", "a", "B"), ("u4", "a5", "a", "B"),
    ]  # fmt: skip
    write_events(tmp_path, shown, [("u1", "a1", "a", "A"), ("u3", "a3", "a", "B"), ("u4", "a4", "a", "B")])
    found = read_exposures(tmp_path / "events", "ab", "A", "B", EventSettings())
    rates, cold, novelty, coverage = compare(found, {"a", "b", "c", "d"})
    assert (rates.champion.value, rates.challenger.value) == (0.25, 0.5)
    assert (cold.champion.value, cold.challenger.value) == (0.25, 0)
    a, b, new, c = -np.log2([(0.5 + 0.75) / 2, 0.25 / 2, 0.25 / 2, 0.25 / 2])  # means of both releases' shares
    assert novelty.champion.value == pytest.approx((2 * a + b + new) / 4)
    assert novelty.challenger.value == pytest.approx((3 * a + c) / 4)
    assert (coverage.champion.value, coverage.challenger.value) == (0.5, 0.5)  # a and b; a and c; of four
    text = to_markdown([rates], None, found)
    assert "4 users; 4 exposures of the champion, 4 of the challenger" in text and "| hit rate | 0.25 [" in text
    for challenger, kind in (("C", "ab"), ("B", "interleave")):
        with pytest.raises(ValueError, match=f"no exposure of release .* in an experiment of the kind {kind}"):
            read_exposures(tmp_path / "events", kind, "A", challenger, EventSettings())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no events of a service"):
        read_exposures(tmp_path, "ab", "A", "B", EventSettings())


def test_novelty_does_not_depend_on_the_share(tmp_path: Path) -> None:
    """Each release shows fifty notes of its own, as often as each other; nine users in ten have the champion."""
    rng = np.random.default_rng(0)
    challenger = np.repeat(np.arange(1000) % 10 == 0, 50)
    notes = np.where(challenger, 50, 0) + rng.integers(0, 50, len(challenger))
    users = np.repeat(np.arange(1000), 50)
    clicked = np.zeros(len(users), dtype=bool)
    found = compare(Exposures(users, users, notes.astype(object), challenger, clicked), set())[2]
    assert found.difference.value == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("share", "is_told"), [(0.3, True), (0.5, False), (0.54, False), (0.7, True)])
def test_lists_that_do_not_show_both_equally_often_are_told(share: float, is_told: bool) -> None:
    """200 users with 50 exposures each. An A/B test has the share that it was given."""
    users = np.repeat(np.arange(200), 50)
    by_challenger = np.tile(np.arange(50) < 50 * share, 200)
    found = Exposures(users, users, users.astype(object), by_challenger, np.zeros(len(users), dtype=bool))
    won = (Interval(0.5, 0.4, 0.6), 200)
    assert (f"The challenger had {share:.2g} [" in to_markdown([], won, found)) == is_told
    assert "of the exposures, not half" not in to_markdown([], None, found)


def test_the_preference_of_interleaved_lists_by_hand(tmp_path: Path) -> None:
    """Three answers with a click: one for each, and a tie. Lists of users who are in no experiment do not count."""
    shown = [(f"u{n}", f"i{n}", note, release) for n in range(1, 5) for note, release in (("a", "A"), ("b", "B"))]
    clicks = [("u1", "i1", "a", "A"), ("u2", "i2", "b", "B"), ("u3", "i3", "a", "A"), ("u3", "i3", "b", "B")]
    others = [(f"v{n}", f"n{n}", "a", "A") for n in range(50)]
    write_events(tmp_path, [*shown, *others], [*clicks, *others])
    found = read_exposures(tmp_path / "events", "interleave", "A", "B", EventSettings())
    won, num = preference(found)
    assert (won.value, num) == (0.5, 3)
    text = to_markdown([], (won, num), found)
    assert "won 0.5 [" in text and "of the exposures" not in text
    with pytest.raises(ValueError, match="no answer had a click"):
        preference(replace(found, clicked=np.zeros_like(found.clicked)))


def test_interleaving_sees_who_is_preferred() -> None:
    rng = np.random.default_rng(1)
    for chance, bounds in {0.5: (0.4, 0.6), 0.7: (0.6, 0.8)}.items():
        users = np.repeat(np.arange(200), 6)
        answers = np.repeat(np.arange(600), 2)
        challenger = np.tile([False, True], 600)
        winner = rng.random(600) < chance
        clicked = challenger == winner[answers]
        won, num = preference(Exposures(users, answers, np.array(["n"] * 1200, dtype=object), challenger, clicked))
        assert num == 600 and bounds[0] < won.value < bounds[1]
        assert (won.low > 0.5) == (chance > 0.5) and won.high - won.low < 0.12
