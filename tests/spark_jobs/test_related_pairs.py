import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core import schema
from notellm2_core.config.data import FilterSettings
from spark_jobs import related_pairs as job
from spark_jobs.related_pairs import ScoredWindow, relate, related_pairs
from tests.spark_jobs.scoring.test_filter_files import damage, write_rows, write_scores

OPEN: dict[str, Any] = {"low": 0.0, "up": 1e9, "top_t": 99}
PAIRS = [("q", "a", 4.0, 4), ("q", "b", 2.0, 3), ("q", "c", 2.0, 2), ("q", "d", 1.0, 2), ("r", "a", 1.0, 1)]

Related = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def related(spark: SparkSession, tmp_path: Path) -> Related:
    """A function that returns the related pairs of PAIRS, or of other `rows`: query, target, score and rank.

    The scores are in two files.
    """

    def run(rows: list[Any] = PAIRS, clicks: Path | None = None, **changes: Any) -> list[tuple[Any, ...]]:
        shutil.rmtree(tmp_path / "related", ignore_errors=True)
        for i, part in enumerate((rows[::2], rows[1::2])):
            write_scores(tmp_path / "related" / "scores" / f"{i}.parquet", part)
        filters = FilterSettings(**{**OPEN, **changes})
        out = tmp_path / "related" / "out"
        related_pairs(spark, tmp_path / "related" / "scores", out, filters, ScoredWindow("x", clicks=clicks))
        columns = pq.read_table(out).select(["query_id", "target_id", "score", "rank"]).to_pydict()
        return list(zip(*columns.values(), strict=True))

    return run


def test_top_t_breaks_ties_by_target_id(related: Related) -> None:
    assert related(PAIRS[::-1], top_t=2) == [("q", "a", 4.0, 1), ("q", "b", 2.0, 2), ("r", "a", 1.0, 1)]


def test_bounds_are_inclusive(related: Related) -> None:
    assert [r[1] for r in related(low=1.0, up=2.0)] == ["b", "c", "d", "a"]
    assert [r[1] for r in related(low=1.0000001, up=3.9999)] == ["b", "c"]


def test_bounds_as_quantiles(related: Related) -> None:
    """The scores are 1, 1, 2, 2, 4: their median is 2 and their maximum 4; the lowest quarter ends at 1."""
    assert [r[1] for r in related(low=0.5, up=1.0, bounds="quantile")] == ["a", "b", "c"]
    assert [r[1] for r in related(low=0.0, up=0.25, bounds="quantile")] == ["d", "a"]
    assert len(related(low=0.0, up=1.0, bounds="quantile")) == 5


def test_filters_come_before_top_t_and_the_correction_before_the_bounds(related: Related, tmp_path: Path) -> None:
    """With power 1/2 the score of a (4 clicks) is 4 / 2 = 2, of b (16 clicks) 2 / 4 = 0.5, of c (1 click) 2."""
    clicks = pa.table({"note_id": ["a", "b", "c", "d"], "num_users": [4, 16, 1, 1]})
    (tmp_path / "clicks").mkdir()
    pq.write_table(clicks, tmp_path / "clicks" / "part-00000.parquet")
    corrected = {"clicks": tmp_path / "clicks", "popularity_power": 0.5, "min_users": 2}
    assert related(**corrected, low=1.0, up=2.0, top_t=1) == [("q", "a", 2.0, 1)]
    assert [r[1] for r in related(min_users=3)] == ["a", "b"]


def test_the_same_pair_twice_is_refused(related: Related) -> None:
    with pytest.raises(ValueError, match="holds the same pair more than once"):
        related([*PAIRS, PAIRS[0]])


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Scores of both windows, and the split of their notes: q, a, b, c are for training; r, s, t are the pool."""
    train, test = [*PAIRS, ("r", "s", 8.0, 9)], [("r", "s", 3.0, 3), ("r", "t", 1.0, 1), ("q", "a", 9.0, 9)]
    for window, rows in (("train", train), ("test", test)):
        write_scores(tmp_path / "scores" / window / "part-00000.parquet", rows)
        clicks = tmp_path / "scores" / f"{window}_clicks" / "part-00000.parquet"
        write_rows(clicks, schema.TARGET_CLICKS, [(n, 2) for n in "abcdst"])
    write_split(tmp_path / "split", "qabc", "rst")
    return tmp_path


def write_split(folder: Path, train: str, pool: str) -> None:
    rows = [(n, split, n, split == "train") for split, notes in (("train", train), ("pool", pool)) for n in notes]
    write_rows(folder / "part-00000.parquet", schema.NOTE_SPLIT, rows)


def test_relate_counts_every_filter(spark: SparkSession, scored: Path) -> None:
    filters = FilterSettings(low=0.75, up=9.0, bounds="absolute", top_t=1, popularity_power=1.0, min_users=2)
    counts = relate(spark, scored / "scores", scored / "split", scored / "out", filters)
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
        (
            {"low": 50.0, "up": 60.0},
            r"train: no score lies in \[pairs.low, pairs.up\] \(--low, --up\).*reach from 2 to 4",
        ),
        ({"min_users": 5}, r"train: no pair has pairs.min_users \(--min-users\) = 5 users \(the most is 4\)"),
    ],
)
def test_no_pair_left_names_the_setting(
    spark: SparkSession, scored: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relate(spark, scored / "scores", scored / "split", scored / "out", FilterSettings(**{**OPEN, **change}))


def test_a_pool_without_pairs_names_the_setting(spark: SparkSession, scored: Path) -> None:
    write_split(scored / "one", "qabcst", "r")
    with pytest.raises(
        ValueError, match=r"^test: no pair has both notes in the candidate pool; set window\.test_days, split"
    ):
        relate(spark, scored / "scores", scored / "one", scored / "out", FilterSettings(**OPEN))


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
        (("--low", 3, "--up", 2, "--top-t", 3), "error: low = 3.0 is above up = 2.0"),
        (("--low", "nan", "--up", 2, "--top-t", 3), "error: low = nan and up = 2.0 have to be numbers"),
        (("--low", 1, "--up", 2, "--top-t", 3, "--min-users", -5), "--min-users: -5: Input should be greater than 0"),
        (("--low", 0, "--up", 2, "--top-t", 3, "--bounds", "quantile"), "shares in [0, 1]"),
    ):
        with pytest.raises(SystemExit):
            run(*paths, *arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--scores", scored / "split", "--out", scored / "x", "--low", 0, "--up", 1, "--top-t", 1)
    assert "part-00000.parquet lacks the column query_id" in capsys.readouterr().err
    before = (scored / "out" / "part-00000.parquet").read_bytes()
    damage(write_scores(scored / "scores" / "train" / "part-00001.parquet", PAIRS * 500, row_group_size=3000))
    with pytest.raises(SystemExit):
        run(*paths, "--low", 2, "--up", 30, "--top-t", 3)
    file = scored / "scores" / "train" / "part-00001.parquet"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {file} is damaged."
    assert (scored / "out" / "part-00000.parquet").read_bytes() == before
