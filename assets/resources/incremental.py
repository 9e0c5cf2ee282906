"""Incremental work: ingestions of the log's files and reduced partitions, each a dataset that later weeks reuse.

When the window slides by a week, only new files are ingested and only the new partition is reduced. The result is
identical, to the last digit, to one made from scratch.
"""

import shutil
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from notellm2_core.config.source import EventReadingSettings, EventSettings
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import Dataset, Draft
from notellm2_core.lake.lineage import INGESTION_VERSION, PARTITION_VERSION
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.tables.log import ingested_together

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LogPartition = tuple[str, tuple[date, date] | None]  # its name and its days [start, end); None: undated


def ingestions(context: dg.AssetExecutionContext, spark: "SparkSession", catalog: Catalog) -> list[Dataset]:
    """The ingestions of the source's files, each file once. New and changed files are ingested now."""
    from spark_jobs.ingest import ingest
    from spark_jobs.source import event_files

    source, partition = catalog.source, catalog.config.source.partition
    reading = EventReadingSettings.of(catalog.config.source)
    stats = {file: (source / file).stat() for file in event_files(source, reading)}
    files = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
    origin = {"version": INGESTION_VERSION, "source": str(source.resolve()), "partition": partition}
    origin |= reading.model_dump(mode="json")
    reused, new = [], files
    for ingestion in catalog.lake.datasets("ingestion"):
        its_files = ingestion.manifest.settings["files"]
        if ingestion.manifest.settings == {**origin, "files": its_files} and its_files.items() <= new.items():
            reused.append(ingestion)
            new = {file: stat for file, stat in new.items() if file not in its_files}
    context.log.info(f"{len(files)} files of events, {len(files) - len(new)} of them ingested before")
    groups = ingested_together(list(new))
    ingested = []
    for number, group in enumerate(groups, start=1):
        settings = {**origin, "files": {file: new[file] for file in group}}
        key = fingerprint(settings)
        with catalog.lake.publish("ingestion", key, {}, settings) as draft:
            draft.metrics |= ingest(spark, source, draft.path, partition, group, reading)
        context.log.info(f"ingested {number} of {len(groups)}: {', '.join(group)}")
        ingested.append(catalog.lake.open("ingestion", key))
    return reused + ingested


def reduced_partitions(
    context: dg.AssetExecutionContext,
    spark: "SparkSession",
    catalog: Catalog,
    raw: Dataset,
    partitions: Iterable[LogPartition],
    draft: Draft,
) -> dict[LogPartition, Dataset]:
    """The reduced dataset of each of `partitions` of `raw`, on its days. Missing ones are computed inside `draft`."""
    from spark_jobs.interactions import reduce_partitions

    events, limit = EventSettings.of(catalog.config.source), catalog.config.pairs.max_minutes
    by_time = {} if limit is None else {"every_time": True}

    def settings(partition: str, days: tuple[date, date] | None) -> dict[str, Any]:
        files = [entry["sha256"] for file, entry in raw.manifest.files.items() if Path(file).parts[0] == partition]
        return {"version": PARTITION_VERSION, "files": files, "days": days, **by_time, **events.model_dump()}

    keys = {partition: fingerprint(settings(*partition)) for partition in partitions}
    missing = {key: partition for partition, key in keys.items() if catalog.lake.find("log_partition", key) is None}
    context.log.info(f"{len(keys)} partitions, {len(keys) - len(missing)} of them reduced before")
    if missing:
        work = draft.path / ".partitions"
        counts = reduce_partitions(
            spark,
            ingested={key: raw.path / name for key, (name, _) in missing.items()},
            days={key: days for key, (_, days) in missing.items()},
            out=work,
            settings=events,
            **by_time,
        )
        inputs = {"raw_events": raw.manifest.fingerprint}
        for key, partition in missing.items():
            with catalog.lake.publish("log_partition", key, inputs, settings(*partition)) as reduced:
                for table in sorted((work / key).iterdir()) if (work / key).exists() else ():
                    table.rename(reduced.path / table.name)
                reduced.metrics |= counts[key]
        shutil.rmtree(work)
    return {partition: catalog.lake.open("log_partition", key) for partition, key in keys.items()}
