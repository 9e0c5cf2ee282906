"""The ledger: what follows from its decisions, and that a kill at any place leaves it whole."""

import json
import os
import threading
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from notellm2_core.lake.ledger import Ledger, LedgerError, Subject


def _decide(ledger: Ledger, action: Any, release: str, week: str = "2025-01-05", model: str = "", **more: Any) -> None:
    ledger.decide(action, Subject(release, model or f"model of {release}", week), f"{action} {release}", **more)


def _pointer(ledger: Ledger) -> dict[str, Any]:
    return json.loads(ledger.pointer.read_text())


def test_the_champion_is_the_last_release_that_was_promoted_or_gone_back_to(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    assert (ledger.state().champion, ledger.state().previous, ledger.state().number) == (None, None, 0)
    _decide(ledger, "promoted", "a")
    _decide(ledger, "refused", "b")
    assert (ledger.state().champion, ledger.state().previous) == ("a", None)
    _decide(ledger, "promoted", "c")
    assert (ledger.state().champion, ledger.state().previous) == ("c", "a")
    _decide(ledger, "rolled_back", "a")
    state = ledger.state()
    assert (state.champion, state.previous, state.number) == ("a", None, 4)  # c is banned
    assert _pointer(ledger) == {"release": "a", "decisions": 4}
    last = state.last("b")
    assert last is not None and (last.number, last.why) == (2, "refused b") and last.by.count("@") == 1


def test_a_rollback_bans_the_model_until_it_is_allowed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a")
    _decide(ledger, "promoted", "c")
    _decide(ledger, "rolled_back", "a")
    assert ledger.state().is_banned("c", "?") and ledger.state().is_banned("another release", "model of c")
    assert not ledger.state().is_banned("a", "model of a")
    _decide(ledger, "allowed", "c")
    assert not ledger.state().is_banned("c", "model of c")
    _decide(ledger, "banned", "c")
    assert ledger.state().is_banned("c", "model of c")
    _decide(ledger, "promoted", "c")
    assert not ledger.state().is_banned("c", "model of c")


def test_a_rollback_between_two_releases_of_one_model_bans_only_the_release(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a", model="m")
    _decide(ledger, "promoted", "b", model="m")
    _decide(ledger, "rolled_back", "a", model="m")
    state = ledger.state()
    assert state.is_banned("b", "m") is True and "m" not in state._banned


def test_a_model_is_not_its_own_rival(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a")
    _decide(ledger, "promoted", "b")
    assert ledger.state().without("model of b").champion == "a"
    _decide(ledger, "rolled_back", "a")
    assert ledger.state().without("model of b").champion == "a"
    assert not ledger.state().without("model of b").is_banned("a", "model of a")
    assert ledger.state().without("model of a").champion == "b"


def test_the_anchor_is_the_champion_of_some_weeks_ago(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    assert ledger.state().anchor(2) is None
    for release, week in (("a", "2025-01-05"), ("b", "2025-01-12"), ("c", "2025-01-26"), ("d", "2025-02-02")):
        _decide(ledger, "promoted", release, week)
    assert ledger.state().anchor(1) == "c"
    assert ledger.state().anchor(2) == "b"  # no release of 2025-01-19
    assert ledger.state().anchor(9) == "a"  # the first one
    _decide(ledger, "banned", "b")
    assert ledger.state().anchor(2) == "a"


def test_a_cut_last_line_is_no_decision_and_any_other_damage_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a")
    _decide(ledger, "promoted", "b")
    whole = ledger.file.read_bytes()
    for end in range(len(whole) // 2 + 2, len(whole)):
        ledger.file.write_bytes(whole[:end])
        assert ledger.state().champion == "a"
    _decide(ledger, "refused", "c")
    assert [(d.number, d.release) for d in ledger.state().decisions] == [(1, "a"), (2, "c")]
    ledger.file.write_bytes(whole.replace(b'"promoted"', b"", 1))
    with pytest.raises(LedgerError, match=f"{ledger.file}, line 1 is not a decision"):
        ledger.state()
    ledger.file.write_bytes(whole.splitlines(keepends=True)[1])
    with pytest.raises(LedgerError, match="line 1 has the number 2"):
        ledger.state()


class _Killed(BaseException):
    pass


def _kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """The process "dies" at its `number`-th write, sync, truncation or rename. Returns how many were done."""
    done = 0

    def failing(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                raise _Killed(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "replace", "ftruncate"):
        failing(name)
    return lambda: done


def test_a_promotion_that_is_cut_at_any_place_leaves_the_old_or_the_new_pointer_and_the_ledger_says_which(
    tmp_path: Path,
) -> None:
    seen = set()
    for number in range(1, 100):
        ledger = Ledger(tmp_path / str(number), "x")
        _decide(ledger, "promoted", "old")
        with pytest.MonkeyPatch.context() as patch:
            count = _kill_at(patch, number)
            try:
                _decide(ledger, "promoted", "new")
                assert count() == number - 1  # every place was tried
                break
            except _Killed:
                pass
        pointer, state = _pointer(ledger)["release"], ledger.state()
        assert pointer in ("old", state.champion)
        assert ledger.settle().champion == _pointer(ledger)["release"] == state.champion
        assert _pointer(ledger)["decisions"] == state.number
        seen.add((pointer, state.champion))
        _decide(ledger, "refused", "later")
        assert [d.number for d in ledger.state().decisions] == list(range(1, state.number + 2))
    assert seen == {("old", "old"), ("old", "new"), ("new", "new")}


def test_of_two_promotions_at_once_one_wins(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a")
    seen = ledger.state()
    _decide(ledger, "refused", "x")  # does not change the champion
    results: list[str] = []

    def promote(release: str) -> None:
        try:
            _decide(Ledger(tmp_path, "x"), "promoted", release, seen=seen)
            results.append(release)
        except LedgerError as e:
            results.append(str(e))

    threads = [threading.Thread(target=promote, args=(release,)) for release in ("b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [r for r in results if len(r) == 1]
    (refusal,) = [r for r in results if len(r) > 1]
    assert ledger.state().champion == winner and ledger.state().number == 3
    assert f"was judged beside the champion a, and {ledger.state().decisions[-1].by} has made {winner}" in refusal


def test_the_pointer_is_made_again_where_it_is_missing_or_damaged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    assert ledger.settle().champion is None and not ledger.folder.exists()
    _decide(ledger, "promoted", "a")
    for damage in ("", "{}", "[1]"):
        ledger.pointer.write_text(damage)
        assert ledger.settle().champion == "a" and _pointer(ledger)["release"] == "a"
    ledger.pointer.unlink()
    ledger.settle()
    assert _pointer(ledger)["release"] == "a"


def test_a_rollback_goes_to_another_model(tmp_path: Path) -> None:
    """The last champion has two releases, of two reports."""
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a", model="m1")
    _decide(ledger, "promoted", "b", model="m2")
    _decide(ledger, "promoted", "c", model="m2")
    assert ledger.state().previous == "a"


def test_the_anchor_is_changed_in_steps(tmp_path: Path) -> None:
    """Every third week; it and the next one are known long before."""
    ledger = Ledger(tmp_path, "x")
    anchors = []
    for n in range(10):
        _decide(ledger, "promoted", f"r{n}", str(date(2025, 1, 5) + timedelta(weeks=n)))
        anchors.append(ledger.state().anchors(3))
    assert anchors[:4] == [("r0", "r0")] * 3 + [("r0", "r3")]
    assert anchors[5:8] == [("r0", "r3"), ("r3", "r6"), ("r3", "r6")] and anchors[9] == ("r6", "r9")


def test_what_was_decided_meanwhile_is_not_overruled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x")
    seen = ledger.state()
    _decide(ledger, "banned", "a")
    with pytest.raises(LedgerError, match="something else was decided about release a meanwhile"):
        _decide(ledger, "promoted", "a", seen=seen)
    assert ledger.state().is_banned("a", "model of a")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path, "x")
    _decide(ledger, "promoted", "a")
    before, write = ledger.file.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
        with pytest.raises(OSError, match="no space left on the disk for the decision"):
            _decide(ledger, "promoted", "b")
    assert ledger.file.read_bytes() == before and _pointer(ledger)["release"] == "a"
