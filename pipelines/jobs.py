"""The job of the whole graph, the one that reads new logs, and what starts them: a sensor and the weekly schedule."""

import json
from datetime import date, timedelta

import dagster as dg

from assets.resources.partitions import week_partition
from assets.resources.steps import WEEK_TAG
from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import Dataset
from notellm2_core.lake.window import Days, first_day_of_week
from notellm2_core.schema import DAYS_FILE
from notellm2_core.tables.log import missing_days

MINUTE = 60
_PARTITION = "dagster/partition"  # Dagster's tag

# Everything, for the window that ends with the run's partition. Existing datasets are reused.
weekly_retrain = dg.define_asset_job(
    "weekly_retrain",
    selection=dg.AssetSelection.all(),
    description="Retrain on the window that ends with the run's week, embed, index and measure.",
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
        is_changing, _ = context.cursor != fingerprint, context.update_cursor(fingerprint)
        if is_changing:
            return dg.SkipReason("the source has changed; its files are read once they stay the same for a tick")
        return dg.RunRequest(f"ingest {fingerprint}", job_name=ingest_logs.name)
    week = newest_week(raw)
    if missing := absent_days(raw, week):
        return dg.SkipReason(f"the week {week.start} waits for its logs of {', '.join(missing)}")
    return _retrain(context.instance, week, catalog)


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
        week = Days(first_day_of_week(today) - timedelta(days=7), first_day_of_week(today))
        catalog = Catalog(config_in_force())
        source = catalog.config.source
        if source.last_day is not None and source.last_day < week.start:
            return dg.SkipReason(f"the log has ended on source.last_day = {source.last_day}")
        if partitions.get_prev_partition_window(context.scheduled_execution_time) is None:
            return dg.SkipReason("no partition of the raw events has ended yet; see source.first_day")
        raw = catalog.find("raw_events")
        if raw is not None and (missing := absent_days(raw, week)):
            raise dg.Failure(f"the week {week.start} is late: the logs of {', '.join(missing)} have not arrived")
        return _retrain(context.instance, week, catalog)  # of logs that are not ingested yet, the run says what is late

    return schedule


def newest_week(raw: Dataset) -> Days:
    """The last week that any event is in."""
    start = first_day_of_week(date.fromisoformat(raw.manifest.metrics["covered_until"]))
    return Days(start, start + timedelta(days=7))


def absent_days(raw: Dataset, week: Days) -> list[str]:
    """The days of `week` whose events have not arrived (`tables.log.missing_days`)."""
    missing = set(missing_days(json.loads((raw.path / DAYS_FILE).read_text()), (week.start, week.end)))
    covered = date.fromisoformat(raw.manifest.metrics["covered_until"])
    after = (week.start + timedelta(days=n) for n in range(7))
    return sorted(missing | {str(day) for day in after if day > covered})


def _retrain(instance: dg.DagsterInstance, week: Days, catalog: Catalog) -> dg.RunRequest | dg.SkipReason:
    """A run for this week, unless there is one already."""
    key = week_partition(week.start, catalog.config.source)
    tags = {WEEK_TAG: str(week.start)}
    runs = instance.get_runs(dg.RunsFilter(job_name=weekly_retrain.name, tags={_PARTITION: key} if key else tags))
    for run in runs:
        if run.status not in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED):
            return dg.SkipReason(f"the week {week.start} has the run {run.run_id}: {run.status.value.lower()}")
    if runs:
        return dg.SkipReason(
            f"the week {week.start} has the run {runs[0].run_id}, which failed: launch it again by hand"
        )
    return dg.RunRequest(f"week {week.start}", partition_key=key, job_name=weekly_retrain.name, tags=tags)
