"""The job of the whole graph, and its weekly schedule."""

import dagster as dg

# One partition of the raw logs, and everything downstream. Existing datasets are reused.
weekly_retrain = dg.define_asset_job(
    "weekly_retrain",
    selection=dg.AssetSelection.all(),
    description="Read the week that has just ended, retrain, embed, index and measure.",
    tags={"dagster/max_retries": "2"},
)


def weekly_retrain_schedule(partitions: dg.TimeWindowPartitionsDefinition) -> dg.ScheduleDefinition:
    """Sunday 03:00 UTC, three hours after the week has ended."""

    @dg.schedule(
        job=weekly_retrain,
        cron_schedule="0 3 * * 0",
        execution_timezone="UTC",
        name="weekly_retrain_schedule",
        description="Sunday 03:00 UTC, three hours after the week has ended.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = context.scheduled_execution_time
        ended = partitions.get_prev_partition_window(now)
        if ended is None:
            return dg.SkipReason("no partition of the raw events has ended yet; see source.first_day")
        return dg.RunRequest(run_key=now.isoformat(), partition_key=f"{ended.start:{partitions.fmt}}")

    return schedule
