"""Related pairs are read from the lake's Parquet, a user's Parquet, and qrels of TREC and BEIR; the rest is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core import schema
from notellm2_core.evaluation.pairs import LEFT_OUT, Pairs, read_pairs

NOTHING = dict.fromkeys(LEFT_OUT, 0)


def parquet(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def packed(file: Path, content: str) -> Path:
    """`content`, compressed as the name of `file` says."""
    codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(file.suffix)
    with pa.output_stream(str(file), compression=codec) as stream:
        stream.write(content.encode())
    return file


def text(file: Path, content: str) -> Path:
    file.write_bytes(content.encode())
    return file


TEXTS = (pa.string(), pa.large_string(), pa.string_view())
WHOLE_NUMBERS = (pa.int8(), pa.int64(), pa.uint64(), pa.decimal128(20))
CATEGORIES = (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.int64()))  # as pandas writes them


@pytest.mark.parametrize("kind", [*TEXTS, *WHOLE_NUMBERS, *CATEGORIES], ids=str)
def test_ids_are_text_or_whole_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    make = str if kind in TEXTS or kind == CATEGORIES[0] else int
    columns = {"query_id": [3, 1, 2], "target_id": [2, 2, 3]}
    arrays = {name: pa.array([*map(make, ids)], kind) for name, ids in columns.items()}
    read = read_pairs(parquet(tmp_path / "pairs.parquet", **arrays))
    assert read.pairs == Pairs(("1", "2", "3"), ("2", "3", "2"))
    assert read.left_out == NOTHING


def test_the_parts_of_a_folder_may_have_ids_of_different_types(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", query_id=[12, 2**63 - 1], target_id=["a", " b "])
    parquet(tmp_path / "b.parquet", query_id=["x"], target_id=pa.array([2**64 - 1], pa.uint64()), extra=[0.5])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "pool").mkdir()
    parquet(tmp_path / "pool" / "a.parquet", note_id=["a"])
    assert read_pairs(tmp_path).pairs == Pairs(("12", str(2**63 - 1), "x"), ("a", "b", str(2**64 - 1)))


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.int64()), pa.list_view(pa.string())], ids=str)
def test_a_row_may_list_several_targets(tmp_path: Path, kind: pa.DataType) -> None:
    """Rows 1 -> [2, 3], 4 -> [], 5 -> [1]: three pairs, and a query without target. Labels are of the rows."""
    make = str if pa.types.is_string(kind.value_type) else int
    lists = pa.array([[make(i) for i in row] for row in ([2, 3], [], [1])], kind)
    read = read_pairs(parquet(tmp_path / "p.parquet", query_id=[1, 4, 5], target_id=lists))
    assert read.pairs == Pairs(("1", "1", "5"), ("2", "3", "1"))
    assert read.left_out == NOTHING | {"queries_without_target": 1}
    read = read_pairs(parquet(tmp_path / "p.parquet", query_id=[1, 4, 5], target_id=lists, label=[0, 1, 3]))
    assert (read.pairs, read.left_out["irrelevant_pairs"]) == (Pairs(("5",), ("1",), (3.0,)), 2)


def test_a_part_without_any_target(tmp_path: Path) -> None:
    """Where all lists are empty, pandas writes lists of nothing."""
    parquet(tmp_path / "a.parquet", query_id=["a"], target_id=pa.array([[]], pa.list_(pa.null())))
    parquet(tmp_path / "b.parquet", query_id=["b"], target_id=[["c", "d"]])
    read = read_pairs(tmp_path)
    assert read.pairs == Pairs(("b", "b"), ("c", "d"))
    assert read.left_out == NOTHING | {"queries_without_target": 1}


def test_parts_of_which_some_have_a_label_are_refused(tmp_path: Path) -> None:
    """Without it, nobody knows whether a pair is relevant."""
    parquet(tmp_path / "a.parquet", query_id=["a"], target_id=["b"], label=[0])
    parquet(tmp_path / "b.parquet", query_id=["a"], target_id=["c"])
    with pytest.raises(ValueError, match=r"a\.parquet has the columns query_id, target_id, label, \S*b\.parquet has"):
        read_pairs(tmp_path)


def test_lists_of_fixed_size(tmp_path: Path) -> None:
    lists = pa.array([["b", "c"], ["a", "b"]], pa.list_(pa.string(), 2))
    assert read_pairs(parquet(tmp_path / "p.parquet", query_id=["a", "c"], target_id=lists)).pairs == Pairs(
        ("a", "a", "c", "c"), ("b", "c", "a", "b")
    )


@pytest.mark.parametrize("name", ["label", "relevance"])
@pytest.mark.parametrize("kind", [pa.int32(), pa.float64(), pa.bool_(), pa.decimal128(12, 2)], ids=str)
def test_repeated_pairs_count_once_and_irrelevant_ones_not(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    """a -> b comes three times, once as irrelevant; a -> c and d -> a are irrelevant, so d has no target."""
    grades = pa.array([1, 0, 1, 0, 0], pa.int32()).cast(kind)
    file = parquet(tmp_path / "p.parquet", query_id=[*"aaaad"], target_id=[*"bbbca"], **{name: grades})
    read = read_pairs(file)
    assert read.pairs == Pairs(("a",), ("b",))
    assert read.left_out == {"duplicate_pairs": 1, "irrelevant_pairs": 3, "queries_without_target": 1}


def test_a_repeated_pair_has_its_highest_relevance(tmp_path: Path) -> None:
    file = parquet(tmp_path / "p.parquet", query_id=[*"aaa"], target_id=[*"bbc"], relevance=[1, 3, 1])
    assert read_pairs(file).pairs == Pairs(("a", "a"), ("b", "c"), (3.0, 1.0))


def test_the_score_of_the_lake_is_no_relevance(tmp_path: Path) -> None:
    rows = {"query_id": ["a"], "target_id": ["b"], "score": [0.0], "num_users": [1], "rank": [1]}
    (tmp_path / "test").mkdir()
    pq.write_table(pa.table(rows, schema=schema.RELATED_PAIRS), tmp_path / "test" / "part.parquet")
    assert read_pairs(tmp_path).pairs == Pairs(("a",), ("b",))


def test_qrels_of_trec(tmp_path: Path) -> None:
    """Blanks or tabs, Windows line ends, no newline at the end; -1 is what some tracks give to spam."""
    file = text(tmp_path / "qrels.txt", "301 0 d1 2\r\n301\tQ0\td2\t0\r\n\r\n7  0  d1 1\n7 0 d3 -1\n8 0 d1 0")
    read = read_pairs(file)
    assert read.pairs == Pairs(("301", "7"), ("d1", "d1"), (2.0, 1.0))
    assert read.left_out == {"duplicate_pairs": 0, "irrelevant_pairs": 3, "queries_without_target": 1}


@pytest.mark.parametrize("mark", ["", "\N{ZERO WIDTH NO-BREAK SPACE}"], ids=["", "byte order mark"])
def test_qrels_of_beir(tmp_path: Path, mark: str) -> None:
    """The header is recognised, and a folder of qrels gives its test.tsv. Ids may hold blanks, as no TREC id can."""
    text(tmp_path / "train.tsv", "query-id\tcorpus-id\tscore\nq9\td9\t1\n")
    text(tmp_path / "test.tsv", f'{mark}query-id\tcorpus-id\tscore\r\nq 1\td1\t1\nq2\t"d""2"\t0\nq 1\td1\t1\n')
    read = read_pairs(tmp_path)
    assert read.pairs == Pairs(("q 1",), ("d1",))
    assert read.left_out == {"duplicate_pairs": 1, "irrelevant_pairs": 1, "queries_without_target": 1}


def test_qrels_of_beir_as_parquet(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"query-id": ["q1", "q1"], "corpus-id": [3, 4], "score": [2.0, 0.0]}
    assert read_pairs(parquet(tmp_path / "p.parquet", **columns)).pairs == Pairs(("q1",), ("3",), (2.0,))


@pytest.mark.parametrize("ending", ["csv", "tsv.gz", "csv.bz2", "jsonl", "jsonl.zst", "parquet"])
def test_pairs_are_read_from_any_format(tmp_path: Path, ending: str) -> None:
    """a -> b twice, a -> c irrelevant, d -> [e, "f g"], and h -> [], which a CSV cannot say."""
    rows: list[dict[str, Any]] = [
        {"query_id": "a", "target_id": ["b"], "label": 2}, {"query_id": "a", "target_id": ["b"], "label": 1},
        {"query_id": "a", "target_id": ["c"], "label": 0}, {"query_id": "d", "target_id": ["e", "f g"], "label": 1},
        {"query_id": "h", "target_id": [], "label": 1},
    ]  # fmt: skip
    file, has_lists = tmp_path / f"pairs.{ending}", ending[:3] not in ("csv", "tsv")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif has_lists:
        packed(file, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [(row["label"], row["query_id"], target) for row in rows for target in row["target_id"]]
        delimiter = "\t" if ending.startswith("tsv") else ","
        packed(file, "".join(delimiter.join(map(str, r)) + "\n" for r in [("label", "query_id", "target_id"), *lines]))
    read = read_pairs(file)
    assert read.pairs == Pairs(("a", "d", "d"), ("b", "e", "f g"), (2.0, 1.0, 1.0))
    assert read.left_out == dict(zip(LEFT_OUT, (1, 1, int(has_lists)), strict=True))


def test_labels_of_json_may_be_booleans(tmp_path: Path) -> None:
    rows = [{"query_id": "a", "target_id": target, "label": label} for target, label in (("b", True), ("c", False))]
    read = read_pairs(packed(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert (read.pairs, read.left_out["irrelevant_pairs"]) == (Pairs(("a",), ("b",)), 1)


@pytest.mark.parametrize("name", ["qrels.gz", "qrels.txt.bz2", "qrels.dev.tsv", "qrels.csv", "qrels.zst", "qrels"])
def test_qrels_are_recognised_whatever_their_name(tmp_path: Path, name: str) -> None:
    """TREC's lines have no header (MS MARCO calls them qrels.dev.tsv), BEIR's have one."""
    trec = packed(tmp_path / name, "7\t0\t9\t1\n8\t0\t9\t2\n")
    assert read_pairs(trec).pairs == Pairs(("7", "8"), ("9", "9"), (1.0, 2.0))
    beir = packed(tmp_path / name, "query-id\tcorpus-id\tscore\n7\t9\t1\n")
    assert read_pairs(beir).pairs == Pairs(("7",), ("9",))


def test_the_split_of_a_folder(tmp_path: Path) -> None:
    """Of a folder with splits, the test pairs are read; without them, the folder is refused."""
    for split in ("train", "dev"):
        text(tmp_path / f"{split}.csv", f"query_id,target_id\n{split},x\n")
    with pytest.raises(ValueError, match=r"holds dev\.csv and no test: name the file whose pairs count"):
        read_pairs(tmp_path)
    packed(tmp_path / "test.jsonl.gz", '{"query_id": 1, "target_id": 2}\n')
    assert read_pairs(tmp_path).pairs == Pairs(("1",), ("2",))
    text(tmp_path / "test.tsv", "query-id\tcorpus-id\tscore\n")
    with pytest.raises(ValueError, match=r"holds both test\.jsonl\.gz and test\.tsv: name the one that counts"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["a"], "target_id": ["b"]}, "needs the columns query_id and target_id, it has"),
        ({"query_id": [1.0], "target_id": ["b"]}, "the column query_id has type double, not text or whole numbers"),
        ({"query_id": ["a"], "target_id": [[1.5]]}, "the column target_id has type double"),
        ({"query_id": ["a", None], "target_id": ["b", "c"]}, "column query_id has no id in 1 of 2 rows"),
        ({"query_id": ["a", "b"], "target_id": ["b", " "]}, "column target_id has no id in 1 of 2 rows"),
        ({"query_id": ["a", "b"], "target_id": [["b"], None]}, "column target_id has no id in 1 of 2 rows"),
        ({"query_id": ["a"], "target_id": [["b", None]]}, "column target_id has no id in 1 of 2 rows"),
        ({"query_id": ["a"], "target_id": ["b"], "label": ["high"]}, "column label: a relevance is no finite number"),
        ({"query_id": ["a"], "target_id": ["b"], "label": [[1]]}, "the column label has type list"),
        (
            {"query_id": ["a"], "target_id": ["b"], "label": [float("nan")]},
            "column label: a relevance is no finite number",
        ),
        (
            {"query_id": ["a", "b"], "target_id": ["b", "a"], "label": [1, None]},
            "column label: a relevance is no finite number",
        ),
        (
            {"query_id": ["a"], "target_id": ["b"], "label": [1], "relevance": [1]},
            "has the columns relevance and label",
        ),
    ],
)
def test_parquet_that_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^\S*p\.parquet[,:]? {message}"):
        read_pairs(parquet(tmp_path / "p.parquet", **columns))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 0 2 1\n1 0 2 1 0.5 run\n", r"qrels, line 2 has 6 fields; pairs are a table with the columns"),
        ("1 0 2 high\n", r"qrels, line 1: the relevance 'high' is not a number"),
        ("1 0 2 nan\n", r"qrels, line 1: the relevance 'nan' is not a number"),
        ("query-id\tcorpus-id\tscore\n1\t2\n", 'qrels has a line that is no row: {"line":"1.*2"}; pairs are a table'),
        ("query-id\tcorpus-id\tscore\n1\t2\t1\n\t2\t1\n", r"qrels, column query-id has no id in 1 of 2 rows"),
        ("query_id,target_id\na,b\n", r"qrels, line 1 has 1 fields; .* or those of BEIR"),
    ],
)
def test_text_that_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(text(tmp_path / "qrels", content))


def test_what_is_no_file_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    with pytest.raises(ValueError, match="binary is neither a table nor a text of pairs"):
        read_pairs(tmp_path / "binary")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pairs; pairs are a table"):
        read_pairs(tmp_path / "empty")
    parquet(tmp_path / "a.parquet", query_id=["a"], target_id=["b"])
    with pytest.raises(ValueError, match="binary has none of the formats that are read"):
        read_pairs(tmp_path)
    text(tmp_path / "named.csv", "query,target\na,b\n")
    with pytest.raises(ValueError, match="named.csv needs the columns query_id and target_id, it has query, target;"):
        read_pairs(tmp_path / "named.csv")
    packed(tmp_path / "cut.gz", "1 0 2 1\n" * 9999).write_bytes((tmp_path / "cut.gz").read_bytes()[:30])
    with pytest.raises(ValueError, match="cut.gz is neither a table nor a text of pairs"):
        read_pairs(tmp_path / "cut.gz")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_pairs(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cut is damaged, or no Parquet"):
        read_pairs(tmp_path / "cut")
