"""The Dagster definitions: assets, checks, jobs, sensor and schedule. No torch and no pyspark, so they load fast."""

import sys
from collections.abc import Sequence

import dagster as dg

import assets
from assets import logs
from assets.checks import CHECKS
from assets.resources.partitions import log_partitions
from assets.resources.pipeline import Pipeline
from notellm2_core.config.load import ConfigError, config_in_force
from notellm2_core.config.source import SourceSettings
from pipelines.compaction import compact_notes, hourly_compaction
from pipelines.jobs import ingest_logs, week_has_landed, weekly_retrain, weekly_retrain_schedule
from pipelines.messages import send_messages
from pipelines.mirror import mirror_releases
from pipelines.release_jobs import RELEASE_JOBS

SENSORS = (week_has_landed, send_messages, mirror_releases)


def definitions(source: SourceSettings, sensors: Sequence[dg.SensorDefinition] = SENSORS) -> dg.Definitions:
    """The graph with the partitions of `source`. All other settings are read when a run starts."""
    partitions = log_partitions(source)
    return dg.Definitions(
        assets=[logs.raw_events_asset(partitions), *dg.load_assets_from_package_module(assets)],
        asset_checks=CHECKS,
        jobs=[weekly_retrain, ingest_logs, *RELEASE_JOBS, compact_notes],
        schedules=[weekly_retrain_schedule(partitions), hourly_compaction],
        sensors=sensors,
        # All steps of a run in its one process: they share a JVM and the imports. What needs a GPU is a command anyway.
        executor=dg.in_process_executor,
        resources={"pipeline": Pipeline()},
    )


def _source_in_force() -> SourceSettings:
    """The source settings; if unreadable, the defaults, so that the UI loads. Every asset then refuses to run."""
    try:
        return config_in_force().source
    except ConfigError as e:
        print(f"warning: {e}; until then the graph shows the default partitions, and runs nothing", file=sys.stderr)
        return SourceSettings()


defs = definitions(_source_in_force())
