"""A file of scores inside a Spark task, tested without Spark."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.schema import NOTE_SPLIT, SCORES, TARGET_CLICKS
from spark_jobs.common.tables import BadInput
from spark_jobs.scoring.filter_files import CandidateFilter, score_files
from spark_jobs.scoring.quantiles import bins

PAIRS = [("q", "a", 4.0, 4), ("q", "b", 2.0, 3), ("q", "c", 2.0, 2), ("r", "a", 1.0, 1)]


def write_rows(file: Path, schema: pa.Schema, rows: Sequence[Sequence[Any]], row_group_size: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(schema)]
    pq.write_table(pa.table(columns, schema=schema), file, row_group_size=row_group_size)
    return file


def write_scores(file: Path, rows: Sequence[Sequence[Any]], row_group_size: int = 2) -> Path:
    return write_rows(file, SCORES, rows, row_group_size)


def test_counts(tmp_path: Path) -> None:
    """r is in the pool. Three pairs are left, and two of them have more than two users."""
    file = write_scores(tmp_path / "scores.parquet", PAIRS)
    splits = [("q", "train", "q", True), *((n, "train", n, True) for n in "abc"), ("r", "pool", "r", True)]
    write_rows(tmp_path / "split" / "x.parquet", NOTE_SPLIT, splits)
    candidates = CandidateFilter(tmp_path / "split", "train", min_users=3)
    [counts] = [batch.to_pylist() for batch in candidates.count(file)]
    score_bins = bins(np.array([2.0, 4.0])).tolist()
    assert counts == [{"pairs_on_side": 3, "most_users": 4, "bins": score_bins, "counts": [1, 1]}]
    values = [batch.to_pydict() for batch in candidates.values(file, np.array(score_bins[:1]))]
    assert values == [{"value": [2.0], "count": [1]}, {"value": [], "count": []}]  # of two row groups


def test_a_target_that_nobody_clicked_is_no_candidate(tmp_path: Path) -> None:
    file = write_scores(tmp_path / "scores.parquet", PAIRS)
    write_rows(tmp_path / "clicks" / "x.parquet", TARGET_CLICKS, [("b", 4), ("c", 2)])
    with pytest.raises(ValueError, match=r"popularity_power = 1.0 needs the clicks"):
        CandidateFilter(popularity_power=1.0)
    candidates = CandidateFilter(clicks=tmp_path / "clicks", popularity_power=1.0)
    rows = [row for batch in candidates.strongest(file, 0.0, 9.0, 9) for row in batch.to_pylist()]
    assert [(r["target_id"], r["score"]) for r in rows] == [("b", 0.5), ("c", 1.0)]


ids = st.sampled_from(["a", "B", "ä", "zz", "z", "7"])
rows = st.dictionaries(st.tuples(ids, ids), st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=30)


@settings(max_examples=50)
@given(
    pairs=rows, row_group_size=st.integers(1, 9), low=st.integers(0, 3), more=st.integers(0, 3), top_t=st.integers(1, 3)
)
def test_strongest_of_each_row_group(
    pairs: dict[tuple[str, str], tuple[int, int]], row_group_size: int, low: int, more: int, top_t: int
) -> None:
    """The result is that of sorted(). Ids are ordered by their bytes, whichever order they have in the file."""
    table = [(*pair, float(score), users) for pair, (score, users) in pairs.items()]
    with TemporaryDirectory() as folder:
        file = write_scores(Path(folder) / "scores.parquet", table, row_group_size)
        actual = [b.to_pylist() for b in CandidateFilter(min_users=2).strongest(file, low, low + more, top_t)]
    expected, within = [], []
    for start in range(0, len(table), row_group_size):
        group = [r for r in table[start : start + row_group_size] if r[3] >= 2 and low <= r[2] <= low + more]
        group.sort(key=lambda r: (r[0].encode(), -r[2], r[1].encode()))
        expected += [r for i, r in enumerate(group) if sum(other[0] == r[0] for other in group[:i]) < top_t]
        within.append(len(group))
    assert sorted(tuple(r.values())[:4] for batch in actual for r in batch) == sorted(expected)
    assert [sum(r["chosen_from"] for r in batch) for batch in actual] == within


def test_score_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scores does not exist"):
        score_files(tmp_path / "scores")
    file = write_scores(tmp_path / "scores" / "b.parquet", PAIRS)
    (file.parent / ".b.parquet.draft").touch()
    assert score_files(file.parent) == [file]
    part = write_scores(tmp_path / "scores" / "more" / "c.parquet", PAIRS)
    assert score_files(file.parent) == [file, part]
    for content, message in (
        (pa.table({"query_id": ["a"], "target_id": ["b"]}), "a.parquet lacks the column score; it has query_id, t"),
        (pa.table({"query_id": [1]}), "a.parquet: the column query_id has type int64, not string"),
    ):
        pq.write_table(content, file.parent / "a.parquet")
        with pytest.raises(ValueError, match=message):
            score_files(file.parent)
    columns = [pa.array([], field.type) for field in SCORES]
    pq.write_table(pa.table([*columns, columns[2]], [*SCORES.names, "score"]), file.parent / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has more than one column score"):
        score_files(file.parent)
    (file.parent / "a.parquet").unlink()
    (file.parent / "a.text").touch()
    with pytest.raises(ValueError, match="a.text is damaged, or no Parquet"):
        score_files(file.parent)
    (file.parent / "a.parquet").write_text("")
    with pytest.raises(ValueError, match="a.parquet is damaged"):
        score_files(file.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no Parquet files"):
        score_files(tmp_path / "empty")


def test_other_types_of_the_same_columns_are_read(tmp_path: Path) -> None:
    columns = ["q", "q"], ["ä", "b"], [2, 1], [1, 2]
    kinds = pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.float32(), pa.int16()
    table = pa.table([pa.array(c, k) for c, k in zip(columns, kinds, strict=True)], SCORES.names)
    pq.write_table(table.append_column("more", pa.array([1, 2])), file := tmp_path / "scores.parquet")
    assert score_files(file) == [file]
    [batch] = CandidateFilter().strongest(file, 0.0, 9.0, 9)
    assert [tuple(row.values()) for row in batch.to_pylist()] == [("q", "ä", 2.0, 1, 2), ("q", "b", 1.0, 2, 0)]


NULLABLE = pa.schema([field.with_nullable(True) for field in SCORES])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((None, "a", 1.0, 1), "scores.parquet holds nulls in the column query_id"),
        (("q", "a", float("nan"), 1), "scores.parquet holds scores that are infinite or NaN"),
        (("q", "a", float("inf"), 1), "scores.parquet holds scores that are infinite or NaN"),
    ],
)
def test_invalid_scores_are_refused(tmp_path: Path, row: tuple[Any, ...], message: str) -> None:
    file = write_rows(tmp_path / "scores.parquet", NULLABLE, [*PAIRS, row])
    with pytest.raises(BadInput, match=message):
        list(CandidateFilter().count(file))


def test_one_row_group_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_scores(tmp_path / "scores.parquet", PAIRS, row_group_size=1)
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, i: int, *more: Any, **options: Any) -> pa.Table:
        read.append(i)
        return whole(self, i, *more, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    batches = CandidateFilter().strongest(file, 0.0, 9.0, 9)
    for number in range(len(PAIRS)):
        assert next(batches).num_rows == 1 and read == list(range(number + 1))


def test_a_damaged_page_and_a_file_that_is_gone(tmp_path: Path) -> None:
    file = damage(write_scores(tmp_path / "scores.parquet", PAIRS * 500, row_group_size=3000))
    assert score_files(file) == [file]  # its footer is whole
    with pytest.raises(BadInput, match=r"scores.parquet is damaged"):
        list(CandidateFilter().count(file))
    file.unlink()
    with pytest.raises(BadInput, match=r"not all workers see .*scores.parquet; name a folder that they share"):
        list(CandidateFilter().count(file))


def damage(file: Path) -> Path:
    """Overwrite the bytes of the first page of `file`."""
    content = bytearray(file.read_bytes())
    content[8:60] = b"\xff" * 52
    file.write_bytes(content)
    return file
