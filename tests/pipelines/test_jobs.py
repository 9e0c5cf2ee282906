"""What starts the weekly retrain: the sensor when a week's logs have landed, and the schedule as their deadline."""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster import DagsterError

from assets.resources.partitions import log_partitions
from notellm2_core.config.load import load_config
from notellm2_core.config.source import SourceSettings
from notellm2_core.lake.catalog import Catalog
from notellm2_core.schema import DAYS_FILE
from pipelines.definitions import defs
from pipelines.jobs import week_has_landed, weekly_retrain_schedule

SUNDAY = date(2025, 1, 5)
PARTITION = "dagster/partition"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A source with a log, which is not ingested yet."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "events.csv").write_text("user_id,note_id,timestamp,event\n")
    settings = yaml.safe_load(Path("pipelines/configs/tiny.yaml").read_text())
    settings |= {
        "lake": str(tmp_path / "lake"),
        "source": {"path": str(tmp_path / "source"), "first_day": "2025-01-05"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("NOTELLM2_CONFIG", str(tmp_path / "tiny.yaml"))
    monkeypatch.delenv("SOURCE", raising=False)
    monkeypatch.delenv("WEEK", raising=False)
    return Catalog(load_config(tmp_path / "tiny.yaml"))


def _ingest(catalog: Catalog, num_days: int, without: int | None = None) -> None:
    """The dataset raw_events with 100 rows on each of `num_days` days from SUNDAY on, except the day `without`."""
    days = {str(SUNDAY + timedelta(days=n)): 100 for n in range(num_days) if n != without}
    with catalog.lake.publish("raw_events", catalog.fingerprint("raw_events"), {}, {}) as draft:
        (draft.path / DAYS_FILE).write_text(json.dumps(days))
        draft.metrics |= {"first_day": min(days), "last_day": max(days), "covered_until": max(days)}


def _tick(instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[dg.RunRequest | str, str | None]:
    context = dg.build_sensor_context(instance=instance, cursor=cursor, repository_def=defs.get_repository_def())
    done = week_has_landed.evaluate_tick(context)
    return (done.run_requests or [done.skip_message])[0], done.cursor  # type: ignore[return-value]


def _schedule(instance: dg.DagsterInstance, catalog: Catalog, sunday: date) -> dg.RunRequest | str:
    schedule = weekly_retrain_schedule(log_partitions(catalog.config.source))
    at = datetime(sunday.year, sunday.month, sunday.day, 3, tzinfo=UTC)
    context = dg.build_schedule_context(
        instance=instance, scheduled_execution_time=at, repository_def=defs.get_repository_def()
    )
    done = schedule.evaluate_tick(context)
    return (done.run_requests or [done.skip_message])[0]  # type: ignore[return-value]


def _run(instance: dg.DagsterInstance, week: str, status: dg.DagsterRunStatus) -> None:
    instance.add_run(
        dg.DagsterRun(job_name="weekly_retrain", run_id=f"run {week}", tags={PARTITION: week}, status=status)
    )


def test_new_files_are_read_once_they_no_longer_change(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    waiting, cursor = _tick(instance)
    assert waiting == "the source has changed; its files are read once they stay the same for a tick"
    (catalog.source / "events.csv").write_text("user_id,note_id,timestamp,event\nu,n,2025-01-05,view\n")
    still, cursor = _tick(instance, cursor)
    assert still == waiting
    request, _ = _tick(instance, cursor)
    assert isinstance(request, dg.RunRequest) and request.job_name == "ingest_logs" and request.partition_key is None
    again, _ = _tick(instance, cursor)
    assert isinstance(again, dg.RunRequest) and again.run_key == request.run_key  # Dagster starts it once


def test_a_week_whose_days_are_all_there_is_retrained_once(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    _ingest(catalog, num_days=14)
    request, _ = _tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert (request.job_name, request.partition_key) == ("weekly_retrain", "2025-01-12")
    assert request.tags["notellm2/week"] == "2025-01-12"
    _run(instance, "2025-01-12", dg.DagsterRunStatus.STARTED)
    assert _tick(instance)[0] == "the week 2025-01-12 has the run run 2025-01-12: started"
    assert _schedule(instance, catalog, date(2025, 1, 19)) == "the week 2025-01-12 has the run run 2025-01-12: started"


def test_a_failed_week_is_left_to_a_person(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    _ingest(catalog, num_days=14)
    _run(instance, "2025-01-12", dg.DagsterRunStatus.FAILURE)
    assert str(_tick(instance)[0]).endswith("which failed: launch it again by hand")


def test_a_log_that_has_just_begun_waits(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    _ingest(catalog, num_days=2)
    waiting = str(_tick(instance)[0])
    assert waiting.count("has no training days in the log") == 2


def test_a_run_that_came_before_the_logs_does_not_count(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    _ingest(catalog, num_days=14)
    tags = {PARTITION: "2025-01-12", "notellm2/late": "true"}
    instance.add_run(
        dg.DagsterRun(job_name="weekly_retrain", run_id="early", tags=tags, status=dg.DagsterRunStatus.FAILURE)
    )
    request, _ = _tick(instance)
    assert isinstance(request, dg.RunRequest) and request.run_key == "tiny 2025-01-12 1"


def test_runs_of_another_configuration_do_not_count(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    _ingest(catalog, num_days=14)
    tags = {PARTITION: "2025-01-12", "notellm2/config": "another"}
    instance.add_run(
        dg.DagsterRun(job_name="weekly_retrain", run_id="other", tags=tags, status=dg.DagsterRunStatus.SUCCESS)
    )
    assert isinstance(_tick(instance)[0], dg.RunRequest)


def test_a_week_that_was_complete_late_is_not_forgotten(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    """Its last day came together with the next week's first."""
    _ingest(catalog, num_days=15)
    request, _ = _tick(instance)
    assert isinstance(request, dg.RunRequest) and request.partition_key == "2025-01-12"
    _run(instance, "2025-01-12", dg.DagsterRunStatus.SUCCESS)
    waiting = str(_tick(instance)[0])
    assert waiting.startswith("the week 2025-01-19 waits for its logs of 2025-01-20")
    assert waiting.endswith("the week 2025-01-12 has the run run 2025-01-12: success")


@pytest.mark.parametrize(
    ("num_days", "without", "late"),
    [(13, None, "2025-01-18"), (14, 8, "2025-01-13"), (10, None, "2025-01-15, 2025-01-16, 2025-01-17")],
)
def test_a_week_waits_for_its_days_and_is_late_on_sunday(
    instance: dg.DagsterInstance, catalog: Catalog, num_days: int, without: int | None, late: str
) -> None:
    _ingest(catalog, num_days, without)
    _run(instance, "2025-01-05", dg.DagsterRunStatus.SUCCESS)
    assert str(_tick(instance)[0]).startswith(f"the week 2025-01-12 waits for its logs of {late}")
    with pytest.raises(DagsterError) as failed:  # a red tick, with the cause
        _schedule(instance, catalog, date(2025, 1, 19))
    assert str(failed.value.__cause__).startswith(f"the week 2025-01-12 is late: the logs of {late}")


def test_the_schedule_asks_for_the_week_that_has_ended(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    not_ingested = _schedule(instance, catalog, date(2025, 1, 19))
    assert isinstance(not_ingested, dg.RunRequest) and not_ingested.partition_key == "2025-01-12"
    _ingest(catalog, num_days=21)
    request = _schedule(instance, catalog, date(2025, 1, 26))
    assert isinstance(request, dg.RunRequest) and request.partition_key == "2025-01-19"


def test_a_log_that_has_ended_has_no_later_week(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTELLM2_CONFIG", "pipelines/configs/tiny.yaml")
    monkeypatch.delenv("SOURCE", raising=False)
    config = load_config(Path("pipelines/configs/tiny.yaml"))
    catalog = Catalog(config)
    assert _schedule(instance, catalog, date(2026, 11, 29)) == "the log has ended on source.last_day = 2025-01-25"
    keys = log_partitions(config.source).get_partition_keys()
    assert keys == ["2025-01-05", "2025-01-12", "2025-01-19"]
    demo = config.source.demo
    assert demo is not None and config.source.last_day == SUNDAY + timedelta(days=demo.num_days - 1)


def test_the_years_of_a_log_that_has_ended() -> None:
    source = SourceSettings(first_day=date(1995, 1, 1), last_day=date(1997, 9, 24), partition="year")
    assert log_partitions(source).get_partition_keys() == ["1995-01-01", "1996-01-01", "1997-01-01"]
