"""The one Dagster resource: the configuration in force and the catalog of its datasets; and the Spark session."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import PrivateAttr

from notellm2_core.config.load import config_in_force, week_in_force
from notellm2_core.config.settings import SparkSettings
from notellm2_core.lake.catalog import Catalog

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class ChildProcessDied(RuntimeError):
    """A process that a step relied on was killed; a retry can succeed."""


class Pipeline(dg.ConfigurableResource):
    """The configuration in force. Empty fields are read from NOTELLM2_CONFIG, SOURCE and WEEK.

    `week`: any day of the window's last week; empty in both places, the week of the run's partition. A run without a
    partition takes the last complete week.
    """

    config_path: str = ""
    source: str = ""
    week: str = ""
    _run_id: str | None = PrivateAttr(None)
    _partition: str | None = PrivateAttr(None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        self._run_id = context.run_id
        self._partition = context.dagster_run.tags.get("dagster/partition") if context.dagster_run else None

    def catalog(self) -> Catalog:
        """The catalog of this run, with the source's state as the run first saw it."""
        with user_errors():
            config = config_in_force(self.config_path, self.source)
            return Catalog(config, week_in_force(self.week), self._run_id, self._partition)


@contextmanager
def spark_session(settings: SparkSettings, app_name: str) -> Iterator["SparkSession"]:
    """The Spark session of this process, shared by its steps; it ends with the process.

    Raises OSError if the disk is full, and ChildProcessDied if the JVM was killed; the next call starts a new one.
    """
    from spark_jobs.common import session

    try:
        yield session.spark_session(
            app_name, settings.master, settings.driver_memory, settings.shuffle_partitions, dict(settings.extra)
        )
    except Exception as e:
        if session.forget_dead_session():
            raise ChildProcessDied(f"Spark's JVM died during {app_name}") from e
        if "No space left on device" in str(e):  # maybe on the disk of Spark's scratch folder
            raise OSError(f"no space left on the disk while Spark made {app_name}: free some or move the lake") from e
        raise


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that the user can correct into a one-sentence failure without retries. Bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise dg.Failure(" ".join(str(e).split()), allow_retries=False) from None
