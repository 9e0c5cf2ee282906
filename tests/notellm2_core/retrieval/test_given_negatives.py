"""Hard negatives of the user's own: which rows are used, in which order, and what is counted."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core import schema
from notellm2_core.retrieval.given_negatives import main, read_ids, take_over
from notellm2_core.retrieval.hard_negatives import read_hard_negatives


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Training pairs 1-2, 3-4 and 5-6, and the validation pair 7-1. 5 is a near-duplicate of 3."""
    for name, rows in (("train", [("1", "2"), ("3", "4"), ("5", "6")]), ("validation", [("7", "1")])):
        folder = tmp_path / "pairs" / name
        folder.mkdir(parents=True)
        related = [{"query_id": q, "target_id": t, "score": 1.0, "num_users": 1, "rank": 1} for q, t in rows]
        pq.write_table(pa.Table.from_pylist(related, schema=schema.RELATED_PAIRS), folder / "0.parquet")
    split = [
        {"note_id": n, "side": "train", "group_id": {"5": "3"}.get(n, n), "in_train_days": True} for n in "1234567"
    ]
    (tmp_path / "split").mkdir()
    pq.write_table(pa.Table.from_pylist(split, schema=schema.NOTE_SPLIT), tmp_path / "split" / "0.parquet")
    return tmp_path / "pairs"


ROWS = [
    (1, 4), (3, 1), (1, 3), (1, 4),  # the last repeats the first
    (1, 2), (2, 1), (4, 4),  # related, in both directions, and the note itself
    (3, 5), (3, 6),  # a near-duplicate, and a note related to it
    (7, 3), (1, 7), (1, 99), (98, 99),  # 7 is held out, the others are no notes
    (None, 1), (2, None),
]  # fmt: skip
COUNTS = {
    "rows": 15, "null_ids": 2, "unknown_note_ids": 2, "unknown_negative_ids": 2, "excluded_known_positives": 3,
    "excluded_near_duplicates": 2, "duplicate_rows": 1, "notes": 2, "negatives": 3, "negatives_per_note": 0.5,
    "notes_without_negatives": 4,
}  # fmt: skip


def write(path: Path, kind: str) -> Path:
    """ROWS in a file of this kind."""
    notes, negatives = zip(*ROWS, strict=True)
    if "csv" in kind:
        lines = ["negative_id,more,note_id", *(f"{b or ''},x,{'' if a is None else f' {a}'}" for a, b in ROWS)]
        data = "\n".join(lines).encode()
        path = path.with_suffix(kind)
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        return path
    columns = [pa.array(notes, pa.int64()), pa.array(negatives, pa.uint16())]
    if kind == "text":
        columns = [columns[0].cast(pa.string()).dictionary_encode(), columns[1].cast(pa.large_string())]
    pq.write_table(pa.table(columns, ["note_id", "negative_id"]), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("kind", ["numbers", "text", ".csv", ".csv.gz"])
def test_the_rows_that_can_be_used(kind: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of note 1, 4 comes before 3, as in the file. Training reads the result as it reads mined negatives."""
    file, out = write(tmp_path / "mine", kind), tmp_path / "out"
    main(["--file", str(file), "--pairs", str(pairs), "--note-split", str(tmp_path / "split"), "--out", str(out)])
    table = pq.read_table(out / "part-00000.parquet")
    assert table.schema.equals(schema.HARD_NEGATIVES)
    assert [tuple(row.values()) for row in table.to_pylist()] == [("1", "4", 1), ("1", "3", 2), ("3", "1", 1)]
    assert json.loads((out / "counts.json").read_text()) == COUNTS
    said = capsys.readouterr().err
    assert f"warning: {file}: 3 of 15 rows are used; 2 without an id, 2 whose note_id is not in" in said
    assert [rows.tolist() for rows in read_hard_negatives(out, list("1234567"))] == [[3, 2], [], [0], [], [], [], []]


def test_what_is_refused(pairs: Path, tmp_path: Path) -> None:
    def refused(table: pa.Table | None, message: str) -> None:
        file = tmp_path / "mine.parquet"
        if table is not None:
            pq.write_table(table, file)
        with pytest.raises(ValueError, match=message):
            take_over(file, pairs, tmp_path / "out")

    refused(None, "mine.parquet does not exist")
    refused(pa.table({"note_id": ["1"]}), "mine.parquet lacks the column negative_id")
    ids = {"note_id": pa.array(["1"])}
    refused(pa.table({**ids, "negative_id": [3.0]}), "the column negative_id has type double, not text or whole")
    refused(pa.table({**ids, "negative_id": [[3]]}), "the column negative_id has type list")
    refused(pa.table({**ids, "negative_id": ["99"]}), "no row of .*: 1 whose negative_id is not in the training pairs")
    refused(pa.table({**ids, "negative_id": ["9"]}).slice(1), "no row of .*: it has no rows")
    assert not (tmp_path / "out").exists()


def test_ids_keep_their_digits(tmp_path: Path) -> None:
    """Leading zeros in CSV stay, as do the 19 digits of a number."""
    file = tmp_path / "mine.csv"
    file.write_text("note_id,negative_id\n007,9007199254740993\n")
    assert read_ids(file).to_pylist() == [{"note_id": "007", "negative_id": "9007199254740993"}]
    pq.write_table(pa.table({"note_id": [7], "negative_id": [9007199254740993]}), tmp_path / "mine.parquet")
    assert read_ids(tmp_path / "mine.parquet").to_pylist() == [{"note_id": "7", "negative_id": "9007199254740993"}]
