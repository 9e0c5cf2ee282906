"""The commands `notellm2 demo` and `notellm2 demo simulate`."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from notellm2_core.config.options import add_options, settings_from
from notellm2_core.config.source import DemoSettings

if TYPE_CHECKING:
    from notellm2_core.demo.simulate import WeekCounts
    from notellm2_core.demo.weeks import Week

KEY_VARIABLE = "NOTELLM2_API_KEY"
_COLUMNS = (
    "week", "first day", "releases", "new notes", "requests", "shown", "fresh, %", "clicks in feed", "hit rate, %",
    "clicks elsewhere", "foreseen, %", "foreseen of all, %", "errors",
)  # fmt: skip


def add_demo_commands(demo: argparse.ArgumentParser) -> None:
    """Add the options and the subcommand to the parser of `notellm2 demo`."""
    demo.add_argument("--out", type=Path, help="a new folder")
    add_options(demo, DemoSettings, *DemoSettings.model_fields)
    demo.set_defaults(run=_generate)
    simulate = demo.add_subparsers(metavar="simulate").add_parser(
        "simulate", help="let the demo world's users live for some weeks with a running service"
    )
    simulate.add_argument("--url", required=True, help="address of the service: http://127.0.0.1:8080")
    simulate.add_argument("--weeks", type=int, default=10, help="after the log; default: %(default)s")
    add_options(simulate, DemoSettings, *DemoSettings.model_fields)
    simulate.add_argument("--feed", type=int, default=10, help="most notes of a feed; default: %(default)s")
    simulate.add_argument("--history", type=int, default=30, help="most notes of a history; default: %(default)s")
    simulate.add_argument("--k", type=int, default=200, help="hits that a feed is made of; default: %(default)s")
    simulate.add_argument("--shelf-days", type=int, default=14, help="older notes are not shown; default: %(default)s")
    after = "shell command after each week, with WEEK (its first day) and WEEK_NUMBER: the weekly run, for example"
    table = "folder `notes` of a source, where each week's notes are written too: the platform's own table"
    simulate.add_argument("--notes-table", type=Path, metavar="DIR", help=table)
    simulate.add_argument("--after-week", metavar="COMMAND", help=after)
    simulate.add_argument(
        "--journal", type=Path, default=Path("simulated_weeks.jsonl"),
        help="what was done so far: the same command goes on where it was stopped; default: %(default)s",
    )  # fmt: skip
    simulate.add_argument(
        "--api-key-file", type=Path, help=f"file with a key of scope write; default: the key in {KEY_VARIABLE}"
    )
    simulate.set_defaults(run=_simulate)


def _generate(options: argparse.Namespace) -> None:
    from notellm2_core.demo.world import generate

    if options.out is None:
        raise ValueError("name the folder that the demo world is written to: notellm2 demo --out DIR")
    print(json.dumps(generate(options.out, settings_from(options, DemoSettings))))


def _simulate(options: argparse.Namespace) -> None:
    """Print a row of the table after each week. Exits with 1 if there was an error."""
    try:
        from notellm2_core.demo.client import ServiceClient
    except ImportError as e:
        raise ValueError(f"this command needs {e.name}: pip install -e '.[serve]', in the repository") from None
    from notellm2_core.demo.journal import Journal
    from notellm2_core.demo.simulate import FeedSettings, Simulation
    from notellm2_core.demo.weeks import LaterWeeks

    settings = settings_from(options, DemoSettings)
    feed = FeedSettings(options.feed, options.history, options.k, options.shelf_days)
    if options.weeks < 1 or min(vars(feed).values()) < 1:
        raise ValueError("--weeks, --feed, --history, --k and --shelf-days are 1 or more")
    errors = 0
    with (
        closing(ServiceClient(options.url, _key(options.api_key_file))) as client,
        closing(Journal(options.journal, {**settings.model_dump(), **vars(feed)})) as journal,
    ):
        client.wait()
        simulation = Simulation(LaterWeeks(settings), client, journal, feed)
        print(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}", flush=True)
        for counts in simulation.run(options.weeks, lambda week: _end(week, options.notes_table, options.after_week)):
            print(to_row(counts), flush=True)
            errors += counts.errors
        for fault, num in client.faults.items():
            print(f"{num} times: {fault}", file=sys.stderr)
    sys.exit(1 if errors or client.faults else 0)


def to_row(counts: "WeekCounts") -> str:
    """The row of a week."""
    in_feed, shown = int(counts.in_feed.sum()), max(1, counts.shown)
    percent = (counts.fresh_shown / shown, in_feed / shown, counts.foreseen_share, counts.foreseen_of_all)
    fresh, hit_rate, foreseen, of_all = (f"{100 * share:.1f}" for share in percent)
    new_notes = f"{counts.new_notes} ({counts.late_notes} late)" if counts.late_notes else counts.new_notes
    cells = (
        counts.number, counts.first_day, " ".join(release[:8] for release in counts.releases), new_notes,
        counts.requests, counts.shown, fresh, in_feed, hit_rate, int(counts.elsewhere.sum()), foreseen, of_all,
        counts.errors,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _key(file: Path | None) -> str | None:
    return os.environ.get(KEY_VARIABLE) or None if file is None else file.read_text().strip()


def _end(week: "Week", table: Path | None, command: str | None) -> None:
    """What the platform does after a week: its table of notes, and the command. Raises ValueError if that fails."""
    from notellm2_core.demo.weeks import write_notes

    if table is not None:
        write_notes(week.notes, table / f"week-{week.number:03d}.parquet")
    env = os.environ | {"WEEK": str(week.date), "WEEK_NUMBER": str(week.number)}
    if command is not None and (code := subprocess.run(command, shell=True, env=env).returncode):
        raise ValueError(
            f"the command after week {week.number} ended with {code}; run the same simulation again to repeat it"
        )
