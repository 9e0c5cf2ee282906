"""The retention of history: which runs go, and which partitions stay green."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from assets.resources.history import sweep_history
from assets.resources.steps import CONFIG_TAG
from assets.resources.tracking import make_store, remove_runs
from notellm2_core.config.settings import TrackingSettings
from notellm2_core.lake.catalog import Catalog
from tests.support.world import tiny_config

NOW = timedelta(0)
LOG = dg.AssetKey("raw_events")
PARTITIONS = dg.StaticPartitionsDefinition(["2025-01-05", "2025-01-12"])


@dg.asset(partitions_def=PARTITIONS)
def raw_events() -> None: ...


def _materialize(instance: dg.DagsterInstance, partition: str, config: str) -> str:
    result = dg.materialize([raw_events], instance=instance, partition_key=partition, tags={CONFIG_TAG: config})
    return result.run_id


@pytest.mark.slow
def test_runs_of_the_configuration_go_and_their_partitions_stay_green(tmp_path: Path) -> None:
    nowhere = TrackingSettings(uri="http://127.0.0.1:9", timeout_seconds=1)
    config = tiny_config().model_copy(update={"lake": tmp_path / "lake", "tracking": nowhere})
    catalog = Catalog(config)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        own = _materialize(instance, "2025-01-05", config.name)
        other = _materialize(instance, "2025-01-12", "another")
        files = {run_id: [p for p in tmp_path.rglob(f"{run_id}*") if "db-" not in p.name] for run_id in (own, other)}
        assert all(files.values())
        kept = {}

        @dg.asset
        def release(context: dg.AssetExecutionContext) -> None:
            kept["young"] = sweep_history(context, catalog, timedelta(days=1))
            kept["old"] = sweep_history(context, catalog, NOW)

        run = dg.materialize([release], instance=instance)
        assert run.success and kept["young"]["removed_runs"] == 0 and kept["old"]["removed_runs"] == 1
        assert {r.run_id for r in instance.get_runs()} == {other, run.run_id} and not instance.has_run(own)
        assert instance.get_materialized_partitions(LOG) == {"2025-01-05", "2025-01-12"}
        assert not [*tmp_path.rglob(f"{own}*")] and all(path.exists() for path in files[other])


@pytest.mark.slow
def test_runs_of_mlflow_go_with_their_parents(tmp_path: Path) -> None:
    """Three parents: one with an old child, one with an old and a young child, one of another configuration."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    make_store(tmp_path / "mlflow.db")
    client, before = MlflowClient(uri), datetime(2025, 1, 1, tzinfo=UTC)
    experiment = client.create_experiment("notellm2", artifact_location=(tmp_path / "artifacts").as_uri())
    stamp = int(before.timestamp() * 1000)

    def run(config: str, days: int, parent: str = "") -> str:
        tags = {"config": config, "mlflow.parentRunId": parent} if parent else {}
        created = client.create_run(experiment, tags=tags).info.run_id
        client.set_terminated(created, end_time=stamp + days * 86_400_000)
        return str(created)

    parents = [run("", -2) for _ in range(3)]
    old, mixed = run("tiny", -1, parents[0]), run("tiny", -1, parents[1])
    young, other = run("tiny", 1, parents[1]), run("another", -1, parents[2])
    warnings: list[str] = []
    assert remove_runs(uri, TrackingSettings(), "tiny", before, warnings.append) == 3 and not warnings
    left = {r.info.run_id for r in client.search_runs([experiment], run_view_type=3)}  # deleted ones, too
    assert left == {parents[1], parents[2], young, other} and left.isdisjoint({old, mixed, parents[0]})
    assert (
        remove_runs("http://127.0.0.1:9", TrackingSettings(), "tiny", before, warnings.append) == 0
        and len(warnings) == 1
    )
