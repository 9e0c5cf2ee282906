"""`notellm2 release list | show | promote | rollback | ban | allow`."""

import argparse
import json
from typing import TYPE_CHECKING

from notellm2_core.config.load import config_in_force
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Decision, Ledger, State

if TYPE_CHECKING:
    from notellm2_core.release.release import Release

_NO_DECISION = "not decided"


def add_release_commands(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and their options."""
    commands = parser.add_subparsers(required=True, metavar="list|show|promote|rollback|ban|allow")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default="", metavar="FILE", help="configuration; default: NOTELLM2_CONFIG")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, parents=[common])

    command("list", "print all releases, the newest first").set_defaults(run=_list)

    show = command("show", "print a release, and every decision about it, as JSON")
    show.add_argument("release", help="id, or its first letters")
    show.set_defaults(run=_show)

    promoted = command("promote", "make a release live")
    promoted.add_argument("release", help="id, or its first letters")
    promoted.add_argument("--force", action="store_true", help="even a refused, undecided or banned one; needs --why")
    promoted.add_argument("--why", help="the reason, for the ledger; default: its verdict")
    promoted.set_defaults(run=_promote)

    back = command("rollback", "go back to the previous release, and ban the present one")
    back.add_argument("--to", metavar="RELEASE", help="an earlier one that was live; default: the previous one")
    back.add_argument("--why", required=True, help="the reason, for the ledger")
    back.set_defaults(run=_rollback)

    for name, text in (("ban", "forbid the promotion of a release's model"), ("allow", "lift a ban")):
        banned = command(name, text)
        banned.add_argument("release", help="id, or its first letters")
        banned.add_argument("--why", required=True, help="the reason, for the ledger")
        banned.set_defaults(run=_ban, lift=name == "allow")


def _open(options: argparse.Namespace) -> tuple[Lake, Ledger]:
    """The lake and the ledger of the configuration.

    Raises ValueError if there is no lake: a wrong path would look like one without releases.
    """
    config = config_in_force(options.config)
    lake = Lake(config.lake.resolve())
    if not lake.root.is_dir():
        raise ValueError(f"{lake.root}, the lake of {config.name}, does not exist: --config names the configuration")
    return lake, Ledger(lake.root, config.name)


def _promote(options: argparse.Namespace) -> None:
    from notellm2_core.release.promotion import promote

    _print(promote(*_open(options), options.release, options.why, options.force))


def _rollback(options: argparse.Namespace) -> None:
    from notellm2_core.release.promotion import rollback

    _print(rollback(*_open(options), options.why, options.to))


def _ban(options: argparse.Namespace) -> None:
    from notellm2_core.release.promotion import ban

    _print(ban(*_open(options), options.release, options.why, options.lift))


def _print(decision: Decision) -> None:
    print(f"{decision.release}: {decision.action.replace('_', ' ')}. {decision.why}")


def _list(options: argparse.Namespace) -> None:
    from notellm2_core.release.page import summary
    from notellm2_core.release.release import NAME, Release

    lake, ledger = _open(options)
    state = ledger.settle()
    newest = {decision.release: decision.number for decision in state.decisions}
    releases = [Release(d) for d in lake.datasets(NAME) if d.manifest.fingerprint in newest]
    releases.sort(key=lambda release: newest[release.id], reverse=True)
    if not releases:
        print(f"{ledger.folder} names no release yet.")
        return
    rows = [("release", "week", "verdict", "status"), *(_row(release, state) for release in releases)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{summary(state)}")


def _row(release: "Release", state: State) -> tuple[str, str, str, str]:
    decision = state.last(release.id)
    status = decision.action.replace("_", " ") if decision else _NO_DECISION
    if release.id == state.champion:
        status = "live"
    elif state.is_banned(release.id, release.model):
        status = "banned"
    elif release.id == state.previous:
        status = "previous"
    elif status in ("promoted", "rolled back"):
        status = "was live"
    return release.id, release.week, release.verdict["outcome"], status


def _show(options: argparse.Namespace) -> None:
    from notellm2_core.release.release import open_release

    lake, ledger = _open(options)
    release, state = open_release(lake, options.release), ledger.settle()
    decisions = [d for d in state.decisions if d.release == release.id]
    shown = {
        "release": release.id,
        "path": str(release.path),
        "status": _row(release, state)[3],
        "lineage": release.lineage,
        "verdict": release.verdict,
        "decisions": [{"time": d.time, "action": d.action, "by": d.by, "why": d.why} for d in decisions],
    }
    print(json.dumps(shown, indent=1, ensure_ascii=False))
