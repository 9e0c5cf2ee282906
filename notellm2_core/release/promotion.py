"""Promotion: what a verdict, or a person, makes of a release. Every function here appends to the ledger, or changes
nothing.
"""

from typing import Any

from notellm2_core.config.promotion import PromotionSettings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Action, Decision, Ledger, LedgerError, State, Subject
from notellm2_core.release.release import Release, open_release

WEEKLY = "weekly_retrain"  # who decides where nobody does


def decide(
    ledger: Ledger, release: Release, newest_week: str, settings: PromotionSettings, judged_on: State
) -> Decision:
    """Promote, refuse or leave a new release, by its verdict. Returns the decision, an earlier one if there is one.

    `newest_week`: the first day of the newest week of the log. A release of an earlier week is measured and no more,
    and so is one that is older than any week that was promoted. A banned model stays banned. `judged_on`: the state
    that the verdict was made on; raises LedgerError if the champion has changed since.
    """
    state = ledger.settle()
    if (earlier := state.last(release.id)) is not None:
        return earlier
    if judged_on.champion != state.champion:
        raise LedgerError(
            f"release {release.id} was judged beside the champion {judged_on.champion or 'none'}, and "
            f"{state.champion} is live now: run the week again"
        )
    outcome, why = release.verdict["outcome"], release.verdict["why"]
    newest = max([newest_week, *(reign.week for reign in state.reigns)])
    action: Action
    if state.is_banned(release.id, release.model):
        action, why = "measured", "Its model is banned."
    elif release.week < newest or release.week > newest_week:
        action, why = "measured", f"It is of the week {release.week}, and the newest complete one is {newest}. {why}"
    elif outcome != "passed":
        action = "refused" if outcome == "refused" else "undecided"
    elif settings.mode == "approve":
        action, why = "waiting", f"{why} `notellm2 release promote {release.id}` makes it live."
    else:
        release.verify()
        action = "promoted"
    return _append(ledger, action, release, why, WEEKLY, state)


def promote(lake: Lake, ledger: Ledger, release_id: str, why: str | None = None, force: bool = False) -> Decision:
    """Make a release the champion.

    Raises LedgerError if it is live already, or if its verdict is not passed or it is banned: `force`, with a reason in
    `why`, promotes it nevertheless, and lifts the ban. Raises ValueError for an unknown or damaged release.
    """
    release = open_release(lake, release_id)
    state = ledger.settle()
    if state.champion == release.id:
        raise LedgerError(f"release {release.id} is live already")
    banned, outcome = state.is_banned(release.id, release.model), release.verdict["outcome"]
    if force and not why:
        raise LedgerError("--force needs --why: the ledger keeps the reason")
    if not force and (banned or outcome != "passed"):
        reason = "is banned" if banned else f"was judged {outcome}: {release.verdict['why']}"
        raise LedgerError(f"release {release.id} {reason} (--force --why promotes it nevertheless)")
    release.verify()
    return _append(ledger, "promoted", release, why or release.verdict["why"], None, state)


def rollback(lake: Lake, ledger: Ledger, why: str, release_id: str | None = None) -> Decision:
    """Make the previous champion, or the earlier one `release_id`, live again, and ban the present one.

    Raises LedgerError if there is none to go back to, and ValueError if its files are damaged.
    """
    state = ledger.settle()
    if state.champion is None:
        raise LedgerError("no release is live: there is nothing to go back from")
    if release_id is None and state.previous is None:
        raise LedgerError(f"release {state.champion} is the only one that was ever live: there is none to go back to")
    target = open_release(lake, release_id or str(state.previous))
    if target.id not in {reign.release for reign in state.reigns}:
        raise LedgerError(f"release {target.id} was never live: promote it")
    if target.id == state.champion:
        raise LedgerError(f"release {target.id} is live already")
    if target.model == state.reigns[-1].model:
        raise LedgerError(f"release {target.id} has the model of the one that is live: promote it")
    target.verify()
    return _append(ledger, "rolled_back", target, why, None, state)


def ban(lake: Lake, ledger: Ledger, release_id: str, why: str, lift: bool = False) -> Decision:
    """Forbid the promotion of a release and of any other of its model; `lift`: allow it again.

    Raises LedgerError for the live release, which has to be rolled back.
    """
    release = open_release(lake, release_id)
    state = ledger.settle()
    if not lift and state.champion == release.id:
        raise LedgerError(f"release {release.id} is live: roll it back, which bans it")
    return _append(ledger, "allowed" if lift else "banned", release, why, None, state)


def _append(ledger: Ledger, action: Action, release: Release, why: str, by: str | None, seen: State | None) -> Decision:
    figures: dict[str, Any] = {"outcome": release.verdict["outcome"], **release.verdict["figures"]}
    return ledger.decide(action, Subject(release.id, release.model, release.week), why, by, figures, seen)
