"""Parts that later weeks take over: landings of the log's files, and reduced periods. Each is a dataset of the lake.

A week that slides on lands the files that are new and reduces the period that is new; the result is the same, to the
last digit, as if all were made again.
"""

import shutil
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from notellm2_core.config.data import EventSettings
from notellm2_core.lake.catalog import Recipe
from notellm2_core.lake.lake import Dataset, Draft
from notellm2_core.runtime.fingerprint import fingerprint

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Raise these, and the version of raw_events or events in the stage table with them, when code changes a result.
_LANDING_VERSION = 3  # spark_jobs.source, spark_jobs.ingest
_PERIOD_VERSION = 2  # spark_jobs.clean, spark_jobs.interactions
_MAX_LANDINGS = 64  # of one run

Period = tuple[str, tuple[date, date] | None]  # its name and the days [start, end) of it; None: undated


def landings(context: dg.AssetExecutionContext, spark: "SparkSession", recipe: Recipe) -> list[Dataset]:
    """The landings that hold the source's files, each file once. Those that are new or have changed are landed."""
    from spark_jobs.ingest import land
    from spark_jobs.source import alike, event_files

    source, partition = recipe.source, recipe.config.source.partition
    stats = {file: (source / file).stat() for file in event_files(source)}
    files = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
    origin = {"version": _LANDING_VERSION, "source": str(source.resolve()), "partition": partition}
    found, new = [], files
    for landing in recipe.lake.datasets("landing"):
        held = landing.manifest.settings["files"]
        if landing.manifest.settings == {**origin, "files": held} and held.items() <= new.items():
            found.append(landing)
            new = {file: stat for file, stat in new.items() if file not in held}
    context.log.info(f"{len(files)} files of events, {len(files) - len(new)} of them landed before")
    groups = _groups(alike(source, list(new)))
    for number, some in enumerate(groups, start=1):
        settings = {**origin, "files": {file: new[file] for file in some}}
        key = fingerprint(settings)
        with recipe.lake.publish("landing", key, {}, settings) as draft:
            draft.metrics |= land(spark, source, draft.path, partition, some)
        context.log.info(f"landed {number} of {len(groups)}: {', '.join(some)}")
        found.append(recipe.lake.open("landing", key))
    return found


def _groups(of_equal_columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Files that are landed together: one by itself, or of very many those with equal columns."""
    size = -(-sum(map(len, of_equal_columns)) // _MAX_LANDINGS)
    return [list(files[start : start + size]) for files in of_equal_columns for start in range(0, len(files), size)]


def reduced_periods(
    context: dg.AssetExecutionContext,
    spark: "SparkSession",
    recipe: Recipe,
    raw: Dataset,
    wanted: Iterable[Period],
    draft: Draft,
) -> dict[Period, Dataset]:
    """The interactions of each wanted period of `raw`, on the days that count. Missing ones are made inside `draft`."""
    from spark_jobs.interactions import reduce_periods

    events = EventSettings.of(recipe.config.source)

    def settings(period: str, days: tuple[date, date] | None) -> dict[str, Any]:
        files = [facts["sha256"] for file, facts in raw.manifest.files.items() if Path(file).parts[0] == period]
        return {"version": _PERIOD_VERSION, "files": files, "days": days, **events.model_dump()}

    keys = {part: fingerprint(settings(*part)) for part in wanted}
    missing = {key: part for part, key in keys.items() if recipe.lake.find("period", key) is None}
    context.log.info(f"{len(keys)} periods, {len(keys) - len(missing)} of them reduced before")
    if missing:
        work = draft.path / ".periods"
        counts = reduce_periods(
            spark,
            landed={key: raw.path / period for key, (period, _) in missing.items()},
            days={key: days for key, (_, days) in missing.items()},
            out=work,
            settings=events,
        )
        for key, part in missing.items():
            with recipe.lake.publish("period", key, {"raw_events": raw.manifest.fingerprint}, settings(*part)) as one:
                for table in sorted((work / key).iterdir()) if (work / key).exists() else ():
                    table.rename(one.path / table.name)
                one.metrics |= counts[key]
        shutil.rmtree(work)
    return {part: recipe.lake.open("period", key) for part, key in keys.items()}
