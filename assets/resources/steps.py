"""The asset factory: an asset is a group, its kinds, and the function that makes its dataset.

    @dataset("pairs", {"spark", "parquet"}, on=SPARK)
    def cooccurrence(step: Step) -> Metrics:
        \"\"\"Eq. 2: ...\"\"\"
        with step.spark() as spark:
            return score(spark, windows=step.path("interactions"), out=step.out, ...)

Upstream datasets and the code version come from the lineage (`notellm2_core.lake.lineage`). The function runs only
if the dataset does not exist yet; it writes into `step.out` and returns the manifest's metrics.
"""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.resources.commands import run_command
from assets.resources.metadata import file_metadata
from assets.resources.pipeline import Pipeline, spark_session, user_errors
from assets.resources.tracking import TrackedRun, tracked_names, tracked_run
from notellm2_core import __version__
from notellm2_core.config.settings import Config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import Dataset, Draft
from notellm2_core.lake.lineage import STAGES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Metrics = Mapping[str, Any]
# Tags of a run: the first day of its window's last week, its configuration, and whether it failed for want of logs.
WEEK_TAG, CONFIG_TAG, LATE_TAG = "notellm2/week", "notellm2/config", "notellm2/late"


@dataclass(frozen=True)
class Machine:
    """Where a step runs: the Dagster pool that it takes a slot of, and its number of retries."""

    pool: str | None = None
    max_retries: int = 0


HERE, PROCESS, SPARK, GPU = Machine(), Machine(None, 2), Machine("spark", 1), Machine("gpu", 2)


@dataclass(frozen=True)
class Step:
    """One dataset while it is made: its settings, its upstream datasets, and its folder."""

    context: dg.AssetExecutionContext
    catalog: Catalog
    inputs: Mapping[str, Dataset]
    draft: Draft
    run: TrackedRun

    @property
    def name(self) -> str:
        return self.context.asset_key.path[-1]

    @property
    def config(self) -> Config:
        return self.catalog.config

    @property
    def out(self) -> Path:
        """The folder that becomes the dataset."""
        return self.draft.path

    def path(self, name: str, *file: str) -> Path:
        """The folder of the input `name`, or a file in it (`notellm2_core.schema` names the files)."""
        return self.inputs[name].path.joinpath(*file)

    @property
    def work(self) -> Path:
        """A folder that outlives a kill, so that the next run resumes. It is removed once the dataset is published."""
        return _work(self.catalog, self.name)

    def spark(self) -> AbstractContextManager["SparkSession"]:
        return spark_session(self.config.spark, self.name)

    def command(self, command: Sequence[str | Path], reports: bool = False) -> None:
        """Run a command to its end; see `run_command`."""
        run_command(self.context, [str(part) for part in command], reports)


# Assets whose checks stop another one, which does not read them: the data are judged before pairs and model are made.
_STOPPED_BY = {
    "cooccurrence": ["weekly_activity"],
    "note_split": ["weekly_activity"],
    "initial_model": ["data_profile"],
    "checkpoint": ["data_profile"],
}
Make = Callable[[Step], Metrics]
Hook = Callable[[dg.AssetExecutionContext, Catalog], None]
After = Callable[[dg.AssetExecutionContext, Catalog], Mapping[str, Any] | None]
Page = Callable[[Dataset, Config], Mapping[str, Any]]  # metadata by name; its floats are the run's headline figures


def dataset(
    group: str,
    kinds: set[str],
    on: Machine = HERE,
    show: Mapping[str, Sequence[str]] | None = None,
    page: Page | None = None,
    before: Hook | None = None,
    after: After | None = None,
    partitions: dg.PartitionsDefinition | None = None,
) -> Callable[[Make], dg.AssetsDefinition]:
    """Turn the function that makes a dataset into an asset of its name.

    show: metadata name -> .md, .png and .jpg files of the dataset. page: what the asset's page shows first, in place of
    all metrics. before, after: run even if the dataset exists; after returns what the page shows first.
    """

    def decorate(make: Make) -> dg.AssetsDefinition:
        stage = STAGES[make.__name__]

        @dg.asset(
            name=make.__name__,
            group_name=group,
            kinds=kinds,
            deps=_deps((*stage.inputs, *_STOPPED_BY.get(make.__name__, ()))),
            description=make.__doc__,
            code_version=str(stage.version),
            pool=on.pool,
            retry_policy=dg.RetryPolicy(max_retries=on.max_retries) if on.max_retries else None,
            partitions_def=partitions,
        )
        def asset(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
            catalog = pipeline.catalog()
            if before is not None:
                with user_errors():
                    before(context, catalog)
            published, metadata = _publish(context, catalog, make, page)
            if after is not None:
                metadata = {**(after(context, catalog) or {}), **metadata}
            metadata |= file_metadata(published.path, show or {})
            return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(published.manifest.fingerprint))

        return asset

    return decorate


def _publish(
    context: dg.AssetExecutionContext, catalog: Catalog, make: Make, page: Page | None
) -> tuple[Dataset, dict[str, Any]]:
    """The asset's dataset, made if it does not exist yet, and the metadata that say whether it is good.

    Errors that the user can correct end the step with one sentence and without retries.
    """
    name = context.asset_key.path[-1]
    with user_errors():
        inputs, fingerprint, existing = catalog.inputs(name), catalog.fingerprint(name), catalog.find(name)
    tags = {
        "dagster_run_id": context.run_id,
        "asset_key": name,
        "partition": context.partition_key_range.start if context.has_partition_key_range else "",
        "code_version": code_version(),
        "config": catalog.config.name,
        "fingerprint": fingerprint,
    }
    with tracked_run(context, catalog.config.tracking, catalog.lake.root, tags) as run, user_errors():
        if existing is None:
            upstream = {n: d.manifest.fingerprint for n, d in inputs.items()}
            with catalog.lake.publish(name, fingerprint, upstream, catalog.settings(name)) as draft:
                draft.metrics |= make(Step(context, catalog, inputs, draft, run))
        published = catalog.dataset(name)
        run.log_dataset(published)
        days = _days(context, catalog)
        shown = tracked_names(published.manifest.metrics) if page is None else page(published, catalog.config)
        figures = {} if page is None else {key: value for key, value in shown.items() if isinstance(value, float)}
        if days:
            run.log_to_parent(f"{catalog.config.name}, week {days['week']}", figures)
    shutil.rmtree(_work(catalog, name), ignore_errors=True)  # nothing is left to resume
    context.log.info(f"{name}: {'made' if existing is None else 'exists'} at {published.path}")
    return published, {
        **days,
        **{k: v for k, v in shown.items() if isinstance(v, int | float | str | dg.MetadataValue)},
        **({"dagster/row_count": rows} if (rows := published.manifest.num_rows) else {}),
        "reused": existing is not None,
        "path": dg.MetadataValue.path(str(published.path)),
        "fingerprint": fingerprint,
        "mlflow_run": run.url or "not tracked",
    }


def _days(context: dg.AssetExecutionContext, catalog: Catalog) -> dict[str, str]:
    """The days that this run is about, which also become a tag of the run. Nothing before the log is ingested."""
    try:
        window, week = catalog.window, str(catalog.window.last_week)
    except ValueError:  # an asset that does not depend on the window
        return {}
    if context.run.tags.get(WEEK_TAG) != week or CONFIG_TAG not in context.run.tags:
        context.instance.add_run_tags(context.run_id, {WEEK_TAG: week, CONFIG_TAG: catalog.config.name})
    days = {"train": window.train, "test": window.test}
    return {"week": week, **{name: f"{span.start} to {span.end - timedelta(days=1)}" for name, span in days.items()}}


def _work(catalog: Catalog, name: str) -> Path:
    return catalog.work / name / catalog.fingerprint(name)


def _deps(inputs: Sequence[str]) -> list[dg.AssetDep]:
    return [
        dg.AssetDep(n, partition_mapping=dg.AllPartitionMapping()) if n == "raw_events" else dg.AssetDep(n)
        for n in inputs
    ]


def code_version() -> str:
    """The package version, plus the commit if the code runs from a git checkout."""
    folder = Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git on this machine, as in a container
        return __version__
    return f"{__version__}+{git.stdout.strip()}" if git.returncode == 0 else __version__


def why_failed(events: Sequence[dg.DagsterEvent]) -> str | None:
    """The first failed step of a run, or the first check that stopped it, in one sentence; None: neither."""
    for event in events:
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            return _of_step(event)
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            check = event.asset_check_evaluation_data
            if not check.passed and check.blocking:
                return _of_check(check)
    return None


def _of_check(check: dg.AssetCheckEvaluation) -> str:
    name = f"{check.asset_key.to_user_string()}: the check {check.check_name} failed"
    if check.description:
        return f"{name}: {check.description}"
    return f"{name} ({', '.join(f'{key} = {value.value}' for key, value in check.metadata.items())})"


def _of_step(event: dg.DagsterEvent) -> str:
    failure = event.step_failure_data
    description = failure.user_failure_data.description if failure.user_failure_data else None
    cause = failure.error.cause if failure.error else None
    reason = description or (cause or failure.error).message if failure.error else description
    return f"{event.step_key}: {' '.join(str(reason).split())}"
