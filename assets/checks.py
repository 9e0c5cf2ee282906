"""Blocking asset checks: a dataset that fails one stops the run before its downstream assets.

What is wrong with data stops a run early. What is wrong with a trained model must not hide how good it is: such a check
is judged last, on `eval_recall`. The run then fails, so nothing is released, but the table is there.
"""

from collections.abc import Callable
from math import isfinite

import dagster as dg

from assets.resources.pipeline import Pipeline, user_errors
from assets.resources.steps import Metrics
from notellm2_core.check.verdicts import Verdict, dropped_share, undated_share, unusable_images
from notellm2_core.config.data import CheckSettings


def no_leakage(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """Every count of the leakage report is zero."""
    return not any(metrics["leakage"].values()), dict(metrics["leakage"])


def enough_pairs(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """There are enough training pairs to learn from, and enough test pairs to measure with."""
    train, test = metrics["train"]["pairs"], metrics["test"]["pairs"]
    passed = train >= limits.min_train_pairs and test >= limits.min_test_pairs
    return passed, {
        "train_pairs": train,
        "test_pairs": test,
        "checks.min_train_pairs": limits.min_train_pairs,
        "checks.min_test_pairs": limits.min_test_pairs,
    }


def finite_loss(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The last training loss is finite."""
    return isfinite(metrics["loss_last"]), {"loss": metrics["loss_last"]}


def not_collapsed(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The embeddings have not collapsed: the mean cosine of random pairs is within the limit."""
    cosine = metrics["mean_cosine"]["multimodal"]
    return cosine <= limits.max_mean_cosine, {"mean_cosine": cosine, "checks.max_mean_cosine": limits.max_mean_cosine}


def has_learned(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The model knows more than before its training: its loss fell below that of chance, or its validation recall rose.

    `training.centre_embeddings` keeps the mean cosine near 0 for a model that has learned nothing, too.
    """
    warning = metrics.get("warning")
    return warning is None, {} if warning is None else {"warning": warning}


def index_recall(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The index finds the share of the exact nearest notes that index.target_recall asks for, at index.search_k."""
    target, recall = 100 * metrics["target_recall"], metrics["recall"].get(str(metrics["search_k"]))
    return recall is None or recall >= target, {
        "recall": recall,
        "index.search_k": metrics["search_k"],
        "index.target_recall": metrics["target_recall"],
        "index.factory": metrics["factory"],
    }


def _check(
    asset: str, judge: Callable[[Metrics, CheckSettings], Verdict], measured_on: str = ""
) -> dg.AssetChecksDefinition:
    """A check that stops the run after `asset`. `measured_on`: the dataset whose metrics it judges; "": `asset`."""

    @dg.asset_check(asset=asset, name=judge.__name__, description=judge.__doc__, blocking=True)
    def check(pipeline: Pipeline) -> dg.AssetCheckResult:
        catalog = pipeline.catalog()
        with user_errors():
            passed, metadata = judge(catalog.dataset(measured_on or asset).manifest.metrics, catalog.config.checks)
        return dg.AssetCheckResult(passed=bool(passed), severity=dg.AssetCheckSeverity.ERROR, metadata=metadata)

    return check


CHECKS = [
    _check("raw_events", undated_share),
    _check("notes", dropped_share),
    _check("interactions", dropped_share),
    _check("vision_features", unusable_images),
    _check("pair_datasets", no_leakage),
    _check("pair_datasets", enough_pairs),
    _check("checkpoint", finite_loss),
    _check("eval_recall", has_learned, measured_on="checkpoint"),
    _check("eval_recall", not_collapsed, measured_on="note_embeddings"),
    _check("eval_recall", index_recall, measured_on="faiss_index"),
]
