"""Ten weeks of the closed loop: simulated users, the service, a weekly training on their clicks, and a bad release.

    .venv/bin/python benchmarks/simulated_weeks.py               ten weeks, and the same with a frozen release
    .venv/bin/python benchmarks/simulated_weeks.py --weeks 3 --notes 200 --no-frozen

The users of a demo world live with `notellm2 serve` (`notellm2 demo simulate`). The first release is trained on the
log's last week. After each week, the newest model is trained a little further, on all clicks since then, and promoted;
the service takes it from the ledger. The model is that of `frozen_features.py`: it learns from clicks in seconds. Half
of the users get lists that the new release and the one before have drafted in turns (`--experiment interleave
--challenger previous`).

Of three weeks it is known what the interleaving should say: before week 6, the same model is promoted twice (A/A); in
week 8, the release is the first one again, as if the job had read an old log; in week 9, a good one follows it. Each
week is also replayed offline on the releases that it compared, neither of which was trained on it. The result is
written to benchmarks/results/simulated_weeks.md.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from closed_loop import SAME, WORSE, Loop

from notellm2_core.config.source import DemoSettings, EventSettings
from notellm2_core.demo.simulate import WeekCounts
from notellm2_core.serving.experiment_report import read_exposures
from notellm2_core.serving.exposures import LEVEL, NUM_DRAWS, Interval, preference

RESULT = Path(__file__).parent / "results" / "simulated_weeks.md"
REPLAY_K = 50
EVENTS = EventSettings()


class Trend:
    """Shares of foreseen clicks by week, with intervals over users. W: weeks, U: users."""

    def __init__(self, weeks: Sequence[WeekCounts]) -> None:
        elsewhere, foreseen = (np.stack([getattr(w, name) for w in weeks]) for name in ("elsewhere", "foreseen"))
        num_users = elsewhere.shape[1]
        draws = np.random.default_rng(0).multinomial(num_users, np.full(num_users, 1 / num_users), NUM_DRAWS)
        draws = np.concatenate([np.ones((1, num_users), int), draws])  # first, all users as they are
        self.shares = (draws @ foreseen.T) / (draws @ elsewhere.T)  # [1 + draws, W]

    def of_week(self, week: int) -> Interval:
        """week: from 1 on."""
        return _interval(self.shares[:, week - 1])

    def rise(self) -> Interval:
        """Per week, by the straight line through all weeks."""
        weeks = np.arange(self.shares.shape[1])
        return _interval(np.polyfit(weeks, self.shares.T, 1)[0])

    def gain(self, first: int, last: int) -> Interval:
        """The share of one week less that of an earlier one."""
        return _interval(self.shares[:, last - 1] - self.shares[:, first - 1])

    def above(self, other: "Trend", week: int) -> Interval:
        """The difference to the same users in another run."""
        return _interval(self.shares[:, week - 1] - other.shares[:, week - 1])


def _interval(sampled: np.ndarray) -> Interval:
    low, high = np.quantile(sampled[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sampled[0]), float(low), float(high))


def percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def won_by_the_one_before(folder: Path, loop: Loop, week: int) -> tuple[Interval, int]:
    """Of the answers with a click, the share that the release before has won."""
    return preference(read_exposures(folder, "interleave", *loop.champions[week - 1], EVENTS))


def by_day(loop: Loop, week: int, work: Path) -> Iterator[tuple[int, Interval, int]]:
    """The same, with the events up to the end of each day of the week."""
    table = pa.concat_tables(pq.read_table(file) for file in sorted((loop.folder / "events").iterdir()))
    first = datetime.combine(loop.counts[week - 1].first_day, datetime.min.time(), UTC)
    for day in range(1, 8):
        upto = work / f"day {day}"
        upto.mkdir(parents=True)
        until = pc.field("timestamp") < pa.scalar(first + timedelta(days=day), table["timestamp"].type)
        pq.write_table(table.filter(until), upto / "served-0.parquet")
        yield (day, *won_by_the_one_before(upto, loop, week))


def week_lines(loop: Loop, frozen: Loop | None) -> list[str]:
    """The table of weeks."""
    trend, other = Trend(loop.counts), None if frozen is None else Trend(frozen.counts)
    lines = [
        "| week | foreseen, % | with the first release, % | difference | hit rate, % | fresh in feeds, % | "
        f"won by the release before, % | offline: hit rate@{REPLAY_K}, difference |",
        "|" + " --- |" * 8,
    ]
    for counts in loop.counts:
        n = counts.number
        name = {SAME: f"{n} (same model twice)", WORSE: f"{n} (worse model)"}.get(n, str(n))
        frozen_cells = ["", ""] if other is None else [percent(other.of_week(n)), percent(trend.above(other, n))]
        compared = ["", ""]
        if n > 1:
            won, num = won_by_the_one_before(loop.folder / "events", loop, n)
            replayed = loop.replay(n, REPLAY_K)
            compared = [f"{percent(won)} of {num}", percent(replayed.figures[0].difference)]
        rates = (counts.in_feed.sum() / counts.shown, counts.fresh_shown / counts.shown)
        cells = [name, percent(trend.of_week(n)), *frozen_cells, *(f"{100 * rate:.1f}" for rate in rates), *compared]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report_of_command(loop: Loop) -> str:
    """`notellm2 experiments interleave` about the week of the worse model."""
    champion, before = loop.champions[WORSE - 1]
    command = [sys.executable, "-W", "ignore", "-m", "notellm2_core.cli", "experiments", "interleave"]
    command += ["--config", str(loop.site.config_file), "--champion", champion, "--challenger", before]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def trend_lines(loop: Loop, frozen: Loop | None) -> list[str]:
    """What rose, and by how much."""
    trend, last = Trend(loop.counts), len(loop.counts)
    rising = [n for n in range(2, last + 1) if trend.shares[0, n - 1] > trend.shares[0, n - 2]]
    lines = [
        f"Foreseen rose in the weeks {', '.join(map(str, rising))}: from the first week to the last by "
        f"{percent(trend.gain(1, last))} points, {percent(trend.rise())} a week by a straight line."
    ]
    if frozen is not None:
        other = Trend(frozen.counts)
        lines.append(
            f"With the first release for all weeks: {percent(other.gain(1, last))} points, {percent(other.rise())} a "
            "week."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weeks", type=int, default=10)
    parser.add_argument("--notes", type=int, default=600, help="of the log")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-frozen", action="store_true", help="leave out the run with the first release alone")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # its products are small
    settings = DemoSettings(num_notes=options.notes, num_users=options.users, num_days=14, seed=options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loops = [Loop(Path(folder) / name, settings, name == "learns") for name in ("learns", "frozen")]
        for loop in loops[: 1 if options.no_frozen else 2]:
            loop.run(options.weeks)
        loop, frozen = loops[0], None if options.no_frozen else loops[1]
        seconds = time.monotonic() - started
        requests = sum(counts.requests for run in loops for counts in run.counts)
        machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
        lines = [
            "# Simulated weeks",
            "",
            f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`; {seconds:.0f} s, {requests:,} recalls "
            "in all.",
            "",
            *week_lines(loop, frozen),
            "",
            *trend_lines(loop, frozen),
        ]
        if options.weeks >= WORSE:
            lines += ["", f"Week {WORSE}, up to the end of each day, won by the release before:", ""]
            lines += [
                f"- day {day}: {percent(won)} % of {n}" for day, won, n in by_day(loop, WORSE, Path(folder) / "days")
            ]
            lines += ["", f"What `notellm2 experiments interleave` says of week {WORSE}:", "", report_of_command(loop)]
    print("\n".join(lines))
    options.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
