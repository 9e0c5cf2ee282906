"""Dagster's partitions of the raw logs: weeks or years, from `source.first_day`."""

from datetime import date, timedelta

import dagster as dg

from notellm2_core.config.source import SourceSettings
from notellm2_core.lake.window import first_day_of_week

FORMAT = "%Y-%m-%d"  # of a partition's name: its first day


def log_partitions(source: SourceSettings) -> dg.TimeWindowPartitionsDefinition:
    """Weeks from Sunday to Saturday, or years, by `source.partition`; of a log that has ended, its complete weeks."""
    cron = {"week": "0 0 * * 0", "year": "0 0 1 1 *"}[source.partition]
    end = None
    if (last := source.last_day) is not None:
        after = last + timedelta(days=1) if source.partition == "week" else date(last.year + 1, 1, 1)
        end = after.isoformat()
    return dg.TimeWindowPartitionsDefinition(
        start=source.first_day.isoformat(), end=end, fmt=FORMAT, cron_schedule=cron, timezone="UTC"
    )


def week_partition(day: date, source: SourceSettings) -> str | None:
    """The partition that is the week of `day`; None where partitions are years, or where the graph has none for it."""
    name = first_day_of_week(day).isoformat()
    is_known = source.partition == "week" and log_partitions(source).has_partition_key(name)
    return name if is_known else None


def require_partitions(loaded: dg.PartitionsDefinition, source: SourceSettings) -> None:
    """Raises ValueError if the graph was loaded with the partitions of another configuration."""
    if loaded != log_partitions(source):
        raise ValueError(
            f"source.first_day = {source.first_day}, source.last_day = {source.last_day or 'null'} and "
            f"source.partition = {source.partition} make other partitions of the raw logs than those that the graph "
            "was loaded with: load it with this configuration in NOTELLM2_CONFIG"
        )
