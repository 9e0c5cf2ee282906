"""The blocking checks: at which value each fails, and that the metadata names the setting and the reason."""

import pytest

from assets import checks
from notellm2_core.config.data import CheckSettings
from notellm2_core.vision.image_status import STATUSES

LIMITS = CheckSettings()


def test_dropped_share_counts_the_usable_rows() -> None:
    """Without ignored, repeated and undated rows, 100 of the 160 rows are left; 20 of them are dropped."""
    dropped = {"unknown_event": 20, "duplicate_event": 30, "bad_timestamp": 20}
    metrics = {"rows": 160, "ignored_event": 10, "dropped": dropped}
    passed, shown = checks.dropped_share(metrics, LIMITS)
    assert passed and shown["dropped_share"] == pytest.approx(0.2) and shown["checks.max_dropped_share"] == 0.2
    assert shown["dropped"] == "20 unknown_event, 30 duplicate_event, 20 bad_timestamp"
    assert not checks.dropped_share(metrics | {"ignored_event": 11}, LIMITS)[0]
    assert not checks.dropped_share({"rows": 100, "dropped": {"empty": 21}}, LIMITS)[0]
    assert checks.dropped_share({"rows": 0, "dropped": {}}, LIMITS)[0]


def test_undated_share() -> None:
    """The share is limited in the whole log, and in the worst file even if the other files are good."""

    def verdict(undated: int, worst: float) -> bool:
        metrics = {"rows": 10, "undated": undated, "most_undated": {"file": "f", "share": worst}}
        return checks.undated_share(metrics, LIMITS)[0]

    assert verdict(2, 0.2) and not verdict(2, 0.3) and not verdict(3, 0.2)


def test_unusable_images_are_measured_on_the_notes_that_name_one() -> None:
    metrics = dict.fromkeys(STATUSES, 0) | {"notes": 100, "missing": 90, "broken": 1, "escapes": 1}
    assert checks.unusable_images(metrics, LIMITS)[0]
    assert checks.unusable_images(metrics | {"truncated": 9}, LIMITS)[0]
    shown = checks.unusable_images(metrics | {"unsupported": 2}, LIMITS)[1]
    assert "2 unsupported (HEIC, which needs pip install pillow-heif)" in shown["images"]
    passed, shown = checks.unusable_images(metrics | {"escapes": 2}, LIMITS)
    assert not passed and shown["escapes"] == 2 and "checks.max_dropped_share" in shown
    assert checks.unusable_images(metrics | {"missing": 100, "broken": 0, "escapes": 0}, LIMITS)[0]
    assert not checks.unusable_images(metrics | {"missing": 0, "not_found": 100}, LIMITS)[0]  # a wrong folder name


def test_leaks_pairs_and_loss() -> None:
    assert checks.no_leakage({"leakage": {"notes": 0, "pairs": 0}}, LIMITS)[0]
    assert not checks.no_leakage({"leakage": {"notes": 0, "pairs": 1}}, LIMITS)[0]
    assert checks.enough_pairs({"train": {"pairs": 50}, "test": {"pairs": 20}}, LIMITS)[0]
    passed, shown = checks.enough_pairs({"train": {"pairs": 50}, "test": {"pairs": 19}}, LIMITS)
    assert not passed and shown["checks.min_test_pairs"] == 20
    assert not checks.finite_loss({"loss_last": float("nan")}, LIMITS)[0]
