"""Random tables of every kind: read to the rows that plain Python expects, or refused in one sentence.

Types, nulls, parts, orders of columns, compressions and faults are random. The suite takes a few tables of each kind;
benchmarks/results/random_tables.md has the result of 2,000:

    RANDOM_TABLES=2000 .venv/bin/python -m pytest tests/notellm2_core/tables/test_random_tables.py
"""

import bz2
import gzip
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.evaluation.pairs import read_pairs
from notellm2_core.tables.source import open_events, open_notes
from notellm2_core.tables.table import MALFORMED, Table

random_tables = settings(
    max_examples=int(os.environ.get("RANDOM_TABLES", "60")),
    database=None,
    suppress_health_check=list(HealthCheck),
)
SEEDS = st.integers(0, 2**64 - 1)
Random = random.Random
Draw = Callable[[Random], Any]
Values = dict[str, list[Any]]
Write = Callable[[Path, dict[str, "Carrier"], Values, int, Random], Path]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NO_IDS = ["", " ", r"\N", "NULL", "null", "None", "nan", "NaN", "<NA>"]
WORDS = ["a", "Tea", "été", "山", "x,y", 'say "hi"', "line\nbreak", "7", "007", "tab\there", "-", "🎏"]


# ---------------------------------------------------------------------------------------------------------------------
# what the values of a column may be


@dataclass(frozen=True)
class Carrier:
    """A type of values: Arrow's, one of them at random, and what it is read as. `refused`: the column has no such."""

    type: pa.DataType
    draw: Draw
    expected: Callable[[Any], Any] = lambda value: value
    refused: bool = False


def bad(kind: pa.DataType, value: Any) -> Carrier:
    return Carrier(kind, lambda rng: value, refused=True)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
WHOLE_TYPES = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


def text(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(4)))


def id_text(rng: Random) -> str:
    return rng.choice([*NO_IDS, f" n{rng.randrange(30)}\t", *(f"n{rng.randrange(30)}" for _ in range(9)), text(rng)])


def trimmed(value: str) -> str | None:
    return value.strip(" \t\r\n") or None


def id_of(value: Any) -> str | None:
    name = str(value).strip(" \t\r\n")
    return None if name in NO_IDS else name


def whole(kind: pa.DataType) -> Draw:
    low, high = np.iinfo(kind.to_pandas_dtype()).min, np.iinfo(kind.to_pandas_dtype()).max
    return lambda rng: rng.choice([int(low), int(high), rng.randrange(0, 100), rng.randint(int(low), int(high))])


BAD = [bad(pa.float64(), 1.0), bad(pa.float32(), 1.0), bad(pa.float16(), np.float16(1)), bad(pa.bool_(), True),
       bad(pa.binary(), b"a"), bad(pa.struct([("a", pa.int8())]), {"a": 1}), bad(pa.date32(), date(2025, 1, 1)),
       bad(pa.decimal128(5, 2), Decimal("1.50")), bad(pa.duration("s"), 1), bad(pa.time32("s"), 1)]  # fmt: skip
ID = [
    *[Carrier(kind, id_text, id_of) for kind in TEXT_TYPES],
    *[Carrier(kind, whole(kind), str) for kind in WHOLE_TYPES],
    Carrier(pa.decimal128(20, 0), lambda rng: Decimal(rng.randrange(10**20)), str),
]
TEXT = [Carrier(kind, text) for kind in TEXT_TYPES]


def pieces(rng: Random) -> list[str]:
    return [rng.choice(["a", "b b", " c ", "", "山"]) for _ in range(rng.randrange(4))]


def stripped(values: list[Any]) -> list[str]:
    return [str(v).strip(" \t\r\n") for v in values if str(v).strip(" \t\r\n")]


TOPICS = [
    *[Carrier(kind, lambda rng: "|".join(pieces(rng)), lambda v: stripped(v.split("|"))) for kind in TEXT_TYPES],
    Carrier(pa.list_(pa.string()), pieces, stripped),
    Carrier(pa.large_list(pa.large_string()), pieces, stripped),
    Carrier(pa.list_(pa.int16()), lambda rng: rng.choices(range(9), k=2), stripped),
]
BYTES = [
    *[Carrier(kind, lambda rng: rng.randbytes(3)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())],
    Carrier(
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        lambda rng: {"bytes": rng.randbytes(2), "path": "x.png"},
        lambda v: v["bytes"],
    ),
]


def moment(rng: Random) -> datetime:
    return EPOCH + timedelta(microseconds=rng.randrange(10**14, 4 * 10**15))


def unix(unit: int) -> Draw:
    return lambda rng: rng.randrange(10**8, 4 * 10**9) * unit + rng.randrange(unit)


def microseconds(unit: int) -> Callable[[int], datetime]:
    half = 500 if unit == 10**9 else 0  # nanoseconds are rounded
    return lambda value: EPOCH + timedelta(microseconds=(value + half) * 10**6 // unit)


NEW_YORK = timezone(timedelta(hours=-5))
TIME = [
    *[Carrier(pa.int64(), unix(unit), microseconds(unit)) for unit in (1, 10**3, 10**6, 10**9)],
    Carrier(pa.float64(), lambda rng: rng.randrange(10**8, 4 * 10**9) + 0.5, lambda v: EPOCH + timedelta(seconds=v)),
    Carrier(pa.timestamp("us", "UTC"), moment),
    Carrier(pa.timestamp("us"), lambda rng: moment(rng).replace(tzinfo=None), lambda v: v.replace(tzinfo=UTC)),
    Carrier(pa.timestamp("ms", "Asia/Tokyo"), lambda rng: moment(rng).replace(microsecond=5000)),
    Carrier(pa.date32(), lambda rng: moment(rng).date(), lambda v: datetime(v.year, v.month, v.day, tzinfo=UTC)),
    *[Carrier(kind, lambda rng: moment(rng).isoformat(), datetime.fromisoformat) for kind in TEXT_TYPES],
    Carrier(pa.string(), lambda rng: moment(rng).astimezone(NEW_YORK).isoformat(), datetime.fromisoformat),
    Carrier(pa.string(), lambda rng: rng.choice(["", "soon", "2025-13-01", "NULL"]), lambda v: None),
]
BAD_TIME = [bad(pa.float32(), 1.0), bad(pa.bool_(), True), bad(pa.binary(), b"1"), bad(pa.time64("us"), 1)]
EVENT = [
    *[Carrier(kind, lambda rng: rng.choice([" view ", "click", "", "1"]), trimmed) for kind in TEXT_TYPES],
    Carrier(pa.int8(), lambda rng: rng.randrange(3), str),
    Carrier(pa.bool_(), lambda rng: rng.random() < 0.5, lambda v: str(v).lower()),
    Carrier(pa.float64(), lambda rng: rng.choice([4.5, 0.5, 3.25]), str),
]
BAD_EVENT = [bad(pa.binary(), b"view"), bad(pa.struct([("a", pa.int8())]), {"a": 1})]
ANY = [
    *BAD, *TEXT, Carrier(pa.map_(pa.string(), pa.int8()), lambda rng: [("a", 1)]),
    Carrier(pa.list_(pa.list_(pa.float16())), lambda rng: [[np.float16(1)]]),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# tables of them


@dataclass(frozen=True)
class Kind:
    """A column: what its values may be, and what it refuses, as Arrow's types and as values of JSON."""

    good: list[Carrier]
    bad: list[Carrier]
    bad_json: tuple[Any, ...] = (1.5, True, {})
    optional: bool = False  # parts may lack it
    in_text: bool = True  # CSV and JSON Lines can hold it


@dataclass
class Written:
    """What was written: the rows that are expected, the lines that are none, and the (file, column) to be refused."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    malformed: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


NOTES = {
    "note_id": Kind(ID, BAD),
    "title": Kind(TEXT, [*BAD, bad(pa.int64(), 1)], optional=True),
    "topics": Kind(TOPICS, [bad(pa.int64(), 1), bad(pa.list_(pa.float64()), [1.0]), *BAD], optional=True),
    "content": Kind(TEXT, [*BAD, bad(pa.list_(pa.string()), ["a"])], optional=True),
    "image_path": Kind([Carrier(pa.string(), lambda rng: rng.choice(["a.png", " b/c.jpg ", ""]), trimmed)],
                       [bad(pa.binary(), b"a"), bad(pa.float64(), 1.0)], optional=True),
    "image": Kind(BYTES, [bad(pa.string(), "a"), bad(pa.int64(), 1)], optional=True, in_text=False),
}  # fmt: skip
EVENTS = {
    "user_id": Kind(ID, BAD),
    "note_id": Kind(ID, BAD),
    "timestamp": Kind(TIME, BAD_TIME, (True, {})),
    "event": Kind(EVENT, BAD_EVENT, ({},)),
}


def write_parts(folder: Path, kinds: dict[str, Kind], rng: Random, nulls: Sequence[float] = (0, 0, 0.3, 1)) -> Written:
    """Write one to three parts of random formats into `folder`; a third of the tables have faults.

    `nulls`: the shares of null values, of which each column has one.
    """
    written, with_faults = Written(), rng.random() < 0.3
    for number in range(rng.randint(1, 3)):
        num_rows = rng.choice([0, 1, 2, 7])
        formats: list[Write] = [_parquet, _parquet, _csv]
        write = rng.choice([*formats, _jsonl] if num_rows else formats)  # without a line, the file would be empty
        in_parquet = write is _parquet
        possible = [name for name, kind in kinds.items() if in_parquet or kind.in_text]
        names = [name for name in possible if not kinds[name].optional or rng.random() < 0.7]
        rng.shuffle(names)
        columns: dict[str, Carrier] = {}
        values: Values = {}
        for name in names:
            carrier, null_share = rng.choice(kinds[name].good), rng.choice(nulls)
            if not in_parquet and pa.types.is_nested(carrier.type):
                carrier = next(c for c in kinds[name].good if pa.types.is_string(c.type))
            if with_faults and rng.random() < 0.15:
                if in_parquet:
                    carrier = rng.choice(kinds[name].bad)
                elif write is _jsonl:
                    carrier, null_share = bad(pa.null(), rng.choice(kinds[name].bad_json)), 0
            values[name] = [None if rng.random() < null_share else carrier.draw(rng) for _ in range(num_rows)]
            columns[name] = carrier
        malformed = 0 if in_parquet or num_rows < 2 or not with_faults else rng.choice([0, 0, 1, 2])
        file = write(folder / f"part-{number}", columns, values, malformed, rng)
        written.malformed += malformed
        written.names |= {*names}
        written.refused += [(file.name, name) for name, carrier in columns.items() if carrier.refused]
        for row in range(num_rows):
            present = {name: values[name][row] for name in columns if values[name][row] is not None}
            read = {name: columns[name].expected(value) for name, value in present.items() if not columns[name].refused}
            written.rows.append({name: read.get(name) for name in kinds})
    return written


def _parquet(path: Path, columns: dict[str, Carrier], values: Values, malformed: int, rng: Random) -> Path:
    arrays = {name: pa.array(values[name], carrier.type) for name, carrier in columns.items()}
    other = rng.choice(ANY)
    arrays["other"] = pa.array([other.draw(rng)] * len(next(iter(values.values()))), other.type)
    compression, version = rng.choice(["none", "snappy", "zstd", "gzip"]), rng.choice(["1.0", "2.0"])
    file, row_group_size = path.with_suffix(".parquet"), rng.randint(1, 9)
    pq.write_table(
        pa.table(arrays), file, compression=compression, row_group_size=row_group_size, data_page_version=version
    )
    return file


def _packed(file: Path, data: str, rng: Random) -> Path:
    packers: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": _zstd,
    }
    suffix, pack = rng.choice([*packers.items()])
    file = file.with_name(file.name + suffix)
    file.write_bytes(pack(data.encode()))
    return file


def _zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def _csv(path: Path, columns: dict[str, Carrier], values: Values, malformed: int, rng: Random) -> Path:
    delimiter, end = rng.choice(",\t"), rng.choice(["\n", "\r\n"])

    def written(value: Any) -> str:
        plain = str(value).lower() if isinstance(value, bool) else str(value)
        needs_quotes = any(c in plain for c in f'{delimiter}"\r\n') or plain.strip() != plain
        return f'"{plain.replace(chr(34), chr(34) * 2)}"' if needs_quotes or rng.random() < 0.3 else plain

    names = [*columns, "other"]
    rows = zip(*(values[name] for name in columns), strict=True)
    lines = [[*("" if value is None else written(value) for value in row), '"x"'] for row in rows]
    for _ in range(malformed):
        lines.insert(rng.randint(0, len(lines)), ["x"] * rng.choice([len(names) - 1, len(names) + 1]))
    text = "".join(delimiter.join(line) + end for line in [names, *lines])
    return _packed(path.with_suffix(".csv" if delimiter == "," else ".tsv"), rng.choice(["", "\ufeff"]) + text, rng)


def _jsonl(path: Path, columns: dict[str, Carrier], values: Values, malformed: int, rng: Random) -> Path:
    def plain(value: Any) -> Any:
        return value if isinstance(value, str | int | float | list | dict) else str(value)

    lines = [{name: plain(values[name][row]) for name in columns if values[name][row] is not None}
             for row in range(len(next(iter(values.values()))))]  # fmt: skip
    first = dict.fromkeys([*columns, "other"])  # a key that no line has would be no column
    written = [json.dumps({**first, **line, "other": {"a": [1]}}) for line in lines]
    for _ in range(malformed):
        written.insert(rng.randint(0, len(written)), rng.choice(["[1]", "{", '"a": 1}', "null"]))
    return _packed(path.with_suffix(".jsonl"), "\n".join(written), rng)


@contextmanager
def folder_named(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name)
        folder.mkdir()
        yield folder


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [row for split in table.splits() for batch in table.read(split) for row in batch.to_pylist()]


def compare(table: Callable[[Path], Table], name: str, kinds: dict[str, Kind], required: set[str], seed: int) -> None:
    """Write a random table, and read it."""
    rng = Random(seed)
    with folder_named(name) as folder:
        written = write_parts(folder, kinds, rng)
        missing = sorted(required - written.names)
        if not missing and not written.refused:
            # A missing text is empty, whichever way a format writes it.
            rows = rows_of(table(folder.parent))
            read = [{name: row[name] or None for name in kinds} for row in rows if not row[MALFORMED]]
            assert read == [{name: value or None for name, value in row.items()} for row in written.rows]
            assert len(rows) - len(read) == written.malformed
            return
        with pytest.raises(ValueError, match=name) as error:
            rows_of(table(folder.parent))
        named = [column for column in missing if f"column {column}" in str(error.value)]
        named += [column for file, column in written.refused if file in str(error.value) and column in str(error.value)]
        assert named and "\n" not in str(error.value)


@random_tables
@given(seed=SEEDS)
def test_notes(seed: int) -> None:
    compare(open_notes, "notes", NOTES, {"title", "topics", "content"}, seed)


@random_tables
@given(seed=SEEDS)
def test_events(seed: int) -> None:
    def table(path: Path) -> Table:
        (opened,) = open_events(path)
        return opened

    compare(table, "events", EVENTS, set(), seed)


SOME_ID = [Carrier(kind.type, lambda rng: f"n{rng.randrange(9)}") for kind in ID if kind.expected is id_of]
SOME_ID += [Carrier(pa.uint64(), lambda rng: 2**64 - 1 - rng.randrange(3), str)]
TARGETS = [
    *SOME_ID,
    Carrier(pa.list_(pa.string()), lambda rng: [f"n{rng.randrange(9)}" for _ in range(rng.randrange(3))]),
]
RELEVANCE = [
    Carrier(pa.int8(), lambda rng: rng.randrange(-1, 4), float),
    Carrier(pa.float64(), lambda rng: rng.choice([0.5, 1.0, 0.0, 2.5])),
    Carrier(pa.string(), lambda rng: rng.choice(["1", "0", "2.5"]), float),
    Carrier(pa.float64(), lambda rng: rng.choice([1.0, math.nan])),
]


@random_tables
@given(seed=SEEDS)
def test_pairs(seed: int) -> None:
    """The pairs with a relevance above 0, each once with its highest. Every row needs its ids and its relevance."""
    rng = Random(seed)
    kinds = {"query_id": Kind(SOME_ID, BAD), "target_id": Kind(TARGETS, BAD)}
    if grade := rng.choice([None, "relevance", "label"]):
        kinds[grade] = Kind(RELEVANCE, [bad(pa.binary(), b"1")], ({},))
    with folder_named("pairs") as folder:
        written = write_parts(folder, kinds, rng, nulls=(0, 0, 0, 0, 0, 0, 0, 0.3))
        best: dict[tuple[str, str], float] = {}
        is_whole = not written.refused and not written.malformed
        for row in written.rows:
            targets = row["target_id"] if isinstance(row["target_id"], list) else [row["target_id"]]
            if not targets:  # no pair, so nobody needs the rest
                continue
            relevance = row[grade] if grade else 1.0
            is_whole &= None not in (row["query_id"], *targets, relevance) and math.isfinite(relevance or 0)
            if is_whole and relevance > 0:
                for target in targets:
                    best[row["query_id"], target] = max(relevance, best.get((row["query_id"], target), 0))
        if is_whole:
            pairs = read_pairs(folder).pairs
            graded = pairs.relevance or (1.0,) * len(pairs)
            read = zip(pairs.query_ids, pairs.target_ids, graded, strict=True)
            assert [((query, target), its_grade) for query, target, its_grade in read] == sorted(best.items())
        else:
            with pytest.raises(ValueError, match="part-.* (column|has no id|relevance|no row)") as error:
                read_pairs(folder)
            assert "\n" not in str(error.value)


VECTOR_FAULTS = ("length", "nan", "null", "width", "twice", "no id", "whole numbers")


@random_tables
@given(seed=SEEDS)
def test_embeddings(seed: int) -> None:
    """Unit vectors with their ids, in any type of list and of floats; a fault names the file or the note."""
    rng = Random(seed)
    width, counts = rng.randint(1, 5), [rng.choice([0, 1, 3]) for _ in range(rng.randint(1, 3))]
    fault = rng.choice(VECTOR_FAULTS) if sum(counts) > 1 and rng.random() < 0.5 else None
    place = rng.choice([number for number, count in enumerate(counts) if count]) if fault else None
    rows: list[tuple[str, np.ndarray]] = []
    with folder_named("embeddings") as folder:
        for number, count in enumerate(counts):
            part = [(f"n{len(rows) + row}", _unit(rng, width)) for row in range(count)]
            rows += part
            floats = rng.choice([pa.float32(), pa.float64(), pa.float16()])
            kind = rng.choice([pa.list_(floats), pa.large_list(floats), pa.list_(floats, width)])
            ids: list[Any] = [note_id for note_id, _ in part]
            vectors: list[Any] = [vector.tolist() for _, vector in part]
            if fault is not None and number == place:
                ids, vectors, kind = _broken(fault, ids, vectors, kind)
            if pa.types.is_float16(kind.value_type):
                vectors = [vector and [np.float16(x) for x in vector] for vector in vectors]
            columns = {"embedding": pa.array(vectors, kind), "note_id": pa.array(ids, rng.choice(TEXT_TYPES))}
            names = rng.sample([*columns], 2)
            pq.write_table(pa.table({name: columns[name] for name in names}), folder / f"part-{number}.parquet")
        if fault is None:
            read = read_embeddings(folder)
            assert [*read.note_ids] == [note_id for note_id, _ in rows]
            if rows:
                assert np.abs(read.vectors - np.stack([vector for _, vector in rows])).max() < 1e-3  # half precision
            return
        with pytest.raises(ValueError, match=r"embeddings") as error:
            read_embeddings(folder)
        assert "\n" not in str(error.value)


def _unit(rng: Random, width: int) -> np.ndarray:
    vector = np.array([rng.gauss(0, 1) for _ in range(width)])
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit


def _broken(
    fault: str, ids: list[Any], vectors: list[Any], kind: pa.DataType
) -> tuple[list[Any], list[Any], pa.DataType]:
    """A part with this fault in its first row. The table has other rows, in this part or in others."""
    first, rest = vectors[0], vectors[1:]
    match fault:
        case "length":
            return ids, [[2 * x for x in first], *rest], kind
        case "nan":
            return ids, [[math.nan, *first[1:]], *rest], kind
        case "null":
            return ids, [None, *rest], kind
        case "width":
            return ids, [[*first, 0.0], *rest], pa.list_(kind.value_type)
        case "twice":
            return ["n0" if ids[0] != "n0" else "n1", *ids[1:]], vectors, kind
        case "no id":
            return [None, *ids[1:]], vectors, kind
        case _:
            return ids, [[1] * len(vector) for vector in vectors], pa.list_(pa.int8())
