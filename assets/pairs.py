"""From clean events to related pairs, split without leaks (Eq. 2, section 2.3)."""

from collections.abc import Mapping
from dataclasses import fields

import dagster as dg

from assets.logs import SPARK_RETRIES
from assets.resources import Pipeline, dataset_deps, shown
from assets.tracking import TrackedRun
from notellm2_core.lake import Dataset, Draft


@dg.asset(
    group_name="pairs",
    kinds={"spark", "parquet"},
    deps=dataset_deps("cooccurrence"),
    pool="spark",
    retry_policy=SPARK_RETRIES,
)
def cooccurrence(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Eq. 2: how strongly reading one note leads to clicking another, in the training days and in the test days."""
    config = pipeline.recipe().config

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.cooccurrence import Scoring, score

        with pipeline.spark(config, "cooccurrence") as spark:
            draft.metrics |= score(
                spark,
                windows=inputs["events"].path,
                out=draft.path,
                scoring=Scoring(**{f.name: getattr(config.pairs, f.name) for f in fields(Scoring)}),
            )

    return pipeline.publish(context, build)


@dg.asset(
    group_name="pairs",
    kinds={"spark", "parquet"},
    deps=dataset_deps("note_sides"),
    pool="spark",
    retry_policy=SPARK_RETRIES,
)
def note_sides(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Which notes train and which form the test pool; near-duplicates stay on one side."""
    config = pipeline.recipe().config

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.split import assign_sides

        with pipeline.spark(config, "note_sides") as spark:
            draft.metrics |= assign_sides(
                spark,
                notes=inputs["notes"].path / "notes",
                events=inputs["events"].path,
                out=draft.path / "sides",
                images=inputs["vision_features"].path / "note_images.parquet",
                by=config.split.by,
                pool_share=config.split.pool_share,
                max_pool_notes=config.split.max_pool_notes,
            )

    return pipeline.publish(context, build)


@dg.asset(
    group_name="pairs",
    kinds={"spark", "parquet"},
    deps=dataset_deps("related_pairs"),
    pool="spark",
    retry_policy=SPARK_RETRIES,
)
def related_pairs(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Section 2.3: scores outside [low, up] removed, then the top t of each note."""
    config = pipeline.recipe().config

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.related_pairs import Filters, relate

        with pipeline.spark(config, "related_pairs") as spark:
            draft.metrics |= relate(
                spark,
                scores=inputs["cooccurrence"].path,
                sides=inputs["note_sides"].path / "sides",
                out=draft.path,
                filters=Filters(**{f.name: getattr(config.pairs, f.name) for f in fields(Filters)}),
            )

    return pipeline.publish(context, build)


@dg.asset(
    group_name="pairs",
    kinds={"spark", "parquet"},
    deps=dataset_deps("pair_datasets"),
    pool="spark",
    retry_policy=SPARK_RETRIES,
)
def pair_datasets(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Training, validation and test pairs and the test pool, with the leakage report."""
    config = pipeline.recipe().config

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from spark_jobs.split import split

        with pipeline.spark(config, "pair_datasets") as spark:
            draft.metrics |= split(
                spark,
                pairs=inputs["related_pairs"].path,
                sides=inputs["note_sides"].path / "sides",
                out=draft.path,
                validation_share=config.split.validation_share,
            )

    return pipeline.publish(context, build)


@dg.asset(group_name="pairs", kinds={"numpy"}, deps=dataset_deps("data_card"))
def data_card(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """The data of this release for people: Table 1, what was dropped, how scores, pairs and clicks are spread."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from notellm2_core.evaluation.data_card import write_data_card

        draft.metrics |= write_data_card(
            notes=inputs["notes"].path / "notes",
            pairs=inputs["pair_datasets"].path,
            clicks=inputs["cooccurrence"].path,
            out=draft.path,
            manifests={name: dataset.manifest.metrics for name, dataset in inputs.items()},
            window={"train": recipe.window.train.iso(), "test": recipe.window.test.iso()},
            unit=recipe.config.text.word_unit,
        )

    return pipeline.publish(context, build, shown({"data card": ["data_card.md", "data_card.png"]}))
