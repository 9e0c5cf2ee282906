"""The jobs and sensors around releases, on a lake with two of them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from notellm2_core.config.load import load_config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.release.promotion import decide
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.log_url import log_url
from pipelines.definitions import defs
from pipelines.messages import send_messages
from pipelines.mirror import mirror_releases
from tests.support.releases import publish_release


class _Handler(BaseHTTPRequestHandler):
    posts: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        self.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[str]:
    _Handler.posts.clear()
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: str) -> Catalog:
    settings = yaml.safe_load(Path("pipelines/configs/tiny.yaml").read_text())
    settings |= {"lake": str(tmp_path / "lake"), "messages": {"webhook": webhook}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    for name in ("SOURCE", "WEEK", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOTELLM2_CONFIG", str(tmp_path / "tiny.yaml"))
    catalog = Catalog(load_config(tmp_path / "tiny.yaml"))
    for release_id, week in (("aaaa", "2025-01-05"), ("bbbb", "2025-01-12")):
        release = publish_release(catalog.lake, release_id, week)
        decide(catalog.ledger, release, week, catalog.config.promotion, catalog.ledger.state())
    return catalog


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def _run(instance: dg.DagsterInstance, job: str, op: str, **config: Any) -> dg.ExecuteInProcessResult:
    run_config = {"ops": {op: {"config": config}}}
    return defs.resolve_job_def(job).execute_in_process(run_config, instance=instance, raise_on_error=False)


def test_the_jobs_change_the_ledger_and_the_page(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    assert catalog.ledger.state().champion == "bbbb"
    assert _run(instance, "release_rollback", "roll_back_release", why="Users complained.").success
    assert catalog.ledger.state().champion == "aaaa"
    event = instance.get_latest_materialization_event(dg.AssetKey("release"))
    assert event is not None and event.asset_materialization is not None
    page = event.asset_materialization.metadata
    assert page["decision"].value == "rolled_back" and "**Live: `aaaa`**" in str(page["live"].value)
    assert page["recall_by_week"].value.startswith("![recall by week](data:image/png;base64,")  # type: ignore[union-attr]
    assert page["decisions"].records[0].data["decision"] == "rolled_back"  # type: ignore[union-attr]
    refused = _run(instance, "release_promote", "promote_release", release="bbbb")
    assert not refused.success and catalog.ledger.state().champion == "aaaa"
    assert _run(instance, "release_ban", "ban_release", release="bbbb", why="Mended.", lift=True).success
    assert _run(instance, "release_promote", "promote_release", release="bbbb", why="Again.").success
    assert catalog.ledger.state().champion == "bbbb"


def _tick(sensor: dg.SensorDefinition, instance: dg.DagsterInstance, cursor: str | None = None) -> Any:
    return sensor.evaluate_tick(
        dg.build_sensor_context(instance=instance, cursor=cursor, repository_def=defs.get_repository_def())
    )


def test_a_message_for_each_decision_and_each_failed_run(instance: dg.DagsterInstance, catalog: Catalog) -> None:
    _tick(send_messages, instance)
    assert _Handler.posts == []  # what was before it was switched on
    release = publish_release(catalog.lake, "cccc", "2025-01-19", "refused")
    decide(catalog.ledger, release, "2025-01-19", catalog.config.promotion, catalog.ledger.state())
    failed = {"job_name": "weekly_retrain", "status": dg.DagsterRunStatus.FAILURE}
    instance.add_run(dg.DagsterRun(run_id="dead", tags={"notellm2/week": "2025-01-19"}, **failed))  # type: ignore[arg-type]
    instance.add_run(dg.DagsterRun(run_id="again", tags={"dagster/will_retry": "true"}, **failed))  # type: ignore[arg-type]
    for _ in range(2):
        _tick(send_messages, instance)
    assert [post["title"] for post in _Handler.posts] == [
        "tiny: release cccc of the week 2025-01-19 is refused; the champion stays",
        "tiny: weekly_retrain of the week 2025-01-19 failed",
    ]
    assert _Handler.posts[1]["text"] == "No step reported why: the process of the run ended. Run dead."


@pytest.mark.slow
def test_the_mirror_follows_and_a_dead_server_makes_the_tick_fail(
    instance: dg.DagsterInstance, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConnectionRefusedError):  # at once: MLflow itself would try again for minutes
        _tick(mirror_releases, instance)
    uri = f"sqlite:///{catalog.lake.root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = _tick(mirror_releases, instance)
    assert done.skip_message == "MLflow names the champion bbbb now"
    assert MlflowClient(uri, uri).get_model_version_by_alias("tiny", "champion").tags["release"] == "bbbb"
    assert _tick(mirror_releases, instance, done.cursor).skip_message == "MLflow names the releases that are live"


def test_the_job_that_compacts_takes_in_what_the_log_has(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "notellm2_core.serving.compaction.compact", lambda lake, release, log: seen.append((release.id, log.last_seq()))
    )
    compact_notes = defs.resolve_job_def("compact_notes")
    assert compact_notes.execute_in_process(instance=dg.DagsterInstance.ephemeral()).success
    assert seen == [] and not (catalog.ledger.folder / "notes.db").exists()  # without a log, there is nothing to do
    NoteLog.open(log_url(catalog.config, catalog.ledger)).close()
    assert compact_notes.execute_in_process(instance=dg.DagsterInstance.ephemeral()).success
    assert seen == [("aaaa", 0), ("bbbb", 0)]  # the champion, and the one to roll back to
