"""Blocking checks: a dataset that fails one stops the run before anything is built on it."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import dagster as dg

from assets.resources.pipeline import Pipeline, user_errors
from notellm2_core.config.data import CheckSettings

Figures = Mapping[str, Any]
Verdict = tuple[bool, dict[str, Any]]


def dropped_share(figures: Figures, limits: CheckSettings) -> Verdict:
    """Not more of the rows than allowed lie in quarantine.

    Exact duplicates of an event are harmless; rows without a readable time are judged where the log is ingested.
    """
    harmless = ("duplicate_event", "malformed_row", "bad_timestamp", "absurd_timestamp")
    dropped = sum(rows for reason, rows in figures["dropped"].items() if reason not in harmless)
    unjudged = sum(figures["dropped"].get(reason, 0) for reason in harmless)
    read = figures["rows"] - figures.get("ignored_event", 0) - unjudged
    share = dropped / read if read else 0.0
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in figures["dropped"].items())
    return share <= limits.max_dropped_share, {
        "dropped_share": share,
        "checks.max_dropped_share": limits.max_dropped_share,
        "dropped": reasons or "nothing",
    }


def undated_share(figures: Figures, limits: CheckSettings) -> Verdict:
    """Not more than allowed can be placed nowhere in time, of the whole log and of any of its files."""
    share = max(figures["undated"] / figures["rows"], figures["most_undated"]["share"])
    return share <= limits.max_dropped_share, {
        "undated_share": share,
        "file": figures["most_undated"]["file"],
        "checks.max_dropped_share": limits.max_dropped_share,
    }


def unusable_images(figures: Figures, limits: CheckSettings) -> Verdict:
    """Not more of the named images than allowed are absent, broken, too large or outside the source."""
    unusable = {status: figures[status] for status in ("not_found", "broken", "too_large", "escapes")}
    named = figures["notes"] - figures["missing"]
    share = sum(unusable.values()) / named if named else 0.0
    return share <= limits.max_dropped_share, {
        "image_path in notes.parquet": "relative to the source; not_found: no such file, escapes: outside the source",
        "unusable_share": share,
        "checks.max_dropped_share": limits.max_dropped_share,
        **unusable,
    }


def no_leakage(figures: Figures, limits: CheckSettings) -> Verdict:
    """Every count of the leakage report is zero."""
    return not any(figures["leakage"].values()), dict(figures["leakage"])


def enough_pairs(figures: Figures, limits: CheckSettings) -> Verdict:
    """There are enough training and test pairs to learn from and to measure with."""
    train, test = figures["train"]["pairs"], figures["test"]["pairs"]
    passed = train >= limits.min_train_pairs and test >= limits.min_test_pairs
    return passed, {
        "train_pairs": train,
        "test_pairs": test,
        "checks.min_train_pairs": limits.min_train_pairs,
        "checks.min_test_pairs": limits.min_test_pairs,
    }


def finite_loss(figures: Figures, limits: CheckSettings) -> Verdict:
    """Training ended with a finite loss."""
    return isfinite(figures["loss_last"]), {"loss": figures["loss_last"]}


def not_collapsed(figures: Figures, limits: CheckSettings) -> Verdict:
    """Random pairs of embeddings are not all alike."""
    cosine = figures["mean_cosine"]["multimodal"]
    return cosine <= limits.max_mean_cosine, {"mean_cosine": cosine, "checks.max_mean_cosine": limits.max_mean_cosine}


def _check(asset: str, judge: Callable[[Figures, CheckSettings], Verdict]) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=asset, name=judge.__name__, description=judge.__doc__, blocking=True)
    def check(pipeline: Pipeline) -> dg.AssetCheckResult:
        catalog = pipeline.catalog()
        with user_errors():
            passed, metadata = judge(catalog.dataset(asset).manifest.metrics, catalog.config.checks)
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
    _check("note_embeddings", not_collapsed),
]
