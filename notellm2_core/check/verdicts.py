"""When data stop a run: the blocking checks of notes, log and images, from their counts."""

from collections.abc import Mapping
from typing import Any

from notellm2_core.config.data import CheckSettings
from notellm2_core.vision.image_status import UNUSABLE, described

Metrics = Mapping[str, Any]
Verdict = tuple[bool, dict[str, Any]]  # whether the data pass, and what to show


def dropped_share(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The share of quarantined rows is within the limit.

    Exact duplicates of an event are harmless; `undated_share` judges the rows without a readable time.
    """
    exempt = ("duplicate_event", "malformed_row", "bad_timestamp", "absurd_timestamp")
    num_dropped = sum(rows for reason, rows in metrics["dropped"].items() if reason not in exempt)
    num_exempt = sum(metrics["dropped"].get(reason, 0) for reason in exempt)
    num_rows = metrics["rows"] - metrics.get("ignored_event", 0) - num_exempt
    share = num_dropped / num_rows if num_rows else 0.0
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in metrics["dropped"].items())
    return share <= limits.max_dropped_share, {
        "dropped_share": share,
        "checks.max_dropped_share": limits.max_dropped_share,
        "dropped": reasons or "nothing",
    }


def undated_share(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The share of rows without a readable time is within the limit, in the whole log and in each of its files."""
    share = max(metrics["undated"] / metrics["rows"], metrics["most_undated"]["share"])
    return share <= limits.max_dropped_share, {
        "undated_share": share,
        "file": metrics["most_undated"]["file"],
        "checks.max_dropped_share": limits.max_dropped_share,
    }


def unusable_images(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The share of named images that cannot be used is within the limit. A truncated image is used."""
    unusable: Metrics = {status: metrics[status] for status in UNUSABLE}
    num_named = metrics["notes"] - metrics["missing"]
    share = sum(unusable.values()) / num_named if num_named else 0.0
    return share <= limits.max_dropped_share, {
        "images": described(metrics) or "all are used as a whole",
        "image_path": "relative to the source",
        "unusable_share": share,
        "checks.max_dropped_share": limits.max_dropped_share,
        "truncated": metrics["truncated"],
        **unusable,
    }
