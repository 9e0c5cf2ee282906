from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from spark_jobs.tables import read_table, readable, replacing, score_quantiles, write_table
from tests.spark_jobs.conftest import SCORES, Frame


def test_the_same_rows_in_another_order_make_the_same_bytes(frame: Frame, tmp_path: Path) -> None:
    rows = [(f"n{i % 7}", f"n{i}", i / 3, i) for i in range(50)]
    write_table(frame(SCORES, rows), tmp_path / "a", ["query_id", "target_id"], 3)
    write_table(frame(SCORES, rows[::-1]).repartition(5), tmp_path / "b", ["query_id", "target_id"], 3)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]


def test_an_empty_table_keeps_its_columns(spark: SparkSession, frame: Frame, tmp_path: Path) -> None:
    write_table(frame(SCORES, []), tmp_path / "a", ["query_id"])
    assert read_table(spark, tmp_path / "a").columns == ["query_id", "target_id", "score", "num_users"]
    assert set(score_quantiles(read_table(spark, tmp_path / "a")).values()) == {None}


def test_a_missing_or_damaged_table_is_named(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not there"):
        read_table(spark, tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match="bad is damaged"):
        read_table(spark, tmp_path / "bad")
    with pytest.raises(ZeroDivisionError), readable("x"):  # nothing else is touched
        _ = 1 / 0


def test_replacing_takes_the_place_of_a_former_result_only(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with replacing(out) as new:
            new.mkdir()
            (new / "part.parquet").write_text(text)
    assert (out / "part.parquet").read_text() == "second"

    with pytest.raises(ZeroDivisionError), replacing(out) as new:
        new.write_text(str(1 / 0))
    assert (out / "part.parquet").read_text() == "second"
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex, which is no Parquet file"), replacing(out):
        pass
    with pytest.raises(ValueError, match="is a file"), replacing(out / "thesis.tex"):
        pass
