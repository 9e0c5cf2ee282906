"""A window that moves by a week reads only the new week, and its result is the same to the last digit."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from assets.logs import interactions, notes, raw_events_asset
from assets.pairs import cooccurrence
from assets.resources.partitions import log_partitions
from assets.resources.pipeline import Pipeline
from notellm2_core.lake.lake import Lake
from notellm2_core.runtime.files import sha256_of
from tests.pipelines.conftest import Workplace, make_workplace

FIRST_DAY = datetime(2025, 1, 5, tzinfo=UTC)  # a Sunday
CHANGES = {"window.train_days": 14, "window.test_days": 7, "source.max_events_per_day": 40}


def write_week(source: Path, week: int) -> None:
    """Write a week of 40 users and 30 notes; in week 1 and in week 3, a different user is a robot."""
    rng = np.random.default_rng(week)
    user, note, second = (rng.integers(0, size, 900) for size in (40, 30, 7 * 86400))
    if week in (1, 3):
        user[:60], second[:60] = week, np.arange(60)
    start = FIRST_DAY + timedelta(weeks=week)
    columns = {
        "user_id": [f"u{u}" for u in user],
        "note_id": [f"n{n}" for n in note],
        "timestamp": [(start + timedelta(seconds=int(s))).isoformat() for s in second],
        "event": np.where(rng.random(900) < 0.4, "click", "view").tolist(),
    }
    (source / "events").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), source / "events" / f"week{week}.parquet")


def materialize(workplace: Workplace) -> None:
    """Run the steps up to the scores, in this process and its Spark session."""
    partitions = log_partitions(workplace.catalog.config.source)
    dg.materialize(
        [raw_events_asset(partitions), notes, interactions, cooccurrence],
        resources={"pipeline": Pipeline(config_path=str(workplace.config))},
    )


def num_partitions(lake: Lake) -> dict[str, int]:
    """The number of ingestions, and of reduced partitions, in the lake."""
    return {name: len(lake.datasets(name)) for name in ("ingestion", "log_partition")}


def scores(workplace: Workplace) -> dict[str, str]:
    """The checksum of every file of scores. (The files of clicks, which Spark writes, may order their encodings
    differently.)
    """
    dataset = workplace.catalog.dataset("cooccurrence")
    return {file: sha256_of(dataset.path / file) for file in dataset.manifest.files if "clicks" not in file}


@pytest.mark.spark
@pytest.mark.slow
def test_only_the_new_week_is_read(spark: SparkSession, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    columns = {"note_id": [f"n{n}" for n in range(29)], **{c: ["x"] * 29 for c in ("title", "topics", "content")}}
    pq.write_table(pa.table(columns), source / "notes.parquet")  # n29 is unknown
    for week in range(3):
        write_week(source, week)
    sliding = make_workplace(tmp_path / "sliding", CHANGES | {"source.path": str(source)})
    lake = sliding.catalog.lake
    materialize(sliding)
    assert num_partitions(lake) == {"ingestion": 3, "log_partition": 3}
    before = scores(sliding)

    write_week(source, 3)
    (source / "events" / "week0.parquet").unlink()  # the other weeks stay ingested
    materialize(sliding)
    assert num_partitions(lake) == {"ingestion": 4, "log_partition": 4}
    assert list(lake.datasets("ingestion")[-1].manifest.settings["files"]) == ["events/week3.parquet"]
    metrics = sliding.catalog.dataset("interactions").manifest.metrics
    assert metrics["robots"] == 2 and metrics["dropped"]["unknown_note"] > 0
    after = scores(sliding)
    assert before != after

    fresh = make_workplace(tmp_path / "fresh", CHANGES | {"source.path": str(source)})
    materialize(fresh)
    assert num_partitions(fresh.catalog.lake) == {"ingestion": 3, "log_partition": 3}
    assert scores(fresh) == after
    assert fresh.catalog.dataset("interactions").manifest.metrics == metrics

    # A limit between view and click needs other partitions, which then serve every limit.
    changes = CHANGES | {"source.path": str(source), "lake": str(fresh.catalog.lake.root)}
    unlimited, pairs = fresh.catalog.dataset("cooccurrence").manifest.metrics["train"]["pairs"], []
    for minutes in (5000, 500):
        limited = make_workplace(tmp_path / f"limit{minutes}", changes | {"pairs.max_minutes": minutes})
        materialize(limited)
        assert num_partitions(limited.catalog.lake) == {"ingestion": 3, "log_partition": 6}
        pairs.append(limited.catalog.dataset("cooccurrence").manifest.metrics["train"]["pairs"])
    assert 0 < pairs[1] < pairs[0] < unlimited


@pytest.mark.spark
@pytest.mark.slow
def test_a_run_of_a_week_that_is_not_complete_stops_at_the_log(spark: SparkSession, tmp_path: Path) -> None:
    """A backfill from the UI must not paint a week that the log does not have."""
    source = tmp_path / "source"
    source.mkdir()
    for week in range(3):
        write_week(source, week)
    changes = CHANGES | {"source.path": str(source), "source.last_day": "2025-12-31"}
    workplace = make_workplace(tmp_path / "late", changes)
    partitions = log_partitions(workplace.catalog.config.source)
    with dg.instance_for_test() as instance:

        def run(partition: str) -> dg.ExecuteInProcessResult:
            resources = {"pipeline": Pipeline(config_path=str(workplace.config))}
            return dg.materialize([raw_events_asset(partitions)], instance=instance, resources=resources,
                                  partition_key=partition, raise_on_error=False)  # fmt: skip

        late = run("2025-01-26")
        assert not late.success and instance.get_run_by_id(late.run_id).tags["notellm2/late"] == "true"  # type: ignore[union-attr]
        (failure,) = late.get_step_failure_events()
        assert "the week 2025-01-26 is not complete: the logs of 2025-01-26" in str(
            failure.step_failure_data.user_failure_data
        )
        assert run("2025-01-19").success
        painted = instance.get_materialized_partitions(dg.AssetKey("raw_events"))
        assert painted == {"2025-01-05", "2025-01-12", "2025-01-19"}
