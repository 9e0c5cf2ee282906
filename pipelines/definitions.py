"""The Dagster definitions: assets, checks, job and schedule. Imports neither torch nor pyspark, so it loads fast."""

import sys

import dagster as dg

import assets
from assets import logs
from assets.checks import CHECKS
from assets.resources.partitions import log_partitions
from assets.resources.pipeline import Pipeline
from notellm2_core.config.load import ConfigError, config_in_force
from notellm2_core.config.source import SourceSettings
from pipelines.jobs import weekly_retrain, weekly_retrain_schedule


def definitions(source: SourceSettings) -> dg.Definitions:
    """The graph with the partitions of `source`. All other settings are read when a run starts."""
    partitions = log_partitions(source)
    return dg.Definitions(
        assets=[logs.raw_events_asset(partitions), *dg.load_assets_from_package_module(assets)],
        asset_checks=CHECKS,
        jobs=[weekly_retrain],
        schedules=[weekly_retrain_schedule(partitions)],
        # One step at a time, as one machine runs them all. Raise it where Spark and the GPUs are on other machines.
        executor=dg.multi_or_in_process_executor.configured({"multiprocess": {"max_concurrent": 1}}),
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
