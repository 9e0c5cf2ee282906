"""Every Arrow type in every column: read to the right value, or refused by its type."""

from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from notellm2_core.tables.columns import Kind, plain_column, read_column, valid_utf8

WHOLE = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
         pa.decimal128(20, 0), pa.decimal256(40, 0)]  # fmt: skip
TEXT = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2)]
OTHERS = [pa.bool_(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(5, 2), pa.date32(), pa.date64(),
          pa.time32("s"), pa.time64("us"), pa.timestamp("us"), pa.duration("s"), pa.map_(pa.string(), pa.string()),
          pa.struct([("a", pa.string())]), pa.month_day_nano_interval(), pa.uuid()]  # fmt: skip


def read(values: list[Any], kind: pa.DataType, as_kind: Kind) -> list[Any]:
    return list(read_column(plain_column(pa.array(values, kind)), as_kind).to_pylist())


@pytest.mark.parametrize("kind", WHOLE, ids=str)
def test_whole_numbers(kind: pa.DataType) -> None:
    values = [Decimal(7), None] if pa.types.is_decimal(kind) else [7, None]
    assert read(values, kind, Kind.ID) == ["7", None]
    assert read([values, None], pa.list_(kind), Kind.TEXTS) == [["7"], None]
    for other in (Kind.TEXT, Kind.BYTES, Kind.TEXTS):
        with pytest.raises(ValueError, match=rf"has type .*, not {other}"):
            read(values, kind, other)


def test_large_whole_numbers_keep_their_digits() -> None:
    assert read([2**64 - 1], pa.uint64(), Kind.ID) == ["18446744073709551615"]
    assert read([Decimal(10**19 + 1)], pa.decimal128(20, 0), Kind.ID) == ["10000000000000000001"]


@pytest.mark.parametrize("kind", TEXT, ids=str)
def test_text(kind: pa.DataType) -> None:
    assert read([" a\n", None, "", "007"], kind, Kind.ID) == ["a", None, None, "007"]
    assert read([" a\n", None, ""], kind, Kind.TEXT) == [" a\n", None, ""]
    assert read(["x| y ||z", None, ""], kind, Kind.TEXTS) == [["x", "y", "z"], None, []]
    assert read(["1970-01-02"], kind, Kind.TIME)[0].day == 2
    with pytest.raises(ValueError, match="has type string, not bytes"):
        read(["a"], kind, Kind.BYTES)


def test_ids_that_stand_for_nothing_are_null() -> None:
    """D6: writers put these where there is no id. A longer id that contains one is an id."""
    nothing = ["NULL", r"\N", "nan", "None", " ", "<NA>"]
    assert read([*nothing, "None1"], pa.string(), Kind.ID) == [None] * len(nothing) + ["None1"]


LISTS = [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_view(pa.string())]


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_lists_of_text(kind: pa.DataType) -> None:
    assert read([["a ", None], None], kind, Kind.TEXTS) == [["a"], None]
    with pytest.raises(ValueError, match="has type list<.*, not text or whole numbers"):
        read([["a", "b"]], kind, Kind.ID)


def test_lists_inside_slices_keep_their_rows() -> None:
    """A batch is a slice of a column, so its values start in the middle."""
    column = pa.array([["a"], ["b", "c"], None, ["d"]]).slice(1, 3)
    assert read_column(plain_column(column), Kind.TEXTS).to_pylist() == [["b", "c"], None, ["d"]]


@pytest.mark.parametrize(
    ("text", "topics"),
    [
        ("['x', 'y']", ["x", "y"]),
        ('["x", "a|b"]', ["x", "a|b"]),
        ("['it\\'s', \"q\"]", ["it's", "q"]),
        ("[]", []),
        ("['x' 'y']", ["['x' 'y']"]),  # numpy's: Python would read one topic xy
        ("[draft] a|b", ["[draft] a", "b"]),
        ("[27, 9]", ["27", "9"]),
        ("[red kite,tea]", ["red kite", "tea"]),  # as KuaiRec writes them
        ("[a, 'b, c']", ["[a, 'b, c']"]),
    ],
)
def test_the_text_of_a_list_is_that_list(text: str, topics: list[str]) -> None:
    """R11."""
    assert read([text], pa.string(), Kind.TEXTS) == [topics]


@pytest.mark.parametrize("kind", BYTES, ids=str)
def test_bytes(kind: pa.DataType) -> None:
    assert read([b"ab", None], kind, Kind.BYTES) == [b"ab", None]
    with pytest.raises(ValueError, match="has type binary, not text"):
        read([b"ab"], kind, Kind.TEXT)


def test_the_image_of_hugging_face_is_its_bytes() -> None:
    """R2."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert read([{"bytes": b"a", "path": "x.png"}, None], kind, Kind.BYTES) == [b"a", None]


@pytest.mark.parametrize("kind", OTHERS, ids=str)
@pytest.mark.parametrize("as_kind", [Kind.ID, Kind.TEXT, Kind.TEXTS, Kind.BYTES], ids=lambda k: k.name)
def test_all_other_types_are_refused(kind: pa.DataType, as_kind: Kind) -> None:
    if pa.types.is_binary(plain_column(pa.array([], kind)).type) and as_kind is Kind.BYTES:
        return  # a uuid is 16 bytes; no image has so few
    with pytest.raises(ValueError, match="has type "):
        read([], kind, as_kind)


@pytest.mark.parametrize("as_kind", list(Kind), ids=lambda k: k.name)
def test_a_column_of_nulls_has_any_type(as_kind: Kind) -> None:
    assert read([None, None], pa.null(), as_kind) == [None, None]


def test_bytes_that_are_not_utf8() -> None:
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"caf\xe9", None]).buffers())
    text, broken = valid_utf8(column)
    assert text.to_pylist() == ["ok", "caf\ufffd", None]
    assert broken is not None and broken.to_pylist() == [False, True, False]
    assert valid_utf8(pa.array(["\ufffd"]))[1] is None
