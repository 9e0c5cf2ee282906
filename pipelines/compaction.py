"""The job that makes the notes of the log part of the releases that are served, and its hourly schedule."""

import dagster as dg

from assets.resources.pipeline import Pipeline, user_errors


@dg.op
def compact_releases(context: dg.OpExecutionContext, pipeline: Pipeline) -> None:
    """A release that has nothing new in the log, or that no service has opened, stays as it is."""
    from notellm2_core.serving.compaction import compact_served

    with user_errors():
        compacted = compact_served(pipeline.catalog().config)
    for release_id, result in compacted.items():
        context.log.info(f"release {release_id}: {result}")
    if not compacted:
        context.log.info("nothing to do: there is no release, or nothing was ever posted to a service")


@dg.job(description="Make new, changed and deleted notes part of the indexes that services search; they take them.")
def compact_notes() -> None:
    compact_releases()


hourly_compaction = dg.ScheduleDefinition(
    name="hourly_compaction",
    job=compact_notes,
    cron_schedule="30 * * * *",
    execution_timezone="UTC",
    description="Each hour: keeps few notes outside the indexes, so that answers are quick, and services start soon.",
)
