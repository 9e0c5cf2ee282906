"""What the assets ask for: the configuration, its lake, Spark, and `publish`, the one way a dataset comes to be."""

import base64
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import PrivateAttr

from assets.commands import end_with_run
from assets.tracking import TrackedRun, flatten, tracked_run
from notellm2_core import __version__
from notellm2_core.config import Config
from notellm2_core.config_file import config_in_force, week_in_force
from notellm2_core.lake import Dataset, Draft
from notellm2_core.recipe import STAGES, Recipe

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Build = Callable[[Draft, Mapping[str, Dataset], TrackedRun], None]


class ChildProcessDied(RuntimeError):
    """A process that a step relied on was killed; the step can be tried again."""


class Pipeline(dg.ConfigurableResource):
    """The configuration in force. What is empty here is taken from NOTELLM2_CONFIG, SOURCE and WEEK.

    `week`: any day of the week that the window shall end with; empty in both places: the last complete week.
    """

    config_path: str = ""
    source: str = ""
    week: str = ""
    _run_id: str | None = PrivateAttr(None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        self._run_id = context.run_id
        end_with_run()

    def recipe(self) -> Recipe:
        """The addresses of this run's datasets: with the source as this run first saw it."""
        with one_sentence():
            return Recipe(config_in_force(self.config_path, self.source), week_in_force(self.week), self._run_id)

    @contextmanager
    def spark(self, config: Config, app_name: str) -> Iterator["SparkSession"]:
        """The Spark session of this process; the next step uses it again, and it ends with the process.

        Raises OSError where the disk is full, ChildProcessDied where the JVM was killed: another try starts a new one.
        """
        from spark_jobs.session import forget_dead_session, spark_session

        settings = config.spark
        try:
            yield spark_session(
                app_name, settings.master, settings.driver_memory, settings.shuffle_partitions, dict(settings.extra)
            )
        except Exception as e:
            if forget_dead_session():
                raise ChildProcessDied(f"Spark's JVM died during {app_name}") from e
            if "No space left on device" in str(e):  # also of Spark's own folder, which may be another disk
                raise OSError(
                    f"no space left on the disk while Spark made {app_name}: free some or move the lake"
                ) from e
            raise

    def publish(
        self,
        context: dg.AssetExecutionContext,
        build: Build,
        show: Callable[[Dataset], Mapping[str, Any]] | None = None,
    ) -> dg.MaterializeResult:
        """Make the asset's dataset unless it is there, track it, and say whether it is good.

        `build` writes into the draft; `show` adds metadata (tables, pictures). What the user can mend ends the step
        with one sentence and no retry.
        """
        name = context.asset_key.path[-1]
        with one_sentence():
            recipe = self.recipe()
            inputs, fingerprint, found = recipe.inputs(name), recipe.fingerprint(name), recipe.find(name)
        reused = found is not None
        tags = {
            "dagster_run_id": context.run_id,
            "asset_key": name,
            "partition": context.partition_key_range.start if context.has_partition_key_range else "",
            "code_version": code_version(),
            "config": recipe.config.name,
            "fingerprint": fingerprint,
        }
        with tracked_run(context, recipe.config.tracking, recipe.lake.root, tags) as run, one_sentence():
            if found is None:
                upstream = {n: d.manifest.fingerprint for n, d in inputs.items()}
                with recipe.lake.publish(name, fingerprint, upstream, recipe.settings(name)) as draft:
                    build(draft, inputs, run)
            dataset = recipe.dataset(name)
            run.log_dataset(dataset)
        context.log.info(f"{name}: {'already there' if reused else 'made'} at {dataset.path}")
        figures = {k: v for k, v in flatten(dataset.manifest.metrics).items() if isinstance(v, int | float | str)}
        return dg.MaterializeResult(
            metadata={
                **(show(dataset) if show else {}),
                **figures,
                **({"dagster/row_count": rows} if (rows := dataset.manifest.num_rows) else {}),
                "reused": reused,
                "path": dg.MetadataValue.path(str(dataset.path)),
                "fingerprint": fingerprint,
                "mlflow_run": run.url or "not tracked",
            },
            data_version=dg.DataVersion(fingerprint),
        )


def shown(files: Mapping[str, Sequence[str]]) -> Callable[[Dataset], Mapping[str, Any]]:
    """What shows the .md, .png and .jpg files of a dataset, those of one name together; absent ones are left out."""

    def show(dataset: Dataset) -> Mapping[str, Any]:
        found = {name: [dataset.path / file for file in some] for name, some in files.items()}
        texts = {name: "\n".join(map(_markdown, filter(Path.exists, some))) for name, some in found.items()}
        return {name: dg.MetadataValue.md(text) for name, text in texts.items() if text}

    return show


def _markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    return f"![{path.stem}](data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()})"


def dataset_deps(name: str) -> list[dg.AssetDep]:
    """The asset's upstream assets, from the one table that says what is made from what."""
    return [
        dg.AssetDep(n, partition_mapping=dg.AllPartitionMapping()) if n == "raw_events" else dg.AssetDep(n)
        for n in STAGES[name].inputs
    ]


def code_version() -> str:
    """The package version, with the commit where the code runs from a checkout."""
    folder = Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git on this machine, as in a container
        return __version__
    return f"{__version__}+{git.stdout.strip()}" if git.returncode == 0 else __version__


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what the user can mend into a failure of one sentence that is not retried; bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise dg.Failure(" ".join(str(e).split()), allow_retries=False) from None
