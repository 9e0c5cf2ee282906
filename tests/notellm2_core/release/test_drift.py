"""The gates of the data: each poison is refused by its gate and by no other, and what only looks like one by none."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from notellm2_core.config.data import CheckSettings
from notellm2_core.config.drift import DATA_GATES
from notellm2_core.release.drift import data_gates, of_content, of_week, to_markdown, to_plot
from notellm2_core.release.verdict import Gate

HOURS = [0.01] * 8 + [0.06] * 12 + [0.05] * 4


def _week(number: int) -> dict[str, Any]:
    noise = 1 + 0.05 * (-1) ** number
    return {
        "first_day": f"2025-01-{5 + 7 * number:02d}", "rows": round(10_000 * noise), "events": round(10_000 * noise),
        "clicks": 2_000, "users": 800, "clicked": 1_500, "viewed_before": 1_400, "hours": HOURS,
        "top_note": 0.02, "busy_users": 0.06, "repeated": 0.05 if number else None,
    }  # fmt: skip


PROFILE: dict[str, Any] = {
    "weeks": [_week(n) for n in range(4)],
    "notes": {"num_notes": 5_000, "text_length": 120.0, "characters": [["a", 0.5], ["b", 0.5]], "wrongly_decoded": 0.01,
              "image_share": 0.9, "repeated_images": 0.02},
    "related_texts": {"train": {"num_pairs": 2_000, "similarity": 0.08, "error": 0.003},
                      "test": {"num_pairs": 1_500, "similarity": 0.07, "error": 0.003}},
}  # fmt: skip


def _changed(**changes: Any) -> dict[str, Any]:
    """The profile with the newest week's figures, the notes' or the test pairs' changed."""
    profile = deepcopy(PROFILE)
    for part in (profile["weeks"][-1], profile["notes"], profile["related_texts"]["test"]):
        part.update({name: value for name, value in changes.items() if name in part})
    return profile


def _gates(profile: dict[str, Any], past: Sequence[Any] = (PROFILE["notes"],), **accepted: Any) -> list[Gate]:
    return data_gates(DATA_GATES, [*of_week(profile["weeks"]), *of_content(profile, past)], **accepted)


def _refused(profile: dict[str, Any], past: tuple[Any, ...] = (PROFILE["notes"],), **accepted: Any) -> list[str]:
    return [gate.name for gate in _gates(profile, past, **accepted) if gate.outcome == "refused"]


POISONS = {
    "volume": {"rows": 3_500},
    "clicks": {"clicks": 700},
    "views_before_clicks": {"viewed_before": 900},
    "hours": {"hours": [*np.roll(HOURS, 8)]},
    "busy_users": {"busy_users": 0.4},
    "top_note": {"top_note": 0.3},
    "repeated": {"repeated": 0.95},
    "related_texts": {"similarity": 0.004},
    "num_notes": {"num_notes": 2_500},
    "text_lengths": {"text_length": 60.0},
    "characters": {"wrongly_decoded": 0.3},
    "image_share": {"image_share": 0.5},
    "repeated_images": {"repeated_images": 0.6},
}
FRIENDS = {
    "holiday": {"rows": 6_000, "events": 6_000, "clicks": 1_200, "clicked": 900, "viewed_before": 840},
    "sale": {"rows": 39_000, "events": 39_000, "clicks": 7_800, "clicked": 6_000, "viewed_before": 5_600},
    "larger catalogue": {"num_notes": 6_500, "image_share": 0.69, "repeated_images": 0.25},
    "new topic": {"characters": [["a", 0.4], ["b", 0.4], ["c", 0.2]], "text_length": 130.0, "similarity": 0.06},
    "more images": {"image_share": 1.0},
    "clocks": {"hours": [*np.roll(HOURS, -1)]},
}


def test_every_gate_has_a_poison() -> None:
    assert POISONS.keys() == DATA_GATES.keys()


@pytest.mark.parametrize("gate", POISONS)
def test_a_poison_is_refused_by_its_gate_alone(gate: str) -> None:
    profile = _changed(**POISONS[gate])
    assert _refused(profile) == [gate]
    assert _refused(profile, accepted=[gate]) == []
    (row,) = [line for line in to_markdown(_gates(profile)).splitlines() if "✗" in line]
    assert row.startswith(f"| {gate} |") and "usually" in row


@pytest.mark.parametrize("friend", FRIENDS)
def test_what_only_looks_like_a_poison_passes(friend: str) -> None:
    assert _refused(PROFILE) == [] and _refused(_changed(**FRIENDS[friend])) == []


def test_shifted_hours_are_named() -> None:
    """The events came eight hours too late."""
    (gate,) = [g for g in _gates(_changed(**POISONS["hours"]), []) if g.outcome == "refused"]
    assert "they are +8 h off" in gate.why


def test_other_characters_are_refused_without_signs_of_wrong_decoding() -> None:
    assert _refused(_changed(characters=[["x", 0.5], ["y", 0.5]])) == ["characters"]


def test_without_a_past_nothing_is_judged() -> None:
    poisoned = _changed(rows=1, num_notes=1, similarity=0.0)
    assert _refused(poisoned, past=()) == ["volume", "related_texts"]
    poisoned["weeks"] = poisoned["weeks"][-2:]  # one week to compare with is too few
    poisoned["related_texts"]["train"]["similarity"] = 0.004  # in this log, related notes are not alike
    assert _refused(poisoned, past=()) == []
    assert _refused(poisoned | {"weeks": []}, past=()) == []


def test_a_week_with_few_events_is_judged_by_their_number_alone() -> None:
    few = _changed(**POISONS["hours"], events=99)
    assert _refused(few) == []
    assert _refused(_changed(rows=450)) == ["volume"] and _refused(_changed(rows=0, events=0)) == ["volume"]


@pytest.mark.parametrize(
    "few",
    [
        {"clicks": 3, "clicked": 3, "viewed_before": 0, "repeated": 1.0},  # of 8 clicks a week
        {"clicks": 60, "clicked": 60, "viewed_before": 20, "repeated": 0.5},  # of 90
    ],
)
def test_shares_of_few_clicks_are_not_judged(few: dict[str, Any]) -> None:
    profile = _changed(**few)
    for week in profile["weeks"][:-1]:
        usual = 8 if few["clicks"] == 3 else 90
        week.update({"clicks": usual, "clicked": usual, "viewed_before": usual})
    assert _refused(profile) == []


def test_the_events_of_few_users_are_not_judged() -> None:
    profile = _changed(users=40, busy_users=0.9)
    assert _refused(profile) == []


def test_weeks_without_activity_are_judged_by_their_rows() -> None:
    """The partitions of a log of purchases are years: nothing else is known of its weeks."""
    profile = _changed(rows=2_000)
    profile["weeks"] = [{"first_day": week["first_day"], "rows": week["rows"]} for week in profile["weeks"]]
    assert _refused(profile) == ["volume"]


def test_one_bad_week_of_the_past_does_not_hide_another() -> None:
    """Robots in two weeks, of which the first was refused and is in the training days of the second."""
    profile = _changed(**POISONS["busy_users"])
    profile["weeks"][-2].update(POISONS["busy_users"])
    assert _refused(profile) == ["busy_users"]


def test_a_change_that_went_live_is_usual() -> None:
    """Half the notes, of shorter texts: refused once, and not again after a release with them."""
    changed = _changed(num_notes=2_500, text_length=60.0)
    assert _refused(changed) == ["num_notes", "text_lengths"]
    assert _refused(changed, past=(*[PROFILE["notes"]] * 7, changed["notes"])) == []


def test_each_figure_is_plotted_beside_its_past() -> None:
    assert to_plot([]) is None
    plot = to_plot([*of_week(PROFILE["weeks"]), *of_content(PROFILE, [PROFILE["notes"]])])
    assert plot is not None and plot.startswith(b"\x89PNG")


def test_only_gates_that_exist_can_be_accepted() -> None:
    assert CheckSettings(accepted_drift=("num_notes",)).accepted_drift == ("num_notes",)
    with pytest.raises(ValueError, match="unknown gate 'notes'; choose from volume"):
        CheckSettings(accepted_drift=("notes",))
