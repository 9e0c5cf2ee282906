"""The commands `notellm2 simulate weeks` and `notellm2 simulate year`."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import numpy as np

from notellm2_core.simulation import year as plan
from notellm2_core.simulation.poisons import CHANGES, NO_GATE, Change, clean
from notellm2_core.simulation.world import World, deliver
from pipelines.simulation.servers import Servers
from pipelines.simulation.site import FIRST_WEEK, Outcome, Site
from pipelines.simulation.year import HISTORY_DAYS, KEEP, Year


def poisoned_weeks(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Change, Outcome]]:
    """A good first week, and then each change of `poisons` by itself in the week after it, with a good one first."""
    world = World(FIRST_WEEK + 5)
    folder = folder / "site"
    site = Site.create(folder, world)
    instance = dg.DagsterInstance.ephemeral()
    good = Change("a good week", NO_GATE, lambda world, week, rng: clean(world, week))
    for week in range(FIRST_WEEK + 1):
        deliver(folder, week, *clean(world, week))
    yield "first week", good, site.run(FIRST_WEEK, instance)
    week = FIRST_WEEK + 1
    for name, change in {"good week": good, **{name: CHANGES[name] for name in names}}.items():
        with site.set_aside():
            deliver(folder, week, *change.apply(world, week, np.random.default_rng(0)))
            yield name, change, site.run(week, instance)


def weeks(arguments: list[str] | None = None) -> int:
    """What the loop refuses: one week, as it was and with each fault of the logs."""
    parser = argparse.ArgumentParser(prog="notellm2 simulate weeks", description=weeks.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--changes", nargs="*", default=[*CHANGES], choices=[*CHANGES], metavar="NAME",
                        help=f"of the logs; default: all of {', '.join(CHANGES)}")  # fmt: skip
    options = parser.parse_args(arguments)
    wrong, num = [], 0
    columns = ("week", "what", "to be refused by", "refused by", "trained", "seconds", "why")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name, change, outcome in poisoned_weeks(options.out.absolute(), options.changes):
        num += 1
        gate, refused_by, trained = change.gate or "–", outcome.refused_by or "–", "yes" if outcome.trained else "no"
        cells = (name, change.what, gate, refused_by, trained, f"{outcome.seconds:.0f}", outcome.why)
        print(f"| {' | '.join(cells)} |", flush=True)
        if refused_by != gate:
            wrong.append(name)
    print(f"\n{num - len(wrong)} of {num} as expected" + (f"; not {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


def _longest(seconds: list[float]) -> str:
    return f"{max(seconds):.2f} s" if seconds else "none"


COLUMNS = ("number", "week", "logs", "decisions", "recall", "live", "releases", "lake, MB", "a release, MB",
           "history, MB", "seconds")  # fmt: skip


def year(arguments: list[str] | None = None) -> int:
    """The loop left alone: weeks through the real daemon, with late and absent logs, rollbacks and backfills."""
    parser = argparse.ArgumentParser(prog="notellm2 simulate year", description=year.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--weeks", type=int, default=plan.NUM_WEEKS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder, started = options.out.absolute(), time.monotonic()
    world = World(FIRST_WEEK + options.weeks)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with Servers.started(folder) as servers:
        changes = {
            "retention": {"keep_releases": KEEP, "grace_days": 0, "history_days": HISTORY_DAYS},
            "messages": {"webhook": servers.webhook},
        }
        site = Site.create(folder / "site", world, changes)
        for week in range(FIRST_WEEK):
            deliver(site.folder, week, world.catalogue(week), world.log(week))
        servers.start_daemon(site.config)
        loop = Year(site, world, servers)
        for number in range(options.weeks):
            loop.run(number)
        loop.close()
    minutes = (time.monotonic() - started) / 60
    (folder / "year.json").write_text(json.dumps([row.__dict__ for row in loop.rows], indent=1))
    figures = [
        f"{options.weeks} weeks in {minutes:.0f} minutes",
        f"{loop.good_weeks_refused} of {loop.good_weeks} good weeks did not go live",
        f"slowest rollback: {_longest(loop.rollback_seconds)}",
        f"run with nothing new: {_longest(loop.seconds_without_news)}",
        f"{len(loop.faults)} faults",
    ]
    print("\n" + "; ".join(figures) + "".join(f"\n- {fault}" for fault in loop.faults))
    return 1 if loop.faults else 0
