"""Dagster's partitions of the raw logs: weeks or years, from `source.first_day`."""

import dagster as dg

from notellm2_core.config.source import SourceSettings


def log_partitions(source: SourceSettings) -> dg.TimeWindowPartitionsDefinition:
    """Weeks from Sunday to Saturday, or years, by `source.partition`."""
    cron = {"week": "0 0 * * 0", "year": "0 0 1 1 *"}[source.partition]
    return dg.TimeWindowPartitionsDefinition(
        start=source.first_day.isoformat(), fmt="%Y-%m-%d", cron_schedule=cron, timezone="UTC"
    )


def require_partitions(loaded: dg.PartitionsDefinition, source: SourceSettings) -> None:
    """Raises ValueError if the graph was loaded with the partitions of another configuration."""
    if loaded != log_partitions(source):
        raise ValueError(
            f"source.first_day = {source.first_day} and source.partition = {source.partition} make other partitions "
            "of the raw logs than those that the graph was loaded with: load it with this configuration in "
            "NOTELLM2_CONFIG"
        )
