"""The job of the whole graph, the one that reads new logs, and what starts them: a sensor and the weekly schedule."""

from datetime import UTC, date, datetime, timedelta

import dagster as dg

from assets.resources.partitions import week_partition
from assets.resources.steps import CONFIG_TAG, LATE_TAG, WEEK_TAG
from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.window import Days, first_day_of_week, resolved_window

MINUTE = 60
_PARTITION = "dagster/partition"  # Dagster's tag

# Everything, for the window that ends with the run's partition. Existing datasets are reused.
weekly_retrain = dg.define_asset_job(
    "weekly_retrain",
    selection=dg.AssetSelection.all(),
    description="Retrain on the window that ends with the run's week, embed, index, measure, judge and release.",
    tags={"dagster/max_retries": "2"},
)
ingest_logs = dg.define_asset_job(
    "ingest_logs",
    selection=dg.AssetSelection.assets("raw_events"),
    description="Read new files of the logs, which shows the weeks that have arrived.",
)


@dg.sensor(
    jobs=[weekly_retrain, ingest_logs],
    minimum_interval_seconds=MINUTE,
    description="Reads new logs as they arrive, and starts weekly_retrain for a week whose days are all there.",
)
def week_has_landed(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Of the source, only names, sizes and times of files are read here; a run of `ingest_logs` reads their rows."""
    catalog = Catalog(config_in_force())
    raw = catalog.find("raw_events")
    if raw is None:
        fingerprint = catalog.fingerprint("raw_events")
        is_changing = context.cursor != fingerprint
        context.update_cursor(fingerprint)
        if is_changing:
            return dg.SkipReason("the source has changed; its files are read once they stay the same for a tick")
        return dg.RunRequest(f"ingest {fingerprint}", job_name=ingest_logs.name)
    now = datetime.now(UTC)
    covered = date.fromisoformat(raw.manifest.metrics["covered_until"])
    newest = week_of(covered)
    waiting = []
    for week in (newest, week_of(newest.start - timedelta(days=1))):  # the last files of one may come with the next
        if str(resolved_window(catalog.config.window, week.end).train.end) <= raw.manifest.metrics["first_day"]:
            waiting.append(f"the week {week.start} has no training days in the log")
        elif missing := catalog.absent_days(week):
            waiting.append(f"the week {week.start} waits for its logs of {', '.join(missing)}")
        elif covered < week.end and now < deadline(week):  # its last day may still be arriving
            waiting.append(
                f"the week {week.start} waits for logs of a later day, until {deadline(week):%Y-%m-%d %H:%M}"
            )
        else:
            asked = _retrain(context.instance, week, catalog)
            if isinstance(asked, dg.RunRequest):
                return asked
            return dg.SkipReason("; ".join([*waiting, str(asked.skip_message)]))
    return dg.SkipReason("; ".join(waiting))


def weekly_retrain_schedule(partitions: dg.TimeWindowPartitionsDefinition) -> dg.ScheduleDefinition:
    """Sunday 03:00 UTC, three hours after the week has ended: the deadline for its logs."""

    @dg.schedule(
        job=weekly_retrain,
        cron_schedule="0 3 * * 0",
        execution_timezone="UTC",
        name="weekly_retrain_schedule",
        description="Sunday 03:00 UTC: retrains on the week that has ended, and fails if its logs are late.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        today = context.scheduled_execution_time.date()
        week = week_of(first_day_of_week(today) - timedelta(days=1))
        catalog = Catalog(config_in_force())
        source = catalog.config.source
        if source.last_day is not None and source.last_day < week.start:
            return dg.SkipReason(f"the log has ended on source.last_day = {source.last_day}")
        if partitions.get_prev_partition_window(context.scheduled_execution_time) is None:
            return dg.SkipReason("no partition of the raw events has ended yet; see source.first_day")
        raw = catalog.find("raw_events")
        if raw is not None and (missing := catalog.absent_days(week)):
            raise dg.Failure(f"the week {week.start} is late: the logs of {', '.join(missing)} have not arrived")
        return _retrain(context.instance, week, catalog)  # of logs that are not ingested yet, the run says what is late

    return schedule


def week_of(day: date) -> Days:
    """The week of `day`."""
    start = first_day_of_week(day)
    return Days(start, start + timedelta(days=7))


def deadline(week: Days) -> datetime:
    """When the logs of a week are late: three hours after its end, as the schedule ticks."""
    return datetime(week.end.year, week.end.month, week.end.day, 3, tzinfo=UTC)


def _retrain(instance: dg.DagsterInstance, week: Days, catalog: Catalog) -> dg.RunRequest | dg.SkipReason:
    """A run for this week and configuration, unless there is one. A run that came before the logs does not count."""
    name = catalog.config.name
    key = week_partition(week.start, catalog.config.source)
    tags = {WEEK_TAG: str(week.start), CONFIG_TAG: name}
    found = instance.get_runs(dg.RunsFilter(job_name=weekly_retrain.name, tags={_PARTITION: key} if key else tags))
    own = [run for run in found if run.tags.get(CONFIG_TAG, name) == name]
    early = [run for run in own if run.tags.get(LATE_TAG) == "true"]
    runs = [run for run in own if run not in early]
    for run in runs:
        if run.status not in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED):
            return dg.SkipReason(f"the week {week.start} has the run {run.run_id}: {run.status.value.lower()}")
    if runs:
        why = f"the week {week.start} has the run {runs[0].run_id}, which failed: launch it again by hand"
        return dg.SkipReason(why)
    # Without a partition (they are years, or the graph has none), the run needs its week in the configuration.
    run_config = {} if key else {"resources": {"pipeline": {"config": {"week": str(week.start)}}}}
    run_key = f"{name} {week.start}" + (f" {len(early)}" if early else "")
    return dg.RunRequest(run_key, run_config, tags, job_name=weekly_retrain.name, partition_key=key)
