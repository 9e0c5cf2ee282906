"""What becomes of a release: by its verdict, and by hand with `notellm2 release`."""

import json
from pathlib import Path

import pytest

from notellm2_core.cli import main
from notellm2_core.config.promotion import PromotionSettings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Decision, Ledger, LedgerError
from notellm2_core.release.promotion import ban, decide, promote, rollback
from notellm2_core.release.release import LINEAGE_FILE, Release
from tests.support.releases import publish_release

TINY = Path("pipelines/configs/tiny.yaml")
AUTO, APPROVE = PromotionSettings(), PromotionSettings(mode="approve")
WEEKS = {"aaaa1111": "2025-01-05", "bbbb2222": "2025-01-12", "cccc3333": "2025-01-19", "bbbb9999": "2025-01-12"}


def _ledger(lake: Path) -> Ledger:
    return Ledger(lake, "tiny")


def _publish(lake: Lake, release_id: str, outcome: str = "passed", model: str = "") -> Release:
    return publish_release(lake, release_id, WEEKS[release_id], outcome, model)


def _decide(lake: Lake, release: Release, settings: PromotionSettings = AUTO, newest: str | None = None) -> Decision:
    return decide(_ledger(lake.root), release, newest or release.week, settings, _ledger(lake.root).state())


def test_a_release_that_passes_is_promoted_and_one_that_does_not_leaves_the_champion(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    first = _decide(lake, _publish(lake, "aaaa1111"))
    assert (first.action, first.by, first.figures["recalls"]["challenger"]) == ("promoted", "weekly_retrain", 50.0)
    refused = _decide(lake, _publish(lake, "bbbb2222", "refused"))
    undecided = _decide(lake, _publish(lake, "cccc3333", "undecided"))
    assert (refused.action, refused.why, undecided.action) == ("refused", "It refused.", "undecided")
    assert _ledger(tmp_path).state().champion == "aaaa1111"


def test_a_release_is_decided_on_once(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    release = _publish(lake, "aaaa1111")
    assert _decide(lake, release) == _decide(lake, release)
    assert _ledger(tmp_path).state().number == 1


def test_a_release_of_an_earlier_week_is_measured_and_never_promoted(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    backfill = _decide(lake, _publish(lake, "aaaa1111"), newest="2025-01-19")
    assert (
        backfill.action == "measured"
        and "of the week 2025-01-05, and the newest complete one is 2025-01-19" in backfill.why
    )
    _decide(lake, _publish(lake, "cccc3333"))
    older = _decide(lake, _publish(lake, "bbbb2222"), newest="2025-01-12")  # than the champion
    assert older.action == "measured" and _ledger(tmp_path).state().champion == "cccc3333"


def test_a_week_that_is_not_complete_is_measured(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    early = _decide(lake, _publish(lake, "bbbb2222"), newest="2025-01-05")
    assert early.action == "measured" and "the newest complete one is 2025-01-05" in early.why


def test_with_approval_a_release_waits_for_a_person(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    waiting = _decide(lake, _publish(lake, "aaaa1111"), APPROVE)
    assert waiting.action == "waiting" and "`notellm2 release promote aaaa1111` makes it live" in waiting.why
    assert _ledger(tmp_path).state().champion is None
    promoted = promote(lake, _ledger(lake.root), "aaaa")
    assert promoted.action == "promoted" and "@" in promoted.by and _ledger(tmp_path).state().champion == "aaaa1111"


def test_what_was_rolled_back_does_not_come_back_by_itself(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    _decide(lake, _publish(lake, "aaaa1111"))
    _decide(lake, _publish(lake, "bbbb2222", model="m"))
    back = rollback(lake, _ledger(lake.root), "Users complained.")
    assert (back.action, back.release, back.why) == ("rolled_back", "aaaa1111", "Users complained.")
    again = _decide(lake, _publish(lake, "bbbb9999", model="m"))  # the same model, judged again
    assert (again.action, again.why) == ("measured", "Its model is banned.")
    with pytest.raises(LedgerError, match="bbbb9999 is banned"):
        promote(lake, _ledger(lake.root), "bbbb9999")
    with pytest.raises(LedgerError, match="--force needs --why"):
        promote(lake, _ledger(lake.root), "bbbb9999", force=True)
    assert promote(lake, _ledger(lake.root), "bbbb9999", "It was the service.", force=True).why == "It was the service."
    assert _ledger(tmp_path).state().champion == "bbbb9999"


def test_what_cannot_be_promoted_or_gone_back_to_changes_nothing(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with pytest.raises(LedgerError, match="no release is live"):
        rollback(lake, _ledger(lake.root), "why")
    _decide(lake, _publish(lake, "aaaa1111"))
    _publish(lake, "bbbb2222", "refused")
    _publish(lake, "bbbb9999")
    for attempt, message in (
        (lambda: rollback(lake, _ledger(lake.root), "why"), "aaaa1111 is the only one that was ever live"),
        (lambda: rollback(lake, _ledger(lake.root), "why", "cccc"), "there is no release cccc in"),
        (lambda: rollback(lake, _ledger(lake.root), "why", "bbbb2"), "bbbb2222 was never live"),
        (lambda: rollback(lake, _ledger(lake.root), "why", "aaaa"), "aaaa1111 is live already"),
        (lambda: promote(lake, _ledger(lake.root), "aaaa"), "aaaa1111 is live already"),
        (lambda: promote(lake, _ledger(lake.root), "bbbb"), "bbbb is the beginning of 2 releases"),
        (lambda: promote(lake, _ledger(lake.root), "bbbb2"), "bbbb2222 was judged refused: It refused"),
        (lambda: ban(lake, _ledger(lake.root), "aaaa", "why"), "aaaa1111 is live: roll it back"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert _ledger(tmp_path).state().number == 1


def test_a_damaged_release_does_not_go_live(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    old, new = _publish(lake, "aaaa1111"), _publish(lake, "bbbb2222")
    _decide(lake, old)
    _decide(lake, new)
    file = old.path / LINEAGE_FILE
    file.write_text(file.read_text().replace("2025", "2026"))  # as long as before: opening does not notice
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        rollback(lake, _ledger(lake.root), "why")
    assert _ledger(tmp_path).state().champion == "bbbb2222"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Lake(tmp_path)
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.read_text() + f"\nlake: {tmp_path}\n")

    def release(*arguments: str) -> None:
        main(["release", *arguments, "--config", str(config)])

    release("list")
    assert capsys.readouterr().out == f"{tmp_path}/promotion/tiny names no release yet.\n"
    _decide(lake, _publish(lake, "aaaa1111"))
    _decide(lake, _publish(lake, "bbbb2222", "refused"))
    release("promote", "bbbb", "--force", "--why", "We looked.")
    assert capsys.readouterr().out == "bbbb2222: promoted. We looked.\n"
    release("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["release", "week", "verdict", "status"],
        ["bbbb2222", "2025-01-12", "refused", "live"],
        ["aaaa1111", "2025-01-05", "passed", "previous"],
    ]
    release("rollback", "--why", "We looked again.")
    release("allow", "bbbb2222", "--why", "Mended.")
    capsys.readouterr()
    release("show", "bbbb2222")
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "previous" and [d["action"] for d in shown["decisions"]] == [
        "refused", "promoted", "allowed"
    ]  # fmt: skip
    config.write_text(TINY.read_text() + f"\nlake: {tmp_path / 'nowhere'}\n")
    with pytest.raises(SystemExit):
        release("list")
    assert f"{tmp_path / 'nowhere'}, the lake of tiny, does not exist" in capsys.readouterr().err
