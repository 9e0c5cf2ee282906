"""A year of weekly runs through the real daemon, with stand-ins for the model.

The logs arrive week by week; Dagster's daemon, its sensors, its queue and its run processes do the rest, as they do in
production. What happens in which week is fixed beforehand (`notellm2_core.simulation.year`), and the results are
checked. The world's weeks lie in the past, so the Sunday schedule does not tick; it is asked for its sentence.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import dagster as dg

from assets.resources.partitions import log_partitions, week_partition
from assets.resources.steps import WEEK_TAG, why_failed
from notellm2_core.config.load import load_config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.ledger import REIGNS, Decision
from notellm2_core.release.promotion import rollback
from notellm2_core.release.release import open_release
from notellm2_core.release.retention import lake_bytes, log_bytes, release_bytes
from notellm2_core.simulation import year as plan
from notellm2_core.simulation.stand_ins import write_skill
from notellm2_core.simulation.world import DAY, WEEK, World, deliver, first_day
from pipelines.jobs import ingest_logs, week_has_landed, weekly_retrain, weekly_retrain_schedule
from pipelines.simulation.rows import Row, disk_faults, to_line
from pipelines.simulation.servers import Servers
from pipelines.simulation.site import FIRST_WEEK, Site

KEEP = 4  # releases
PATIENCE_SECONDS = 1800  # for one run
HISTORY_DAYS = 0.01  # a quarter of an hour, in which a handful of weeks pass
_FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


@dataclass
class Year:
    """A site, and the servers that run it. `faults`: the checks that failed, in sentences."""

    site: Site
    world: World
    servers: Servers
    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    rollback_seconds: list[float] = field(default_factory=list)
    seconds_without_news: list[float] = field(default_factory=list)
    good_weeks: int = 0
    good_weeks_refused: int = 0

    @property
    def catalog(self) -> Catalog:
        return Catalog(load_config(self.site.config))

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self.catalog.ledger.state().decisions

    def expect(self, is_so: bool, fault: str) -> None:
        if not is_so:
            self.faults.append(fault)
            print(f"FAULT: {fault}", flush=True)

    def run(self, number: int) -> None:
        """The week `number` of the year, counted from 0, and what comes with it."""
        started, before = time.monotonic(), len(self.decisions)
        logs = self._deliver(number)
        if number not in plan.ABSENT:
            if number == plan.DURING_A_RUN:
                self._roll_back_during(number)
            else:
                self._finished(number)
                if number in plan.ROLLED_BACK:
                    self._roll_back(number)
        if number in plan.AGAIN:
            self._run_again(number)
        for week in plan.BACKFILLS.get(number, ()):
            self._backfill(week)
        self._record(number, logs, before, time.monotonic() - started)

    def _deliver(self, number: int) -> str:
        """The logs of a week, as they come. Returns how that was."""
        write_skill(self.site.folder, plan.WORSE_NOISE if number in plan.WORSE else plan.USUAL_NOISE)
        week = FIRST_WEEK + number
        notes, log = self.world.catalogue(week), self.world.log(week)
        if number in plan.ABSENT:
            self._is_late(number)
            return "none"
        if number in plan.LATE:
            deliver(self.site.folder, week, notes, log.where(log.second < week * WEEK + 5 * DAY))
            last = str(first_day(week) + timedelta(days=4))
            self._wait_for(lambda: self._last_ingested_day() == last, "the first five days")
            skipped = week_has_landed(dg.build_sensor_context(self.servers.instance))
            why = skipped.skip_message if isinstance(skipped, dg.SkipReason) else str(skipped)
            self.expect(f"the week {first_day(week)} waits for its logs of" in str(why), f"the sensor says: {why}")
            self._is_late(number)
            self.expect(not self._runs(number), f"the week {first_day(week)} ran before its logs were there")
        deliver(self.site.folder, week, notes, log)
        return "late" if number in plan.LATE else "in time"

    def _last_ingested_day(self) -> str:
        raw = self.catalog.find("raw_events")
        return "" if raw is None else str(raw.manifest.metrics["covered_until"])

    def _is_late(self, number: int) -> None:
        """The schedule says so on the Sunday after the week."""
        sunday = first_day(FIRST_WEEK + number + 1)
        schedule = weekly_retrain_schedule(log_partitions(self.catalog.config.source))
        at = datetime(sunday.year, sunday.month, sunday.day, 3, tzinfo=UTC)
        answer: object
        try:
            answer = schedule(dg.build_schedule_context(self.servers.instance, scheduled_execution_time=at))
        except dg.Failure as failure:
            answer = failure.description
        expected = f"the week {first_day(FIRST_WEEK + number)} is late"
        self.expect(expected in str(answer), f"the schedule does not say that {expected}: {answer}")

    def _partition(self, number: int) -> str:
        return week_partition(first_day(FIRST_WEEK + number), self.catalog.config.source) or ""

    def _runs(self, number: int) -> list[dg.DagsterRun]:
        tags = {"dagster/partition": self._partition(number)}
        return list(self.servers.instance.get_runs(dg.RunsFilter(job_name=weekly_retrain.name, tags=tags)))

    def _finished(self, number: int, other_than: frozenset[str] = frozenset()) -> dg.DagsterRun:
        """Wait for a run of the week to end, other than those of these ids."""

        def found() -> list[dg.DagsterRun]:
            return [run for run in self._runs(number) if run.run_id not in other_than and run.status in _FINISHED]

        self._wait_for(lambda: bool(found()), f"the run of the week {self._partition(number)}")
        run = found()[0]
        if run.status != dg.DagsterRunStatus.SUCCESS:
            events = (entry.dagster_event for entry in self.servers.instance.all_logs(run.run_id))
            why = why_failed([event for event in events if event is not None])
            print(f"The run of {self._partition(number)} failed: {why}", flush=True)
        label = run.tags.get(WEEK_TAG)
        self.expect(label == self._partition(number), f"the run of {self._partition(number)} worked on {label}")
        return run

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            self.servers.require_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come in {PATIENCE_SECONDS} s; see {self.servers.log}")
            time.sleep(0.5)

    def _roll_back(self, number: int) -> None:
        """Go back from the live release, and run the week again: what was live must not come back."""
        state = self.catalog.ledger.state()
        gone, previous = state.reigns[-1], state.previous
        self._timed_rollback(f"In week {number} of the simulation.")
        self.expect(self.catalog.ledger.state().champion == previous, f"rolled back to something else than {previous}")
        known = frozenset(run.run_id for run in self._runs(number))
        self.servers.backfill(weekly_retrain.name, self._partition(number))
        again = self._finished(number, known)
        self.expect(again.status == dg.DagsterRunStatus.SUCCESS, f"the run {again.run_id} after a rollback failed")
        champion = self.catalog.ledger.state().reigns[-1]
        self.expect(champion.model != gone.model, f"the release {gone.release} came back by itself")

    def _roll_back_during(self, number: int) -> None:
        """Go back from the last week's release while this week's run is at work; the run must not build on it."""
        self._wait_for(
            lambda: any(run.status == dg.DagsterRunStatus.STARTED for run in self._runs(number)), "the start of a run"
        )
        self._timed_rollback("While a run is at work.")
        run = self._finished(number)
        if run.status != dg.DagsterRunStatus.SUCCESS:
            # It was judged beside a champion that is no longer live. An operator runs it again.
            self.servers.backfill(weekly_retrain.name, self._partition(number))
            again = self._finished(number, frozenset({run.run_id}))
            self.expect(again.status == dg.DagsterRunStatus.SUCCESS, f"the run {again.run_id} failed")

    def _timed_rollback(self, why: str) -> None:
        started = time.perf_counter()
        rollback(self.catalog.lake, self.catalog.ledger, why)
        self.rollback_seconds.append(time.perf_counter() - started)

    def _backfill(self, number: int) -> None:
        """Run an older week, whose logs come now if they never came. It must not go live."""
        write_skill(self.site.folder, plan.USUAL_NOISE)
        champion, week = self.catalog.ledger.state().champion, FIRST_WEEK + number
        if number in plan.ABSENT:
            newest = max(n for n, weeks in plan.BACKFILLS.items() if number in weeks)
            deliver(self.site.folder, week, self.world.catalogue(FIRST_WEEK + newest), self.world.log(week))
        known = frozenset(run.run_id for run in self._runs(number))
        self.servers.backfill(weekly_retrain.name, self._partition(number))
        run = self._finished(number, known)
        self.expect(run.status == dg.DagsterRunStatus.SUCCESS, f"the backfill of {self._partition(number)} failed")
        self.expect(
            self.catalog.ledger.state().champion == champion, f"the backfill {self._partition(number)} went live"
        )

    def _record(self, number: int, logs: str, before: int, seconds: float) -> None:
        week, new = self._partition(number), self.decisions[before:]
        own = [decision for decision in new if decision.week == week and decision.by == "weekly_retrain"]
        decision = own[0] if own else None
        if number not in plan.ABSENT:
            self.expect(decision is not None, f"nothing was decided about the week {week}")
        if decision is not None:
            release = open_release(self.catalog.lake, decision.release)
            test = release.lineage["test"]
            self.expect(str(test[0]) == week, f"the release of {week} was tested on the days from {test[0]}")
            if number in plan.WORSE:
                self.expect(decision.action == "refused", f"the worse model of {week} was {decision.action}")
            else:
                self.good_weeks += 1
                self.good_weeks_refused += decision.action != "promoted"
        actions = ", ".join(d.action.replace("_", " ") + ("" if d.week == week else f" {d.week}") for d in new)
        state, lake = self.catalog.ledger.state(), self.catalog.lake
        releases = sum(1 for _ in lake.datasets("release"))
        recall = decision.figures["recalls"].get("challenger") if decision else None
        live = state.reigns[-1].week if state.reigns else ""
        newest = release_bytes(lake, self.decisions[-1].release) / 1e6
        sizes = (lake_bytes(lake) - log_bytes(lake)) / 1e6, newest, self.servers.history_bytes() / 1e6
        row = Row(week, logs, actions, decision.why if decision else "", recall, live, releases, *sizes, seconds)
        self.rows.append(row)
        print(to_line(number, row), flush=True)

    def _run_again(self, number: int) -> None:
        """Run a week for which nothing is new: nothing is made, and nothing decided."""
        before, known = self.decisions, frozenset(run.run_id for run in self._runs(number))
        self.servers.backfill(weekly_retrain.name, self._partition(number))
        run = self._finished(number, known)
        record = self.servers.instance.get_run_record_by_id(run.run_id)
        self.expect(run.status == dg.DagsterRunStatus.SUCCESS, f"the run {run.run_id} failed")
        self.expect(self.decisions == before, f"the run {run.run_id} decided again")
        if record is not None:
            self.seconds_without_news.append((record.end_time or 0) - (record.start_time or 0))

    def close(self) -> None:
        """Check what holds for all weeks together."""
        decisions, runs = self.decisions, self.servers.instance.get_runs(dg.RunsFilter(statuses=list(_FINISHED)))
        failed = [r for r in runs if r.status != dg.DagsterRunStatus.SUCCESS and r.job_name == ingest_logs.name]
        self.expect(not failed, f"{len(failed)} runs of {ingest_logs.name} failed")
        banned: set[str] = set()
        live: Decision | None = None
        for decision in decisions:
            if decision.action == "rolled_back" and live is not None:
                banned.add(live.model)
            if decision.action in REIGNS:
                self.expect(decision.model not in banned, f"the banned model of {decision.release} went live again")
                live = decision
        weeks = [decision.week for decision in decisions if decision.action == "promoted"]
        self.expect(weeks == sorted(weeks), f"an older week was promoted after a newer one: {weeks}")
        for fault in disk_faults(self.rows, KEEP):
            self.expect(False, fault)
        known = [d for d in decisions if d.action not in ("measured", "banned", "allowed")]
        expected = {f"{self.catalog.config.name}/decision/{d.number}" for d in known}
        self._wait_for(lambda: expected <= set(self.servers.message_ids), "a message about each decision")
        twice = [message for message, num in Counter(self.servers.message_ids).items() if num > 1]
        self.expect(not twice, f"messages were sent twice: {twice}")
        self.expect(
            self.good_weeks_refused <= max(1, 0.05 * self.good_weeks),
            f"{self.good_weeks_refused} of {self.good_weeks} good weeks did not go live",
        )
