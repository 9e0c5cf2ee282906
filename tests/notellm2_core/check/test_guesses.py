"""Guesses at names, forms and files of others."""

from pathlib import Path

import pytest

from notellm2_core.check import guesses


@pytest.mark.parametrize(
    ("column", "names", "expected"),
    [
        ("note_id", ["visitorid", "itemid", "event"], "itemid"),  # RetailRocket
        ("user_id", ["reviewerID", "asin", "overall"], "reviewerID"),  # Amazon
        ("note_id", ["reviewerID", "asin", "parent_asin"], "parent_asin"),
        ("timestamp", ["customer_id", "t_dat", "price"], "t_dat"),  # H&M
        ("event", ["user_id", "item_id", "behavior_type"], "behavior_type"),
        ("topics", ["price"], None),
    ],
)
def test_columns(column: str, names: list[str], expected: str | None) -> None:
    assert guesses.column_for(column, names) == expected


def test_clicks_and_ratings() -> None:
    """4 and 5 have 55 of 100 rows, 3 to 5 have 80: a click is at least 4."""
    assert guesses.click_names({"pv": 90, "buy": 2, "cart": 5}) == ["buy", "cart"]
    assert guesses.click_names({"a": 9, "b": 2}) == ["b"] and guesses.click_names({"buy": 1}) == ["buy"]
    assert guesses.rating_of_a_click({"1": 5, "2": 15, "3": 25, "4": 30, "5.0": 25}) == 4
    assert guesses.rating_of_a_click({"1": 5, "view": 9, "2": 1}) is guesses.rating_of_a_click({"0": 1, "1": 1}) is None


def test_times() -> None:
    """One day above 12 tells days from months."""
    assert guesses.time_format(["03/04/2024 10:00", "13/04/2024 10:00"]) == "%d/%m/%Y %H:%M"
    assert guesses.time_format(["03/04/2024 10:00", "04/13/2024 10:00"]) == "%m/%d/%Y %H:%M"
    assert guesses.time_format(["04/13/2024 10:00:00 PM"]) == "%m/%d/%Y %I:%M:%S %p"
    assert guesses.time_format(["tomorrow"]) is None


def test_ids() -> None:
    assert guesses.same_ids(["007", "010"], ["7", "10"]) == ("without leading zeros", "007", "7")
    assert guesses.same_ids(["7.0"], ["7"]) == ("without .0 at the end", "7.0", "7")
    assert guesses.same_ids(["AB1"], ["ab1"]) == ("without regard to case", "AB1", "ab1")
    assert guesses.same_ids(["item-12"], ["12"]) == ("by their digits alone", "item-12", "12")
    assert guesses.same_ids(["7", "8", "9"], ["70", "80", "9"]) is None


def test_image_files(tmp_path: Path) -> None:
    (tmp_path / "covers").mkdir()
    for i in range(3):
        (tmp_path / "covers" / f"{i}.jpg").touch()
    assert guesses.image_pattern(tmp_path, "id", ["0", "2"]) == "covers/{id}.jpg"
    assert guesses.image_pattern(tmp_path, "file", ["0.jpg"]) == "covers/{file}"
    assert guesses.image_pattern(tmp_path, "id", ["0", "3", "a\0"]) is None
