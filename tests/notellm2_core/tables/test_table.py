"""Tables of any format, whole and in parts that differ: the same rows, or one sentence."""

import bz2
import gzip
import itertools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.tables.source import find_table, open_events, open_notes
from notellm2_core.tables.table import MALFORMED, ROW, Table

HEADER = "user_id,note_id,timestamp,event"


def rows(*tables: Table) -> list[dict[str, Any]]:
    return [
        row for table in tables for split in table.splits() for batch in table.read(split) for row in batch.to_pylist()
    ]


def events(path: Path) -> list[tuple[Any, ...]]:
    """(user_id, note_id, Unix seconds, event) of the rows that are not malformed."""
    return [
        (r["user_id"], r["note_id"], r["timestamp"] and r["timestamp"].timestamp(), r["event"])
        for r in rows(*open_events(path))
        if not r[MALFORMED]
    ]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, zstd], ids=["plain", "gz", "bz2", "zst"])
@pytest.mark.parametrize("suffix", ["csv", "CSV", "tsv", "jsonl"])
def test_text_formats(suffix: str, pack: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    """R12. A byte-order mark is no part of the first name."""
    if suffix == "jsonl":
        text = json.dumps({"user_id": 1, "note_id": "a", "timestamp": 5, "event": "view"}) + "\n\n"
    else:
        text = "\ufeff" + HEADER + "\nu,a,5,view\n\n"
        text = text.replace(",", "\t") if suffix == "tsv" else text
    ending = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2"}.get(pack, ".zst")
    path = tmp_path / f"events.{suffix}{ending}"
    path.write_bytes(pack(text.encode()) if pack else text.encode())
    assert events(tmp_path) == [("1" if suffix == "jsonl" else "u", "a", 5.0, "view")]


def test_parts_go_by_the_names_in_their_headers(tmp_path: Path) -> None:
    """D2: as Spark writes a folder, but with the columns of the second part in another order."""
    (tmp_path / "events.csv").mkdir()
    (tmp_path / "events.csv" / "part-0.csv").write_text(f"{HEADER}\nu1,n1,1,view\n")
    (tmp_path / "events.csv" / "part-1.csv").write_text("note_id,user_id,timestamp,event\nn2,u2,2,click\n")
    (tmp_path / "events.csv" / "_SUCCESS").touch()
    assert events(tmp_path) == [("u1", "n1", 1.0, "view"), ("u2", "n2", 2.0, "click")]
    (tmp_path / "events.csv" / "part-2.csv").write_text("u3,n3,3,view\n")
    with pytest.raises(ValueError, match=r"part-2\.csv lacks the column user_id; it has u3, n3, 3, view"):
        open_events(tmp_path)


def test_a_quoted_line_break_is_no_new_row(tmp_path: Path) -> None:
    """D4. An open quote that is never closed swallows the rest: every one of its lines counts."""
    path = tmp_path / "events.csv"
    path.write_text(f'{HEADER},comment\nu9,n1,5,view,"see\nu9,n2,6,click,bye"\nu1,"n ""3""",7,view,\n')
    assert events(path) == [("u9", "n1", 5.0, "view"), ("u1", 'n "3"', 7.0, "view")]
    path.write_text(f'{HEADER}\nu,"n,1,view\n' + "u,n,1,view\n" * 9)
    assert [r[MALFORMED] for r in rows(*open_events(path))] == [True] * 10


def test_lines_that_are_no_rows_and_ids_that_are_none(tmp_path: Path) -> None:
    """D6, and values with bytes that are not UTF-8. ROW is what the user wrote."""
    path = tmp_path / "events.csv"
    path.write_bytes(f'{HEADER}\nshort,row\n\\N,NULL,1,view\n"a\\b",n,1,'.encode() + b"caf\xe9\n")
    read = {r[ROW]: (r["user_id"], r["note_id"], r[MALFORMED]) for r in rows(*open_events(path))}
    assert {tuple(json.loads(row).items()): ids for row, ids in read.items()} == {
        (("line", "short,row"),): (None, None, True),
        (("user_id", None), ("note_id", "NULL"), ("timestamp", "1"), ("event", "view")): (None, None, False),
        (("user_id", "a\\b"), ("note_id", "n"), ("timestamp", "1"), ("event", "caf\ufffd")): (None, None, True),
    }


def test_the_row_of_a_time_that_is_no_number_is_json(tmp_path: Path) -> None:
    times = [float("nan"), float("-inf"), 1.5, None]
    columns = {"user_id": ["u"] * 4, "note_id": ["n"] * 4, "timestamp": times, "event": ["view"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    written = [json.loads(r[ROW])["timestamp"] for r in rows(*open_events(tmp_path / "events.parquet"))]
    assert written == ["nan", "-inf", 1.5, None]


@pytest.mark.parametrize(("log", "name"), [("_delta_log", "Delta"), (".hoodie", "Hudi"), ("metadata", "Iceberg")])
def test_tables_with_a_log_of_their_own_are_refused_by_name(log: str, name: str, tmp_path: Path) -> None:
    """D3: their log may have removed files that still lie there."""
    folder = tmp_path / "events"
    (folder / log).mkdir(parents=True)
    (folder / log / "v1.metadata.json").touch()
    pq.write_table(pa.table({"user_id": [1]}), folder / "a.parquet")
    with pytest.raises(ValueError, match=f"events is a table of {name}, whose log decides which of its files count"):
        open_events(tmp_path)
    (tmp_path / "above").mkdir()
    folder.rename(tmp_path / "above" / "table")
    (tmp_path / "above").rename(folder)
    with pytest.raises(ValueError, match=f"events/table is a table of {name}"):
        open_events(tmp_path)


def test_folders_name_columns_as_spark_and_hive_write_them(tmp_path: Path) -> None:
    """007 is no number, a slash is percent-encoded, and null has a name."""
    for name, user in (("note_id=007", "a"), ("note_id=x%2Fy%20z", "b"), ("note_id=__HIVE_DEFAULT_PARTITION__", "c")):
        (tmp_path / "events" / name).mkdir(parents=True)
        columns = {"user_id": [user], "timestamp": [5], "event": ["view"]}
        pq.write_table(pa.table(columns), tmp_path / "events" / name / "a.parquet")
    assert {user: note for user, note, _, _ in events(tmp_path)} == {"a": "007", "b": "x/y z", "c": None}


def test_parts_of_parquet_are_united(tmp_path: Path) -> None:
    """D1, R3 and R4, in every order of the parts. Columns that nobody needs may have any type."""
    parts: list[dict[str, Any]] = [
        {"note_id": [1], "title": ["a"], "topics": ["x|y"], "content": ["c"], "clock": pa.array([1], pa.time64("us"))},
        {"note_id": ["2"], "title": pa.nulls(1), "topics": [["x"]], "content": ["c"], "image_path": ["2.png"]},
        {"content": ["c"], "topics": pa.nulls(1), "note_id": pa.array([3], pa.uint64()), "title": ["t"],
         "id": pa.array([b"0" * 16], pa.uuid()), "big": pa.array([None], pa.decimal256(60, 2))},
    ]  # fmt: skip
    expected = {
        "1": ("a", ["x", "y"], None), "2": (None, ["x"], "2.png"), "3": ("t", None, None)
    }  # fmt: skip
    for number, order in enumerate(itertools.permutations(parts)):
        folder = tmp_path / str(number) / "notes.parquet"
        folder.mkdir(parents=True)
        for n, part in enumerate(order):
            pq.write_table(pa.table(part), folder / f"part-{n}.parquet")
        read = rows(open_notes(folder.parent))
        assert {r["note_id"]: (r["title"], r["topics"], r["image_path"]) for r in read} == expected


def test_json_values_of_any_type(tmp_path: Path) -> None:
    """A value that its column cannot have is named with its line. A missing key is null; a line may be no object."""
    path = tmp_path / "events.jsonl"
    good = [{"user_id": 1, "note_id": 2**70, "timestamp": 1.5, "event": "view"}, {"user_id": "u", "note_id": "n"}]
    path.write_text("\n".join([*map(json.dumps, good), "[1]", "{"]) + "\n")
    assert events(path) == [("1", str(2**70), 1.5, "view"), ("u", "n", None, None)]
    for value in (1.5, True, [1], {}):
        path.write_text("\n".join(map(json.dumps, [*good, {"user_id": value}])))
        with pytest.raises(ValueError, match=r"events\.jsonl: the column user_id has .* in line 3, not text or whole"):
            rows(*open_events(path))


def test_a_line_that_is_no_row_beside_a_part_with_images(tmp_path: Path) -> None:
    """The part of JSON has no column of bytes, so its malformed line has none either."""
    (tmp_path / "notes").mkdir()
    note: dict[str, Any] = {"note_id": "1", "title": "t", "topics": "a", "content": "c"}
    pq.write_table(pa.table({name: [value] for name, value in (note | {"image": b"x"}).items()}),
                   tmp_path / "notes" / "a.parquet")  # fmt: skip
    (tmp_path / "notes" / "b.jsonl").write_text(json.dumps(note | {"note_id": "2"}) + "\n[1]\n")
    read = [(r["note_id"], r["image"], r[MALFORMED]) for r in rows(open_notes(tmp_path))]
    assert read == [("1", b"x", False), ("2", None, False), (None, None, True)]


def test_a_key_of_json_may_come_first_in_a_later_line(tmp_path: Path) -> None:
    note = {"note_id": 1, "title": "t", "topics": "a", "content": "c"}
    lines = [json.dumps(note)] * 1500 + [json.dumps(note | {"image_path": "a.png"})]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    assert [r["image_path"] for r in rows(open_notes(tmp_path))] == [None] * 1500 + ["a.png"]


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    names = [*HEADER.split(","), "event"]
    (tmp_path / "a.csv").write_text(",".join(names) + "\nu,n,1,view,click\n")
    values = [pa.array(["x"])] * 5
    pq.write_table(pa.Table.from_arrays(values, names=names), tmp_path / "b.parquet")
    for name in ("a.csv", "b.parquet"):
        with pytest.raises(ValueError, match=f"{name} has the column event twice: which of them counts"):
            open_events(tmp_path / name)


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no events: a file or folder events of Parquet, CSV \(\.csv\)"):
        find_table(tmp_path, "events")
    (tmp_path / "events.csv").touch()
    with pytest.raises(ValueError, match=r"events\.csv is empty"):
        open_events(tmp_path)
    (tmp_path / "events").mkdir()
    with pytest.raises(ValueError, match=r"holds both events and events\.csv: name the .* in source\.events\.files"):
        open_events(tmp_path)
    (tmp_path / "events.csv").unlink()
    with pytest.raises(ValueError, match="events holds no files"):
        open_events(tmp_path)
    (tmp_path / "events" / "log.zip").touch()
    with pytest.raises(ValueError, match=r"log\.zip has none of the formats that are read: Parquet, CSV"):
        open_events(tmp_path)
    (tmp_path / "events" / "log.zip").rename(tmp_path / "events" / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is damaged, or no Parquet"):
        open_events(tmp_path)
    packed = gzip.compress(f"{HEADER}\n".encode() + b"".join(b"u%d,n,%d,view\n" % (i, i * i) for i in range(5000)))
    (tmp_path / "events" / "x.parquet").unlink()
    (tmp_path / "events" / "x.csv.gz").write_bytes(packed[:2000])
    with pytest.raises(ValueError, match=r"x\.csv\.gz is damaged"):
        rows(*open_events(tmp_path))


IDS = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.text("ab \"',\\\n|é0", max_size=4))
EVENT_ROWS = st.lists(
    st.tuples(IDS, IDS, st.integers(21_000_000, 4_000_000_000), st.sampled_from(["view", "click"])), max_size=8
)


@given(data=EVENT_ROWS, seed=st.integers(0, 2**32))
def test_any_rows_are_equal_in_all_formats(data: list[tuple[Any, ...]], seed: int) -> None:
    """Random rows, cut at random into parts of random formats, with columns in random order."""
    rng, names = random.Random(seed), HEADER.split(",")
    cut = sorted(rng.choices(range(len(data) + 1), k=2))

    def canonical(value: Any) -> str | None:
        return str(value).strip(" \t\r\n") or None if value is not None else None

    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate((data[: cut[0]], data[cut[0] : cut[1]], data[cut[1] :])):
            order = rng.sample(range(4), 4)
            write = rng.choice([_write_csv, _write_jsonl, _write_parquet]) if number else _write_csv
            write(Path(folder, f"part-{number}"), [names[i] for i in order], [[row[i] for i in order] for row in part])
        assert events(Path(folder)) == [(canonical(u), canonical(n), float(t), e) for u, n, t, e in data]


def _write_csv(path: Path, names: list[str], part: list[list[Any]]) -> None:
    def field(value: Any) -> str:
        return "" if value is None else f'"{str(value).replace(chr(34), chr(34) * 2)}"'

    lines = [",".join(map(field, row)) for row in part]
    path.with_suffix(".csv").write_text("\n".join([",".join(names), *lines]) + "\n")


def _write_jsonl(path: Path, names: list[str], part: list[list[Any]]) -> None:
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in part]
    path.with_suffix(".jsonl").write_text("\n".join(lines))


def _write_parquet(path: Path, names: list[str], part: list[list[Any]]) -> None:
    columns = {}
    for name, *values in zip(names, *part, strict=True) if part else ((name,) for name in names):
        types = {type(value) for value in values} - {type(None)}
        columns[name] = values if len(types) < 2 else [None if v is None else str(v) for v in values]
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
