"""From the user's source to clean notes and interactions."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from assets.resources.commands import import_ahead
from assets.resources.demo_source import ensure_source
from assets.resources.incremental import LogPartition, ingestions, reduced_partitions
from assets.resources.metadata import drift_page
from assets.resources.partitions import require_partitions
from assets.resources.pipeline import user_errors
from assets.resources.posted_notes import take_posted_notes
from assets.resources.steps import LATE_TAG, SPARK, Metrics, Step, dataset
from notellm2_core.config.drift import WEEK_GATES
from notellm2_core.config.source import EventSettings, NoteReadingSettings
from notellm2_core.config.unused import unused_settings
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.window import first_day_of_week, weeks_before
from notellm2_core.schema import DAYS_FILE, NOTES_TABLE, POSTED_FILE, TEST, TRAIN
from notellm2_core.tables.log import UNDATED, ingestion_metrics, partition_days, partitions_between, summed_counts

SPARK_KINDS = {"spark", "parquet"}


def raw_events_asset(partitions: dg.TimeWindowPartitionsDefinition) -> dg.AssetsDefinition:
    """`raw_events`, the one partitioned asset, with the partitions of the configuration."""

    def check(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
        require_partitions(partitions, catalog.config.source)
        take_posted_notes(context, catalog)  # before the run sees what there is
        catalog.require_champion()
        for sentence in (*unused_settings(catalog.config), *catalog.warnings()):
            context.log.warning(sentence)
        ensure_source(context, catalog)

    after = partial(_check_partitions, partitions)
    return dataset("logs", SPARK_KINDS, on=SPARK, before=check, after=after, partitions=partitions)(raw_events)


def raw_events(step: Step) -> Metrics:
    """The unchanged behaviour logs: a folder per partition, and one for rows without a readable time."""
    with step.spark() as spark:
        ingested = ingestions(step.context, spark, step.catalog)
    for ingestion in ingested:
        for file in ingestion.manifest.files:
            step.draft.link(f"{Path(file).parent}/{ingestion.manifest.fingerprint}-{Path(file).name}", ingestion, file)
    metrics = [ingestion.manifest.metrics for ingestion in ingested]
    days = summed_counts(counts["days"] for counts in metrics)
    (step.out / DAYS_FILE).write_text(json.dumps(dict(sorted(days.items()))))
    return ingestion_metrics(step.catalog.source, metrics)


def _sources_of_notes(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
    ensure_source(context, catalog)
    take_posted_notes(context, catalog)


@dataset("logs", SPARK_KINDS, on=SPARK, before=_sources_of_notes)
def notes(step: Step) -> Metrics:
    """Usable notes; the others are in quarantine, with their reasons."""
    from spark_jobs.clean import prepare_notes

    import_ahead()  # for the commands that will read these notes
    with step.spark() as spark:
        reading, posted = NoteReadingSettings.of(step.config.source), step.catalog.posted
        file = None if posted is None else posted.path / POSTED_FILE
        return prepare_notes(spark, step.catalog.source, step.out, reading, file)


@dataset("logs", SPARK_KINDS, on=SPARK)
def interactions(step: Step) -> Metrics:
    """First views and last clicks per user and note (all that Eq. 2 needs), in the training and in the test days."""
    from spark_jobs.window import Window, join_partitions

    raw, days, source = step.inputs["raw_events"], step.catalog.window, step.config.source
    train, test = (
        partitions_between(span.start, span.end, source.partition, **raw.manifest.metrics)
        for span in (days.train, days.test)
    )
    undated: list[LogPartition] = [(UNDATED, None)] if (raw.path / UNDATED).exists() else []
    with step.spark() as spark:
        log_partitions = reduced_partitions(
            step.context, spark, step.catalog, raw, [*train, *test, *undated], step.draft
        )

        def metrics(partitions: Sequence[LogPartition]) -> dict[Path, Mapping[str, Any]]:
            return {log_partitions[p].path: log_partitions[p].manifest.metrics for p in partitions}

        return join_partitions(
            spark,
            train=Window(days.train.start, days.train.end, metrics(train)),
            test=Window(days.test.start, days.test.end, metrics(test)),
            undated=metrics(undated),
            notes=step.path("notes", NOTES_TABLE),
            out=step.out,
            settings=EventSettings.of(source),
        )


def _activity_page(context: dg.AssetExecutionContext, catalog: Catalog) -> Mapping[str, Any]:
    from notellm2_core.release.drift import of_week

    drifts = of_week(catalog.dataset("weekly_activity").manifest.metrics["weeks"])
    return drift_page(WEEK_GATES, drifts, catalog.config.checks.accepted_drift)


@dataset("logs", SPARK_KINDS, on=SPARK, after=_activity_page)
def weekly_activity(step: Step) -> Metrics:
    """What happened in the week, compared with the weeks before it in the window."""
    from notellm2_core.release.drift import NUM_WEEKS
    from spark_jobs.weekly_activity import weekly_activity

    window, rows = step.catalog.window, json.loads(step.path("raw_events", DAYS_FILE).read_text())
    weeks = weeks_before(window.test.end, NUM_WEEKS)
    figures = [{"first_day": str(w.start), "rows": sum(rows.get(str(day), 0) for day in w.days())} for w in weeks]
    if step.config.source.partition != "week" or window.test.end != first_day_of_week(window.test.end):
        return {"weeks": figures}  # interactions have a row per partition, user and note: it tells nothing of a week
    names = (TRAIN, TEST) if window.train != window.test else (TEST,)
    tables = [step.path("interactions", name) for name in names]
    with step.spark() as spark:
        found = weekly_activity(spark, tables, window.train.start, window.test.end, NUM_WEEKS)
    activity = {week["first_day"]: week for week in found}
    return {"weeks": [week | activity.get(week["first_day"], {}) for week in figures]}


def _check_partitions(
    partitions: dg.TimeWindowPartitionsDefinition, context: dg.AssetExecutionContext, catalog: Catalog
) -> None:
    """Fail if the log lacks this run's partition; else report the partitions that it has, as one pass ingests them all.

    Those that were reported before are not reported again.
    """
    unit = catalog.config.source.partition
    if catalog.partition is not None and catalog.week is None and catalog.config.window.end is None:
        if unit == "week" and (absent := catalog.absent_days(catalog.partition)):
            context.instance.add_run_tags(context.run_id, {LATE_TAG: "true"})
            raise dg.Failure(
                f"the week {catalog.partition.start} is not complete: the logs of {', '.join(absent)} have not "
                f"arrived. A run with the resource's setting week = {catalog.partition.start} takes it as it is.",
                allow_retries=False,
            )
        with user_errors():
            _ = catalog.window
    reported = context.instance.get_materialized_partitions(context.asset_key)
    reported |= set(context.partition_keys) if context.has_partition_key else set()
    end = catalog.end_of_log()
    for log_partition in catalog.dataset("raw_events").manifest.metrics["partitions"]:
        key = log_partition["partition"]
        if key in reported or not partitions.has_partition_key(key):
            continue
        if unit == "year" or partition_days(key, unit)[1] <= end:  # a week that is still arriving does not count
            metadata = {"dagster/row_count": log_partition["rows"]}
            context.log_event(dg.AssetMaterialization(context.asset_key, metadata=metadata, partition=key))
