"""The watcher: what it makes a service do after each change of the ledger."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger, LedgerError, Subject
from notellm2_core.release.served import served_releases
from notellm2_core.serving import watcher
from notellm2_core.serving.watcher import Watcher
from tests.support.waiting import wait_for


@dataclass
class Named:
    id: str


@dataclass
class Releases:
    """Records the calls that it gets."""

    lake: Lake
    in_memory: list[Named]
    damaged: set[str] = field(default_factory=set)
    num_refused: int = 0
    num_refreshes: int = 0

    @property
    def current(self) -> Named:
        return self.in_memory[0]

    def activate(self, release_id: str) -> None:
        if release_id in self.damaged:
            raise ValueError(f"release {release_id} is damaged")
        self.in_memory = [Named(release_id), self.in_memory[0]]

    def refresh(self) -> int:
        self.num_refreshes += 1
        return 0


def promote(ledger: Ledger, release: str) -> None:
    ledger.decide("promoted", Subject(release, f"model of {release}", "2025-01-05"), "test", "It passed.")


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path, "tiny")
    promote(ledger, "aaaa")
    return ledger


def watched(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Releases, Watcher]:
    monkeypatch.setattr(watcher, "_POLL_SECONDS", 0.01)
    releases = Releases(Lake(tmp_path), [Named("aaaa")])
    return releases, Watcher(releases, ledger, **options)  # type: ignore[arg-type]


def test_a_new_champion_answers_and_an_activation_by_hand_stays_until_then(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases, watching = watched(ledger, tmp_path, monkeypatch)
    releases.activate("by hand")
    before = releases.num_refreshes
    wait_for(lambda: releases.num_refreshes > before + 3)
    assert releases.current.id == "by hand"
    promote(ledger, "bbbb")
    wait_for(lambda: served_releases(releases.lake) >= {"bbbb", "by hand"})
    assert releases.current.id == "bbbb" and releases.num_refused == 0
    watching.close()


def test_a_champion_that_cannot_be_used_is_tried_again(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases, watching = watched(ledger, tmp_path, monkeypatch)
    releases.damaged.add("bbbb")
    promote(ledger, "bbbb")
    wait_for(lambda: releases.num_refused >= 2)
    assert releases.current.id == "aaaa"
    releases.damaged.clear()
    wait_for(lambda: releases.current.id == "bbbb")
    watching.close()


def test_a_champion_that_cannot_be_used_holds_up_no_later_one(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_LONGEST_PAUSE", 3600.0)
    releases, watching = watched(ledger, tmp_path, monkeypatch)
    releases.damaged.add("bbbb")
    promote(ledger, "bbbb")
    wait_for(lambda: releases.num_refused >= 5)  # the next try is a third of a second away, and then ever longer
    promote(ledger, "cccc")
    wait_for(lambda: releases.current.id == "cccc")
    watching.close()


def test_a_champion_of_before_the_start_answers(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was promoted while the service opened the one before."""
    promote(ledger, "bbbb")
    releases, watching = watched(ledger, tmp_path, monkeypatch)
    wait_for(lambda: releases.current.id == "bbbb")
    watching.close()


def test_what_fails_holds_up_nothing_else(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases are taken while a champion is refused, and the other way round; each failure is tried ever more rarely."""
    releases, watching = watched(ledger, tmp_path, monkeypatch)
    releases.damaged.add("bbbb")
    promote(ledger, "bbbb")
    wait_for(lambda: releases.num_refused >= 2)
    before = releases.num_refreshes
    wait_for(lambda: releases.num_refreshes > before + 10)
    monkeypatch.setattr(releases, "refresh", failing(OSError("disk")))
    promote(ledger, "cccc")
    wait_for(lambda: releases.current.id == "cccc")
    watching.close()


def test_a_ledger_that_cannot_be_read_is_told_ever_more_rarely(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases, watching = watched(ledger, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "state", failing(LedgerError("damaged")))
        wait_for(lambda: releases.num_refused >= 3)
        before, looks = releases.num_refused, releases.num_refreshes
        wait_for(lambda: releases.num_refreshes > looks + 10)
        assert releases.num_refused <= before + 2
    promote(ledger, "bbbb")
    wait_for(lambda: releases.current.id == "bbbb")
    watching.close()


def test_a_service_of_one_release_follows_no_champion(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases, watching = watched(ledger, tmp_path, monkeypatch, follows_champion=False)
    promote(ledger, "bbbb")
    before = releases.num_refreshes
    wait_for(lambda: releases.num_refreshes > before + 3)
    assert releases.current.id == "aaaa"
    watching.close()
