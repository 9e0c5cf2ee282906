"""Times of every form, to the microsecond."""

from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.tables.times import read_times

NOON = datetime(2024, 1, 3, 12, tzinfo=UTC)


def test_text_of_every_form() -> None:
    expected = {
        "1704283200": NOON,
        " 1704283200.25 ": NOON.replace(microsecond=250_000),
        "1.7042832e9": NOON,
        "+1704283200": NOON,
        "1704283200000": NOON,
        "1704283200000001": NOON.replace(microsecond=1),
        "1704283200000000000": NOON,
        "1704283200000000499": NOON,
        "1704283200000000500": NOON.replace(microsecond=1),  # a double has only every 256th of these
        "2024-01-03": NOON.replace(hour=0),
        "2024-1-3": NOON.replace(hour=0),
        "2024-01-03T12:00:00Z": NOON,
        "2024-01-03 12:00 UTC": NOON,
        "2024-01-03T14:00:00+02:00": NOON,
        "2024-01-03T04:30:00.000-0730": NOON,
        "2024-01-03 12:00:00.5": NOON.replace(microsecond=500_000),
        "2024-01-03T12:00:00.123456789": NOON.replace(microsecond=123_456),
        "0": datetime(1970, 1, 1, tzinfo=UTC),
        "-86400": datetime(1969, 12, 31, tzinfo=UTC),
        "20240103": NOON.replace(hour=0),
        "20240103.0": NOON.replace(hour=0),  # pandas' column of dates where one is missing
        "20241303": datetime(1970, 8, 23, 6, 35, 3, tzinfo=UTC),  # no thirteenth month: seconds
        "2024": datetime(1970, 1, 1, 0, 33, 44, tzinfo=UTC),  # a number, though it looks like a year
        **dict.fromkeys(
            ["", "soon", "2024-02-30", "20240230", "12:00:00", "2024-01", "NaN", "Infinity", "1e300", "1d", "0x10",
             "20240-01-01", "2024-01-03T25:00:00", "0000-01-01", "2024-01-03 10:00:00 CST",
             "2024-01-03T10:00:00[Asia/Shanghai]", "9" * 40, None]
        ),
    }  # fmt: skip
    times = read_times(pa.array(list(expected), pa.string()))
    assert times is not None and dict(zip(expected, times.to_pylist(), strict=True)) == expected
    alone = {text: read_times(pa.array([text], pa.string())) for text in expected}
    assert {text: time[0].as_py() for text, time in alone.items() if time is not None} == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1704283200, None], pa.int64()), [NOON, None]),
        (pa.array([1704283200], pa.uint32()), [NOON]),
        (pa.array([1704283200000, 2**64 - 1], pa.uint64()), [NOON, None]),
        (pa.array([20240103, 20240230], pa.int32()), [NOON.replace(hour=0), None]),
        (pa.array([-(2**63), 2**63 - 1], pa.int64()), [datetime(1677, 9, 21, 0, 12, 43, 145_224, tzinfo=UTC),
                                                       datetime(2262, 4, 11, 23, 47, 16, 854_776, tzinfo=UTC)]),
        (pa.array([1704283200.0, float("nan"), 20240103.0]), [NOON, None, NOON.replace(hour=0)]),
        (pa.array([Decimal(1704283200)], pa.decimal128(20, 0)), [NOON]),
        (pa.array([Decimal("1704283200.25")], pa.decimal128(20, 2)), [NOON.replace(microsecond=250_000)]),
        (pa.array([NOON.replace(tzinfo=None), None], pa.timestamp("ns")), [NOON, None]),
        (pa.array([3, -1], pa.timestamp("ns")), [datetime(1970, 1, 1, tzinfo=UTC),
                                                 datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)]),
        (pa.array([NOON], pa.timestamp("ms", tz="Asia/Shanghai")), [NOON]),
        (pa.array([2**62], pa.int64()).cast(pa.timestamp("s")), [None]),
        (pa.array([date(2024, 1, 3)], pa.date32()), [NOON.replace(hour=0)]),
        (pa.array([date(2024, 1, 3)], pa.date64()), [NOON.replace(hour=0)]),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_timestamps(column: pa.Array, expected: list[datetime | None]) -> None:
    times = read_times(column)
    assert times is not None and times.to_pylist() == expected


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.bool_(), pa.time64("us"), pa.duration("s")], ids=str)
def test_types_without_times(kind: pa.DataType) -> None:
    """A 32-bit float has a time every two minutes only."""
    assert read_times(pa.array([], kind)) is None


@given(st.lists(st.datetimes(datetime(1000, 1, 1), datetime(9999, 12, 31)), min_size=1, max_size=20))
def test_iso_text_equals_pythons_reading(times: list[datetime]) -> None:
    """Python's isoformat, with and without microseconds, and with offsets."""
    texts = [f"{time.isoformat()}{('', 'Z', '+05:30', '-08:00')[n % 4]}" for n, time in enumerate(times)]
    expected = [datetime.fromisoformat(text) for text in texts]
    utc = [time.replace(tzinfo=UTC) if time.tzinfo is None else time for time in expected]
    read = read_times(pa.array(texts))
    assert read is not None
    micros = read.cast(pa.int64()).to_pylist()
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    counted = [
        (t - epoch).days * 86_400_000_000 + (t - epoch).seconds * 1_000_000 + (t - epoch).microseconds for t in utc
    ]
    last = 253402300799999999
    assert micros == [c if c <= last else None for c in counted]
