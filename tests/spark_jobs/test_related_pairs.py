import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core import schema
from spark_jobs import related_pairs as job
from spark_jobs.related_pairs import Filters, corrected, relate, same_side, strongest, within_bounds
from spark_jobs.tables import write_table
from tests.spark_jobs.conftest import SCORES, SIDES, Frame, rows_of

OPEN: dict[str, Any] = {
    "low": 0.0, "up": 1e9, "bounds": "absolute", "top_t": 99, "popularity_power": 0.0, "min_users": 1,
}  # fmt: skip
PAIRS = [("q", "a", 4.0, 4), ("q", "b", 2.0, 3), ("q", "c", 2.0, 2), ("q", "d", 1.0, 2), ("r", "a", 1.0, 1)]


def related(frame: Frame, rows: list[Any] = PAIRS, **changes: Any) -> list[tuple[Any, ...]]:
    clicks = changes.pop("target_clicks", None)
    of = Filters(**{**OPEN, **changes})
    candidates = corrected(frame(SCORES, rows), clicks, of.popularity_power, of.min_users)
    pairs = strongest(within_bounds(candidates, of.low, of.up, of.bounds), of.top_t)
    return rows_of(pairs, "query_id", "target_id", "score", "rank")


def test_top_t_breaks_ties_by_target_id(frame: Frame) -> None:
    assert related(frame, PAIRS[::-1], top_t=2) == [("q", "a", 4.0, 1), ("q", "b", 2.0, 2), ("r", "a", 1.0, 1)]


def test_bounds_are_inclusive(frame: Frame) -> None:
    assert [r[1] for r in related(frame, low=1.0, up=2.0)] == ["b", "c", "d", "a"]
    assert [r[1] for r in related(frame, low=1.0000001, up=3.9999)] == ["b", "c"]


def test_bounds_as_quantiles(frame: Frame) -> None:
    """The scores are 1, 1, 2, 2, 4: their median is 2 and their maximum 4; the lowest quarter ends at 1."""
    assert [r[1] for r in related(frame, low=0.5, up=1.0, bounds="quantile")] == ["a", "b", "c"]
    assert [r[1] for r in related(frame, low=0.0, up=0.25, bounds="quantile")] == ["d", "a"]
    assert len(related(frame, low=0.0, up=1.0, bounds="quantile")) == 5


def test_filters_come_before_top_t_and_the_correction_before_the_bounds(frame: Frame) -> None:
    """With power 1/2 the score of a (4 clicks) is 4 / 2 = 2, of b (16 clicks) 2 / 4 = 0.5, of c (1 click) 2."""
    clicks = frame("note_id string, num_users bigint", [("a", 4), ("b", 16), ("c", 1), ("d", 1)])
    kept = related(frame, target_clicks=clicks, popularity_power=0.5, low=1.0, up=2.0, top_t=1, min_users=2)
    assert kept == [("q", "a", 2.0, 1)]
    assert [r[1] for r in related(frame, min_users=3)] == ["a", "b"]
    with pytest.raises(ValueError, match="pairs.popularity_power = 0.5 needs the clicks"):
        related(frame, popularity_power=0.5)


def test_pairs_across_sides_are_left_out(frame: Frame) -> None:
    sides = frame(SIDES, [("q", "train", "q"), ("b", "train", "b"), ("a", "pool", "a"), ("r", "pool", "r")])
    kept = rows_of(same_side(frame(SCORES, PAIRS), sides), "query_id", "target_id", "score", "num_users")
    assert kept == [("q", "b", 2.0, 3), ("r", "a", 1.0, 1)]


@pytest.fixture
def scored(frame: Frame, tmp_path: Path) -> Path:
    """Scores of both windows, and the sides of their notes: q, a, b, c train; r, s, t are the pool."""
    clicks = frame("note_id string, num_users bigint", [(n, 2) for n in "abcdst"])
    train, test = [*PAIRS, ("r", "s", 8.0, 9)], [("r", "s", 3.0, 3), ("r", "t", 1.0, 1), ("q", "a", 9.0, 9)]
    for window, rows in (("train", train), ("test", test)):
        write_table(frame(SCORES, rows), tmp_path / "scores" / window, ["query_id"])
        write_table(clicks, tmp_path / "scores" / f"{window}_clicks", ["note_id"])
    sides = [(n, "train", n) for n in "qabc"] + [(n, "pool", n) for n in "rst"]
    write_table(frame(SIDES, sides), tmp_path / "sides", ["note_id"])
    return tmp_path


def test_relate_counts_every_filter(spark: SparkSession, scored: Path) -> None:
    filters = Filters(low=0.75, up=9.0, bounds="absolute", top_t=1, popularity_power=1.0, min_users=2)
    counts = relate(spark, scored / "scores", scored / "sides", scored / "out", filters)
    train = counts["train"]
    assert [train[k] for k in ("pairs_on_side", "pairs_with_min_users", "pairs_within_bounds", "pairs")] == [3, 3, 3, 1]
    assert (train["queries"], train["notes"], train["score"]["max"]) == (1, 2, 2.0)
    assert (counts["test"]["pairs_on_side"], counts["test"]["pairs_with_min_users"]) == (2, 1)
    table = pq.read_table(scored / "out" / "test")
    assert table.to_pylist() == [{"query_id": "r", "target_id": "s", "score": 1.5, "num_users": 3, "rank": 1}]
    assert [(f.name, f.type) for f in table.schema] == [(f.name, f.type) for f in schema.RELATED_PAIRS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 50.0, "up": 60.0}, r"train: no score lies in \[pairs.low, pairs.up\].*reach from 2 to 4"),
        ({"min_users": 5}, r"train: no pair has pairs.min_users = 5 users \(the most is 4\)"),
    ],
)
def test_no_pair_left_names_the_setting(
    spark: SparkSession, scored: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relate(spark, scored / "scores", scored / "sides", scored / "out", Filters(**{**OPEN, **change}))


def test_a_pool_without_pairs_names_the_setting(spark: SparkSession, frame: Frame, scored: Path) -> None:
    sides = [(n, "train", n) for n in "qabcst"] + [("r", "pool", "r")]
    write_table(frame(SIDES, sides), scored / "one", ["note_id"])
    with pytest.raises(
        ValueError, match=r"^test: no pair has both notes on the side pool; set window\.test_days, split"
    ):
        relate(spark, scored / "scores", scored / "one", scored / "out", Filters(**OPEN))


def test_command(
    spark: SparkSession, scored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "spark_session", lambda name: spark)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["related_pairs", *map(str, arguments)])
        job.main()

    paths = ("--scores", scored / "scores" / "train", "--out", scored / "out")
    for _ in range(2):  # its own result may be overwritten
        run(*paths, "--low", 2, "--up", 30, "--top-t", 3, "--min-users", 2)
        assert json.loads(capsys.readouterr().out)["pairs"] == 4
    assert pq.read_table(scored / "out")["rank"].to_pylist() == [1, 2, 3, 1]
    for arguments, message in (
        (("--low", 3, "--up", 2, "--top-t", 3), "need --low <= --up"),
        (("--low", 0, "--up", 2, "--top-t", 3, "--bounds", "quantile"), "shares in [0, 1]"),
    ):
        with pytest.raises(SystemExit):
            run(*paths, *arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--scores", scored / "sides", "--out", scored / "x", "--low", 0, "--up", 1, "--top-t", 1)
    assert "lacks the column query_id" in capsys.readouterr().err
