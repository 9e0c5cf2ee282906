from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from spark_jobs.common.tables import read_table, readable, replacing, top_counts, write_table
from tests.spark_jobs.conftest import SCORES, Frame
from tests.spark_jobs.scoring.test_filter_files import damage


def test_the_same_rows_in_another_order_make_the_same_bytes(frame: Frame, tmp_path: Path) -> None:
    rows = [(f"n{i % 7}", f"n{i}", i / 3, i) for i in range(50)]
    write_table(frame(SCORES, rows), tmp_path / "a", ["query_id", "target_id"], 3)
    write_table(frame(SCORES, rows[::-1]).repartition(5), tmp_path / "b", ["query_id", "target_id"], 3)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]


def test_a_table_has_num_files_files_even_after_a_join(spark: SparkSession, frame: Frame, tmp_path: Path) -> None:
    """A join has partitioned its rows by its column already. Spark would skip a repartition by that column, and merge
    small partitions.
    """
    rows = [(f"n{i}", f"n{i}", i / 3, i) for i in range(50)]
    joined = frame(SCORES, rows).hint("shuffle_hash").join(frame(SCORES, rows).select("query_id"), "query_id")
    write_table(joined, tmp_path / "a", ["query_id"], 3)
    assert len(list((tmp_path / "a").iterdir())) == 3 and spark.conf.get("spark.sql.adaptive.enabled") == "true"


def test_an_empty_table_keeps_its_columns(spark: SparkSession, frame: Frame, tmp_path: Path) -> None:
    write_table(frame(SCORES, []), tmp_path / "a", ["query_id"])
    assert read_table(spark, tmp_path / "a").columns == ["query_id", "target_id", "score", "num_users"]


def test_a_missing_or_damaged_table_is_named(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_table(spark, tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match="bad is damaged"):
        read_table(spark, tmp_path / "bad")
    table = pa.table({"note_id": [f"n{i}" for i in range(9999)]})
    (tmp_path / "pages").mkdir()
    for name in ("good", "not good"):
        pq.write_table(table, tmp_path / "pages" / f"{name}.parquet")
    damage(tmp_path / "pages" / "not good.parquet")
    with pytest.raises(ValueError, match=r"pages/not good\.parquet is damaged"), readable(tmp_path / "pages"):
        read_table(spark, tmp_path / "pages").distinct().count()
    with pytest.raises(ZeroDivisionError), readable("x"):  # other errors pass
        _ = 1 / 0


def test_replacing_replaces_only_a_previous_result(tmp_path: Path) -> None:
    out, log, part = tmp_path / "deep" / "out", tmp_path / "log", "part-00000.parquet"
    for number in (1, 2):
        with replacing(out, log, ["a"]) as new:
            new.mkdir()
            pq.write_table(pa.table({"a": [number]}), new / part)
    assert pq.read_table(out / part)["a"].to_pylist() == [2]

    link = tmp_path / "link"
    link.symlink_to(out)
    with replacing(link, log, ["a"]) as new:  # its target is replaced
        new.mkdir()
        pq.write_table(pa.table({"a": [2]}), new / part)
    assert link.is_symlink() and [p.name for p in out.iterdir()] == [part]

    with pytest.raises(ZeroDivisionError), replacing(out, log, ["a"]) as new:
        new.write_text(str(1 / 0))
    assert pq.read_table(out / part)["a"].to_pylist() == [2]
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    def refuses(folder: Path, source: Path, columns: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message), replacing(folder, source, columns):
            pass
        assert pq.read_table(out / part)["a"].to_pylist() == [2]

    refuses(out, log, ["b"], "part-00000.parquet, which is no result of this command")  # another command's table
    refuses(out, out / part, ["a"], "holds the input")
    refuses(out.parent, out, ["a"], "holds the input")
    (out / "thesis.tex").touch()
    refuses(out, log, ["a"], r"thesis\.tex, which is no result of this command")
    refuses(out / "thesis.tex", log, ["a"], "is a file")


def test_top_counts_names_the_most_frequent_values(frame: Frame) -> None:
    """a occurs three times, null twice, b and c once: b comes first."""
    df = frame("event string", [(e,) for e in ["c", "a", None, "a", "b", "a", None]])
    assert top_counts(df, "event", 2) == {"a": 3, "": 2, "(others)": 2}
    assert list(top_counts(df, "event", 4).items()) == [("a", 3), ("", 2), ("b", 1), ("c", 1)]
