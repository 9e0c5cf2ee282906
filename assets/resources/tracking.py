"""MLflow tracking: one parent run per Dagster run, one child run per materialization.

A dead or slow server costs a few timeouts and a warning per step; the materialization continues without it.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import dagster as dg

from notellm2_core.config.settings import TrackingSettings
from notellm2_core.lake.lake import Dataset
from notellm2_core.runtime.files import draft_folder
from notellm2_core.runtime.nested import flatten

_ARTIFACTS = (".png", ".jpg", ".md", ".json", ".yaml")
_MAX_ARTIFACT_BYTES = 2_000_000
_RUNS_AT_A_TIME = 1000  # that mlflow gc removes: their ids are one argument
_PARENT_ID = "mlflow.parentRunId"  # MLflow's tag
_PARENT_TAG = "parent_of_dagster_run"  # not `dagster_run_id`: that is the children's


@dataclass(frozen=True)
class _Started:
    """A child run, and the parent that it shares with the other materializations of its Dagster run."""

    url: str
    run_id: str
    parent_id: str
    parent_name: str


class TrackedRun:
    """The child run of one materialization. Without a reachable server, its methods do nothing."""

    def __init__(self, uri: str, started: _Started | None, attempt: Callable[[Callable[[], Any]], Any]):
        self.uri, self._started, self._attempt = uri, started, attempt

    @property
    def url(self) -> str | None:
        """The page of the child run."""
        return None if self._started is None else self._started.url

    @property
    def run_id(self) -> str | None:
        """The child run; None: it is not tracked."""
        return None if self._started is None else self._started.run_id

    def log_dataset(self, dataset: Dataset) -> None:
        """Log the settings as parameters, the metrics, and the manifest, tables and plots as artifacts."""
        if self._started is not None:
            self._attempt(lambda: self._log(dataset))

    def log_to_parent(self, name: str, figures: Mapping[str, float]) -> None:
        """Name the parent, and log its headline figures: runs can then be compared without opening one."""
        if (started := self._started) is None or (name == started.parent_name and not figures):
            return

        def log() -> None:
            client = _client(self.uri)
            client.set_tag(started.parent_id, "mlflow.runName", name)
            for key, value in figures.items():
                client.log_metric(started.parent_id, key, value)

        self._attempt(log)

    def _log(self, dataset: Dataset) -> None:
        from mlflow.entities import Metric, Param

        client, run_id = _client(self.uri), str(self.run_id)
        stamp = int(Path(dataset.path).stat().st_mtime * 1000)
        metrics = [Metric(k, v, stamp, 0) for k, v in tracked_names(dataset.manifest.metrics).items() if _is_number(v)]
        params = [Param(k, str(v)[:500]) for k, v in tracked_names(dataset.manifest.settings).items()]
        for start in range(0, max(len(metrics), len(params)), 100):
            client.log_batch(run_id, metrics=metrics[start : start + 100], params=params[start : start + 100])
        for path in sorted(dataset.path.iterdir()):
            if path.suffix in _ARTIFACTS and path.stat().st_size <= _MAX_ARTIFACT_BYTES:
                client.log_artifact(run_id, str(path))


def tracking_uri(settings: TrackingSettings, lake: Path) -> str:
    """The configured address, else MLFLOW_TRACKING_URI, else sqlite inside the lake."""
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{lake / 'mlflow' / 'mlflow.db'}"


@contextmanager
def tracked_run(
    context: dg.AssetExecutionContext, settings: TrackingSettings, lake: Path, tags: Mapping[str, str]
) -> Iterator[TrackedRun]:
    """A child run that ends as FINISHED, or as FAILED if the block raises."""
    uri = tracking_uri(settings, lake)
    attempt = _attempter(context.log.warning)
    run = TrackedRun(uri, attempt(lambda: _start(uri, settings, lake, context, tags)), attempt)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        if run.run_id is not None:
            attempt(lambda: _client(uri).set_terminated(run.run_id, status))


def make_store(file: Path) -> None:
    """Create MLflow's sqlite file atomically: MLflow would refuse a half-made one for ever."""
    if file.exists():
        return
    with draft_folder(file) as folder:  # sqlite writes other files beside its own
        draft = folder / file.name
        _client(f"sqlite:///{draft}").search_experiments(max_results=1)
        if not file.exists():
            draft.replace(file)


def tracked_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name, in the characters that MLflow allows: letters, digits, blanks and _-./"""
    return {
        "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name): value for name, value in flatten(tree).items()
    }


def remove_runs(
    uri: str, settings: TrackingSettings, config: str, before: datetime, warn: Callable[[str], None]
) -> int:
    """Delete the runs of a configuration that ended before `before`; of a sqlite file, for good. Returns how many.

    A tracking server deletes for good what its own `mlflow gc` is run for. While MLflow is away, nothing is deleted.
    """
    attempt = _attempter(warn)
    return attempt(lambda: _remove_runs(uri, settings, config, before)) or 0


def _remove_runs(uri: str, settings: TrackingSettings, config: str, before: datetime) -> int:
    client = reachable_client(uri, settings)
    found = client.get_experiment_by_name(settings.experiment)
    if found is None:
        return 0
    stamp = int(before.timestamp() * 1000)
    old = list(_search_runs(client, found.experiment_id, f"attributes.end_time < {stamp} and tags.config = '{config}'"))
    young = _search_runs(client, found.experiment_id, f"attributes.end_time >= {stamp}")
    used = {run.data.tags.get(_PARENT_ID) for run in young}
    parents = {run.data.tags.get(_PARENT_ID) for run in old} - used - {None}
    removed = [*(run.info.run_id for run in old), *sorted(map(str, parents))]
    for run_id in removed:
        client.delete_run(run_id)
    if urlparse(uri).scheme == "sqlite":
        for start in range(0, len(removed), _RUNS_AT_A_TIME):
            ids = ",".join(removed[start : start + _RUNS_AT_A_TIME])
            command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--run-ids", ids]
            subprocess.run(command, capture_output=True, check=True, env={**os.environ, "MLFLOW_TRACKING_URI": uri})
    return len(removed)


def _search_runs(client: Any, experiment_id: str, query: str) -> Iterator[Any]:
    """All runs that match, page by page."""
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _attempter(warn: Callable[[str], None]) -> Callable[[Callable[[], Any]], Any]:
    """A function that calls the server, and after the step's first failure makes no further calls."""
    dead = False

    def attempt(call: Callable[[], Any]) -> Any:
        nonlocal dead
        if dead:
            return None
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        faults = MlflowException, RequestException, SQLAlchemyError, subprocess.CalledProcessError, OSError
        try:
            return call()
        except (*faults, ValueError) as e:  # ValueError: no address
            dead = True
            warn(f"MLflow fails, this step does without it: {str(e).splitlines()[0]}")
            return None

    return attempt


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def reachable_client(uri: str, settings: TrackingSettings) -> Any:
    """A client of a server that answers, or of a sqlite file, which is made if it is missing.

    A dead host is noticed at once (OSError): MLflow itself would try again for minutes.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(settings.timeout_seconds)))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    address = urlparse(uri)
    if address.scheme.startswith("http"):
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=settings.timeout_seconds).close()
    elif address.scheme == "sqlite":
        make_store(Path(address.path.removeprefix("/")))  # sqlite:///FILE is relative, sqlite:////FILE is not
    return _client(uri)


def _start(
    uri: str, settings: TrackingSettings, lake: Path, context: dg.AssetExecutionContext, tags: Mapping[str, str]
) -> _Started:
    client, address = reachable_client(uri, settings), urlparse(uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        location = None if address.scheme.startswith("http") else (lake / "mlflow" / "artifacts").as_uri()
        experiment_id = client.create_experiment(settings.experiment, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    parents = client.search_runs([experiment_id], f"tags.{_PARENT_TAG} = '{context.run_id}'", max_results=1)
    if parents:
        parent = parents[0]
    else:
        parent = client.create_run(
            experiment_id, tags={_PARENT_TAG: context.run_id}, run_name=f"dagster {context.run_id[:8]}"
        )
        client.set_terminated(parent.info.run_id)  # it only groups its children: it must not stay "running"
    child = client.create_run(
        experiment_id,
        tags={_PARENT_ID: parent.info.run_id, **tags},
        run_name=context.asset_key.to_user_string(),
    )
    run_id = child.info.run_id
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    url = f"{uri}/{page}" if address.scheme.startswith("http") else page
    return _Started(url, run_id, parent.info.run_id, parent.info.run_name or "")
