"""Parts that later weeks take over: ingestions of the log's files, and reduced partitions. Each is a dataset of the
lake.

A week that slides on ingests the files that are new and reduces the partition that is new; the result is the same, to
the
last digit, as if all were made again.
"""

import shutil
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from notellm2_core.config.data import EventSettings
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import Dataset, Draft
from notellm2_core.runtime.fingerprint import fingerprint

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Raise these, and the version of raw_events or events in the stage table with them, when code changes a result.
_INGESTION_VERSION = 3  # spark_jobs.source, spark_jobs.ingest
_PARTITION_VERSION = 2  # spark_jobs.clean, spark_jobs.interactions
_MAX_INGESTIONS = 64  # of one run

LogPartition = tuple[str, tuple[date, date] | None]  # its name and the days [start, end) of it; None: undated


def ingestions(context: dg.AssetExecutionContext, spark: "SparkSession", catalog: Catalog) -> list[Dataset]:
    """The ingestions that hold the source's files, each file once. Those that are new or have changed are ingested."""
    from spark_jobs.ingest import ingest
    from spark_jobs.source import event_files, files_by_types

    source, partition = catalog.source, catalog.config.source.partition
    stats = {file: (source / file).stat() for file in event_files(source)}
    files = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
    origin = {"version": _INGESTION_VERSION, "source": str(source.resolve()), "partition": partition}
    found, new = [], files
    for ingestion in catalog.lake.datasets("ingestion"):
        held = ingestion.manifest.settings["files"]
        if ingestion.manifest.settings == {**origin, "files": held} and held.items() <= new.items():
            found.append(ingestion)
            new = {file: stat for file, stat in new.items() if file not in held}
    context.log.info(f"{len(files)} files of events, {len(files) - len(new)} of them ingested before")
    groups = _groups(files_by_types(source, list(new)))
    for number, some in enumerate(groups, start=1):
        settings = {**origin, "files": {file: new[file] for file in some}}
        key = fingerprint(settings)
        with catalog.lake.publish("ingestion", key, {}, settings) as draft:
            draft.metrics |= ingest(spark, source, draft.path, partition, some)
        context.log.info(f"ingested {number} of {len(groups)}: {', '.join(some)}")
        found.append(catalog.lake.open("ingestion", key))
    return found


def _groups(of_equal_columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Files that are ingested together: one by itself, or of very many those with equal columns."""
    size = -(-sum(map(len, of_equal_columns)) // _MAX_INGESTIONS)
    return [list(files[start : start + size]) for files in of_equal_columns for start in range(0, len(files), size)]


def reduced_partitions(
    context: dg.AssetExecutionContext,
    spark: "SparkSession",
    catalog: Catalog,
    raw: Dataset,
    wanted: Iterable[LogPartition],
    draft: Draft,
) -> dict[LogPartition, Dataset]:
    """The interactions of each wanted partition of `raw`, on the days that count. Missing ones are made inside
    `draft`."""
    from spark_jobs.interactions import reduce_partitions

    events = EventSettings.of(catalog.config.source)

    def settings(partition: str, days: tuple[date, date] | None) -> dict[str, Any]:
        files = [facts["sha256"] for file, facts in raw.manifest.files.items() if Path(file).parts[0] == partition]
        return {"version": _PARTITION_VERSION, "files": files, "days": days, **events.model_dump()}

    keys = {part: fingerprint(settings(*part)) for part in wanted}
    missing = {key: part for part, key in keys.items() if catalog.lake.find("log_partition", key) is None}
    context.log.info(f"{len(keys)} partitions, {len(keys) - len(missing)} of them reduced before")
    if missing:
        work = draft.path / ".partitions"
        counts = reduce_partitions(
            spark,
            ingested={key: raw.path / partition for key, (partition, _) in missing.items()},
            days={key: days for key, (_, days) in missing.items()},
            out=work,
            settings=events,
        )
        for key, part in missing.items():
            with catalog.lake.publish(
                "log_partition", key, {"raw_events": raw.manifest.fingerprint}, settings(*part)
            ) as one:
                for table in sorted((work / key).iterdir()) if (work / key).exists() else ():
                    table.rename(one.path / table.name)
                one.metrics |= counts[key]
        shutil.rmtree(work)
    return {part: catalog.lake.open("log_partition", key) for part, key in keys.items()}
