"""Eq. 2 inside a Spark task, tested without Spark: Arrow batches in, Arrow batches and files out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.config.data import ScoringSettings
from notellm2_core.schema import SCORES
from spark_jobs.scoring.eq2 import Pairs
from spark_jobs.scoring.score_blocks import (
    BLOCK_METRICS,
    HISTORY_CHUNKS,
    _BlockMetrics,
    build_histories,
    merged_metrics,
    write_note_ids,
    write_scores,
)

ROWS = [  # user, note, first view, last click
    ("u", "A", 1, None),
    ("u", "B", 2, 5),
    ("v", "C", 1, 1),
    ("v", "B", 2, 9),
]
SCORED = [("A", "B", 1.0, 1), ("C", "B", 0.5, 1)]


@pytest.fixture
def note_ids(tmp_path: Path) -> Path:
    file = tmp_path / "ids.arrow"
    write_note_ids(pa.chunked_array([["C", "A"], ["B"]]), file)
    return file


def batch(rows: list[tuple[object, ...]]) -> pa.RecordBatch:
    """An Arrow batch as Spark sends it."""
    types = [pa.string(), pa.string(), pa.int64(), pa.int64()]
    names = ["user_id", "note_id", "first_view", "last_click"]
    columns = zip(*rows, strict=True)
    return pa.record_batch([pa.array(c, t) for c, t in zip(columns, types, strict=True)], names)


def written(
    chunks: list[pa.RecordBatch], note_ids: Path, out: Path, scoring: ScoringSettings
) -> list[dict[str, object]]:
    """Group the chunks by block, as Spark does, and write each block. Returns BLOCK_METRICS."""
    rows = pa.Table.from_batches(chunks, HISTORY_CHUNKS)
    blocks = sorted(set(rows["block"].to_pylist()))
    out.mkdir(exist_ok=True)
    metrics = []
    for block in blocks:
        batches = rows.filter(pa.compute.equal(rows["block"], block)).to_batches()
        metrics += write_scores(iter(batches), note_ids, out, scoring)
    return pa.Table.from_batches(metrics, BLOCK_METRICS).to_pylist()


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_from_rows_to_files(note_ids: Path, tmp_path: Path, num_blocks: int) -> None:
    """u clicked one note (N = 1), v two (N = 2); C is seen before B is clicked, and nothing is clicked after B."""
    scoring = ScoringSettings()
    chunks = [*build_histories(iter([batch(ROWS[:2])]), note_ids, num_blocks, scoring)]
    chunks += build_histories(iter([batch(ROWS[2:3]), batch(ROWS[3:])]), note_ids, num_blocks, scoring)
    metrics = merged_metrics(written(chunks, note_ids, tmp_path / "out", scoring))
    files = sorted((tmp_path / "out").iterdir())
    rows = [tuple(r.values()) for file in files for r in pq.read_table(file).to_pylist()]
    assert sorted(rows) == SCORED
    assert all(pq.read_schema(file).equals(SCORES) for file in files)
    assert metrics["pairs"] == metrics["queries"] == 2 and metrics["max_users"] == 1
    assert metrics["score"]["max"] == 1.0 and metrics["capped_users"] == 0

    # A task that runs again writes the same bytes over its file.
    before = {file.name: file.read_bytes() for file in files}
    written(chunks[::-1], note_ids, tmp_path / "out", scoring)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_no_rows_make_no_file(note_ids: Path, tmp_path: Path) -> None:
    assert not [*build_histories(iter([]), note_ids, 2, ScoringSettings())]
    assert not [*write_scores(iter([]), note_ids, tmp_path, ScoringSettings())]
    views = [batch([("u", "A", 1, None), ("u", "B", 2, None)])]
    for scoring in (ScoringSettings(), ScoringSettings(score="swing")):
        metrics = written([*build_histories(iter(views), note_ids, 2, scoring)], note_ids, tmp_path / "out", scoring)
        assert not [*(tmp_path / "out").iterdir()]
        assert merged_metrics(metrics)["pairs"] == 0 and merged_metrics(metrics)["score"]["max"] is None


def test_a_cap_is_counted(note_ids: Path, tmp_path: Path) -> None:
    """The note that u and v viewed last, and clicked last, is B, so B is left. u (N = 1) loses the view of A; v (N = 2)
    loses the view of C and the click on it. For any users, no score loses more than 1 (A's) + 1/2 (C's).
    """
    scoring = ScoringSettings(max_user_notes=1)
    metrics = merged_metrics(
        written([*build_histories(iter([batch(ROWS)]), note_ids, 1, scoring)], note_ids, tmp_path / "out", scoring)
    )
    assert metrics["capped_users"] == 2 and metrics["max_loss"] == pytest.approx(1.5)


scores = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60)


@settings(max_examples=50)
@given(blocks=st.lists(scores, min_size=1, max_size=4))
def test_merged_metrics(blocks: list[list[float]]) -> None:
    """In any split into blocks, quantiles are real scores rounded down to 1 %, and the histogram counts every pair."""
    rows = []
    for block in blocks:
        metrics, number = _BlockMetrics(), np.arange(len(block))
        metrics.add(Pairs(number, number, np.array(block), number + 1))
        rows.append(dict(zip(BLOCK_METRICS.names, (*metrics.row(), 0, 0.0, 0.0, 0.0), strict=True)))
    merged = merged_metrics(rows)
    ordered = sorted(score for block in blocks for score in block)
    assert merged["pairs"] == len(ordered) and merged["max_users"] == max(map(len, blocks))
    assert merged["score"]["max"] == ordered[-1]
    for name, share in (("min", 0), ("p50", 0.5), ("p90", 0.9)):
        exact = ordered[max(0, int(np.ceil(share * len(ordered))) - 1)]
        assert exact * 0.99 <= merged["score"][name] <= exact
    edges, pairs = merged["histogram"]["edges"], merged["histogram"]["pairs"]
    assert edges[0] <= ordered[0] and ordered[-1] < edges[-1]
    assert pairs == np.histogram(ordered, edges)[0].tolist()
