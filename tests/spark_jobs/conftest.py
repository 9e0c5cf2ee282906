"""Helpers that make Spark's tables."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

EVENTS = "user_id string, note_id string, timestamp timestamp, event string"
WEIGHED_EVENTS = f"{EVENTS}, weight double"
SCORES = "query_id string, target_id string, score double, num_users bigint"
NOTES = "note_id string, title string, topics array<string>, content string, image_path string, image binary"
SPLITS = "note_id string, side string, group_id string"

Frame = Callable[[str, Sequence[Sequence[Any]]], DataFrame]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.spark)


@pytest.fixture(scope="session")
def frame(spark: SparkSession) -> Frame:
    return lambda schema, rows: spark.createDataFrame(list(rows), schema)


def at(seconds: float) -> datetime:
    """A time, in seconds since 2024-01-01 00:00 UTC (a Monday)."""
    return datetime.fromtimestamp(1704067200 + seconds, UTC)


def rows_of(df: DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, df.select(*columns).collect()), key=repr)
