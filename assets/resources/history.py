"""The retention of history: finished runs of Dagster with their events, and MLflow's runs."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from assets.resources.steps import CONFIG_TAG
from assets.resources.tracking import remove_runs, tracking_uri
from notellm2_core.lake.catalog import Catalog

FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def sweep_history(context: dg.AssetExecutionContext, catalog: Catalog, age: timedelta) -> dict[str, Any]:
    """Remove the runs of this configuration that are older than `age`. Returns their numbers, of Dagster and of MLflow.

    The partitions of the log that only such a run had reported are reported by this one: they stay green.
    """
    before, name, instance = datetime.now(UTC) - age, catalog.config.name, context.instance
    found = instance.get_runs(dg.RunsFilter(statuses=FINISHED, created_before=before))
    old = [run.run_id for run in found if run.tags.get(CONFIG_TAG) == name and run.run_id != context.run_id]
    log = dg.AssetKey("raw_events")
    reported = instance.get_materialized_partitions(log)
    for run_id in old:
        _remove(instance, run_id)
    for lost in sorted(reported - instance.get_materialized_partitions(log)):
        context.log_event(dg.AssetMaterialization(log, partition=lost))
    settings = catalog.config.tracking
    tracked = remove_runs(tracking_uri(settings, catalog.lake.root), settings, name, before, context.log.warning)
    return {"removed_runs": len(old), "removed_mlflow_runs": tracked}


def _remove(instance: dg.DagsterInstance, run_id: str) -> None:
    """Remove a run with its events, and what Dagster leaves of it for ever: its output, and in SQLite an empty file."""
    instance.delete_run(run_id)
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    if (file_of_run := getattr(instance.event_log_storage, "path_for_shard", None)) is not None:
        for end in ("", "-wal", "-shm"):
            Path(f"{file_of_run(run_id)}{end}").unlink(missing_ok=True)
