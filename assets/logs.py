"""From the user's source to clean notes and events."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.parts import Period, landings, reduced_periods
from assets.resources import Pipeline, dataset_deps, one_sentence
from assets.tracking import TrackedRun
from notellm2_core.config import Source
from notellm2_core.config_advice import without_effect
from notellm2_core.config_file import ConfigError, config_in_force
from notellm2_core.lake import Dataset, Draft
from notellm2_core.recipe import Recipe

SPARK_RETRIES = dg.RetryPolicy(max_retries=1)


def raw_event_partitions(source: Source) -> dg.TimeWindowPartitionsDefinition:
    """Weeks from Sunday to Saturday, or years, from the source's first day."""
    cron = {"week": "0 0 * * 0", "year": "0 0 1 1 *"}[source.partition]
    return dg.TimeWindowPartitionsDefinition(
        start=source.first_day.isoformat(), fmt="%Y-%m-%d", cron_schedule=cron, timezone="UTC"
    )


def _source_in_force() -> Source:
    """A configuration that cannot be read must not keep the graph from loading: every asset says what is wrong."""
    try:
        return config_in_force().source
    except ConfigError:
        return Source()


PARTITIONS = raw_event_partitions(_source_in_force())


@dg.asset(
    group_name="logs",
    kinds={"spark", "parquet"},
    partitions_def=PARTITIONS,
    backfill_policy=dg.BackfillPolicy.single_run(),
    pool="spark",
    retry_policy=SPARK_RETRIES,
)
def raw_events(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """The behaviour logs as they came, placed in time: a folder per period, one for rows without a readable time."""
    recipe = pipeline.recipe()
    for sentence in without_effect(recipe.config):
        context.log.warning(sentence)
    ensure_demo_world(context, recipe)

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.landing import landed_figures

        with pipeline.spark(recipe.config, "raw_events") as spark:
            parts = landings(context, spark, recipe)
        for part in parts:
            for file in part.manifest.files:
                draft.link(f"{Path(file).parent}/{part.manifest.fingerprint}-{Path(file).name}", part, file)
        draft.metrics |= landed_figures(recipe.source, [part.manifest.metrics for part in parts])

    result = pipeline.publish(context, build)
    _announce_periods(context, recipe.dataset("raw_events"))
    return result


@dg.asset(group_name="logs", kinds={"spark", "parquet"}, pool="spark", retry_policy=SPARK_RETRIES)
def notes(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Notes that can be used; the others lie in quarantine with their reasons."""
    recipe = pipeline.recipe()
    ensure_demo_world(context, recipe)

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.clean import prepare_notes

        with pipeline.spark(recipe.config, "notes") as spark:
            draft.metrics |= prepare_notes(spark, recipe.source, draft.path)

    return pipeline.publish(context, build)


@dg.asset(
    group_name="logs", kinds={"spark", "parquet"}, deps=dataset_deps("events"), pool="spark", retry_policy=SPARK_RETRIES
)
def events(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """What Eq. 2 asks of the clean events of the training and of the test days: first views and last clicks."""
    recipe = pipeline.recipe()
    source = recipe.config.source

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.clean import EventNames
        from spark_jobs.interactions import Window, join_periods
        from spark_jobs.landing import UNDATED, periods_between

        raw, days = inputs["raw_events"], recipe.window
        train, test = (
            periods_between(of.start, of.end, source.partition, **raw.manifest.metrics)
            for of in (days.train, days.test)
        )
        undated: list[Period] = [(UNDATED, None)] if (raw.path / UNDATED).exists() else []
        with pipeline.spark(recipe.config, "events") as spark:
            periods = reduced_periods(context, spark, recipe, raw, [*train, *test, *undated], draft)

            def figures(parts: Sequence[Period]) -> dict[Path, Mapping[str, Any]]:
                return {periods[part].path: periods[part].manifest.metrics for part in parts}

            draft.metrics |= join_periods(
                spark,
                train=Window(days.train.start, days.train.end, figures(train)),
                test=Window(days.test.start, days.test.end, figures(test)),
                undated=figures(undated),
                notes=inputs["notes"].path / "notes",
                out=draft.path,
                names=EventNames(source.view_events, source.click_events, source.ignored_events),
            )

    return pipeline.publish(context, build)


def _announce_periods(context: dg.AssetExecutionContext, landed: Dataset) -> None:
    """One pass over the source lands all its periods: the other partitions are materialized too, unless known."""
    known = context.instance.get_materialized_partitions(context.asset_key)
    asked = set(context.partition_keys)
    for period in landed.manifest.metrics["periods"]:
        key = period["period"]
        if key not in known | asked and PARTITIONS.has_partition_key(key):
            metadata = {"dagster/row_count": period["rows"]}
            context.log_event(dg.AssetMaterialization(context.asset_key, metadata=metadata, partition=key))


def ensure_demo_world(context: dg.AssetExecutionContext, recipe: Recipe) -> None:
    """Without a source of the user's, the demo world is generated into the lake, once."""
    with one_sentence():
        if recipe.config.source.path is not None or recipe.lake.find("demo_world", recipe.source.name):
            return
    from notellm2_core.demo import generate

    world = recipe.config.source.demo
    assert world is not None  # or recipe.source has raised
    context.log.info(f"no source.path: generating the demo world at {recipe.source}")
    with one_sentence(), recipe.lake.publish("demo_world", recipe.source.name, {}, world.model_dump()) as draft:
        draft.metrics |= generate(draft.path, world.num_notes, world.num_users, world.num_days, world.seed)
