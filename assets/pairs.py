"""From interactions to related pairs, split without leakage (Eq. 2, section 2.3); the data card and profile."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets.resources.metadata import drift_page
from assets.resources.steps import SPARK, Metrics, Step, dataset
from notellm2_core.config.data import FilterSettings, HoldOutSettings, ScoringSettings
from notellm2_core.config.drift import CONTENT_GATES
from notellm2_core.lake.catalog import NOTES_PROFILE, Catalog
from notellm2_core.schema import NOTE_IMAGES_FILE, NOTES_TABLE, SPLIT_TABLE, TEST, TRAIN

SPARK_KINDS = {"spark", "parquet"}


@dataset("pairs", SPARK_KINDS, on=SPARK)
def cooccurrence(step: Step) -> Metrics:
    """Eq. 2: how strongly viewing one note leads to clicking another, in the training and in the test days."""
    from spark_jobs.cooccurrence import score

    scoring, window = ScoringSettings.of(step.config.pairs), step.catalog.window
    ends = {"train": window.train.end, "test": window.test.end}
    with step.spark() as spark:
        return score(spark, windows=step.path("interactions"), out=step.out, scoring=scoring, ends=ends)


@dataset("pairs", SPARK_KINDS, on=SPARK)
def note_split(step: Step) -> Metrics:
    """Which notes are for training and which form the candidate pool; near-duplicates stay in one split."""
    from spark_jobs.split import assign_split

    with step.spark() as spark:
        return assign_split(
            spark,
            notes=step.path("notes", NOTES_TABLE),
            interactions=step.path("interactions"),
            out=step.out / SPLIT_TABLE,
            images=step.path("vision_features", NOTE_IMAGES_FILE),
            settings=HoldOutSettings.of(step.config.split),
        )


@dataset("pairs", SPARK_KINDS, on=SPARK)
def related_pairs(step: Step) -> Metrics:
    """Section 2.3: the top t targets of each query, after pairs with a score outside [low, up] are dropped."""
    from spark_jobs.related_pairs import relate

    with step.spark() as spark:
        return relate(
            spark,
            scores=step.path("cooccurrence"),
            note_split=step.path("note_split", SPLIT_TABLE),
            out=step.out,
            filters=FilterSettings.of(step.config.pairs),
        )


@dataset("pairs", SPARK_KINDS, on=SPARK)
def pair_datasets(step: Step) -> Metrics:
    """Training, validation and test pairs and the candidate pool, with the leakage report."""
    from spark_jobs.split import split

    with step.spark() as spark:
        return split(
            spark,
            pairs=step.path("related_pairs"),
            note_split=step.path("note_split", SPLIT_TABLE),
            out=step.out,
            validation_share=step.config.split.validation_share,
        )


@dataset("pairs", {"numpy"}, show={"data card": ["data_card.md", "data_card.png"]})
def data_card(step: Step) -> Metrics:
    """The data card of this release: Table 1, what was dropped, the spread of scores, pairs and clicks, and advice."""
    from notellm2_core.evaluation.data_card import CardInputs, write_data_card

    inputs = CardInputs(
        notes=step.path("notes", NOTES_TABLE),
        pairs=step.path("pair_datasets"),
        clicks=step.path("cooccurrence"),
        manifests={name: upstream.manifest.metrics for name, upstream in step.inputs.items()},
        window=step.catalog.window,
    )
    table, advice = write_data_card(inputs, step.out, step.config.text.word_unit, step.config.pairs)
    for sentence in advice:
        step.context.log.warning(sentence)
    return table


def _page(context: dg.AssetExecutionContext, catalog: Catalog) -> Mapping[str, Any]:
    """The gates, which depend on the releases so far; the dataset does not."""
    from notellm2_core.release.drift import of_content

    drifts = of_content(catalog.dataset("data_profile").manifest.metrics, catalog.past(NOTES_PROFILE))
    return drift_page(CONTENT_GATES, drifts, catalog.config.checks.accepted_drift)


@dataset("pairs", {"numpy"}, after=_page)
def data_profile(step: Step) -> Metrics:
    """What notes, images and pairs look like, compared with those of the releases before."""
    from notellm2_core.release.data_profile import notes_profile, related_texts

    notes, train, test = step.path("notes", NOTES_TABLE), *(step.path("pair_datasets", n) for n in (TRAIN, TEST))
    return {
        NOTES_PROFILE: notes_profile(notes, step.path("vision_features")),
        "related_texts": related_texts(notes, train, test),
    }
