"""The page of releases: it shows whatever the ledger holds."""

import io
from typing import Any

from PIL import Image

from notellm2_core.lake.ledger import Action, Decision, State
from notellm2_core.release.page import curve, history, summary


def decision(number: int, action: Action, week: str, recalls: dict[str, float] | None) -> Decision:
    figures: dict[str, Any] = {} if recalls is None else {"k": 10, "recalls": recalls}
    release = f"release {number}"
    return Decision(number, "2025-02-01T03:00:00", action, release, f"model {number}", week, "me", "Why.", figures)


FIRST = decision(1, "promoted", "2025-01-05", {"challenger": 50.0, "best baseline": 20.0})
SECOND = decision(2, "refused", "2025-01-12", {"challenger": 40.04, "champion": 49.0, "best baseline": 20.0})
# A backfill on all of whose pairs a later model has trained: only what needs no pair of ours is known.
NO_PAIRS = decision(3, "measured", "2024-12-29", {"best baseline": 20.0})
OLD = decision(4, "banned", "2025-01-05", None)


def test_a_page_without_decisions() -> None:
    assert "Nothing is live" in summary(State(())) and history(()) == [] and curve(()) is None


def test_a_week_whose_pairs_do_not_count_has_no_point_in_the_curve() -> None:
    assert curve((NO_PAIRS,)) is None
    with_it, without = curve((FIRST, SECOND, NO_PAIRS, OLD)), curve((FIRST, SECOND))
    assert with_it is not None and with_it == without
    assert Image.open(io.BytesIO(with_it)).format == "PNG"
    rows = history((FIRST, SECOND, NO_PAIRS, OLD))
    assert [(row["decision"], row["challenger"], row["champion"]) for row in rows] == [
        ("banned", None, None), ("measured", None, None), ("refused", 40.0, 49.0), ("promoted", 50.0, None),
    ]  # fmt: skip


def test_what_is_live_and_what_came_since() -> None:
    text = summary(State((FIRST, SECOND)))
    assert "**Live: `release 1`** of the week 2025-01-05, promoted on 2025-02-01 by me" in text
    assert "`release 2` of the week 2025-01-12 was refused" in text and "no earlier release" in text
    back = summary(State((FIRST, decision(2, "promoted", "2025-01-12", {"challenger": 51.0}))))
    assert "Before it: `release 1`" in back
