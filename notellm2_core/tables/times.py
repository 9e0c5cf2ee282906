"""Times in a user's table, of any form, as UTC timestamps in microseconds.

A time is one of
  - a number: Unix time in seconds (absolute value below 1e11), milliseconds (below 1e14), microseconds (below 1e17) or
    nanoseconds. The unit is unambiguous for times after 1973-03-03; earlier times are read correctly only in seconds;
  - a date as eight digits (20250119), as text or as a number;
  - ISO 8601 text: a date, or a date and time with or without an offset. Names of zones are not read, because many stand
    for several: CST is Chicago and Shanghai;
  - a timestamp or date of Arrow, of any unit.
A time that is no number and has no zone or offset is in the zone that the reader is given, or else in UTC. Where clocks
are put back, the first of two equal times counts; where they are put forward, a time that is skipped is the hour's end.
Any other value, and any time outside the years 1 to 9999, is unreadable: null. Floats need 64 bits: with 32, they have
no single seconds in this century.
"""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

TIME = pa.timestamp("us", "UTC")
_FIRST, _LAST = -62135596800000000, 253402300799999999  # 0001-01-01 .. 9999-12-31, the range of Python's datetime
_MIN, _MAX = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_WHOLE = r"^[+-]?(\d{1,18}|[1-8]\d{18}|9[01]\d{17})$"  # up to nanoseconds of 2261, which a double would round
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_DIGITS = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(\.0*)?$"  # as seconds, all would be in August 1970
_USUAL_ISO = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d:\d\d(\.\d{1,6})?)?$"
_USUAL_ZONED_ISO = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-](0\d|1[0-8]):[0-5]\d)$"
_LOCAL_ISO = r"^\d{4}-\d{1,2}-\d{1,2}([T ]\d{1,2}:\d{1,2}(:\d{1,2}(\.\d*)?)?)?$"
_ISO = (
    r"^(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"
    r"(?:[T ](?P<hour>\d{1,2}):(?P<minute>\d{1,2})(?::(?P<second>\d{1,2})(?:\.(?P<fraction>\d{0,9})\d*)?)?"
    r" ?(?P<zone>Z|UTC|GMT|(?P<sign>[+-])(?P<zone_hour>\d{1,2})(?::?(?P<zone_minute>\d\d))?)?)?$"
)


def read_times(column: pa.Array, zone: str | None = None) -> pa.Array | None:
    """The times of `column` as timestamp[us, UTC], null where unreadable. None: its type carries no times.

    `zone`: the zone of times that do not say theirs; None: UTC.
    """
    kind = column.type
    if pt.is_timestamp(kind):
        times = _times(*_scaled(pc.cast(column, pa.int64()), kind.unit))
        return times if kind.tz else _in_zone(times, zone)
    if pt.is_date32(kind):
        return _in_zone(_times(*_days(pc.cast(column, pa.int32()))), zone)
    if pt.is_date64(kind):
        return _in_zone(_times(*_scaled(pc.cast(column, pa.int64()), "ms")), zone)
    if pt.is_integer(kind) or (pt.is_decimal(kind) and kind.scale == 0):
        return _dates_in_zone(_times(*_unix(_int64(column))), column, zone)
    if pt.is_float64(kind) or pt.is_decimal(kind):
        return _dates_in_zone(_times(*_of_floats(pc.cast(column, pa.float64(), safe=False))), column, zone)
    return _of_text(column, zone) if pt.is_string(kind) else None


def read_written_times(column: pa.Array, pattern: str, zone: str | None = None) -> pa.Array:
    """The times of a column of text in the format `pattern` of strptime, as `read_times`; others are unreadable."""
    encoded = pc.dictionary_encode(pc.utf8_trim(column, " \t\r\n"))
    utc, local = ([_parsed(text, pattern, aware) for text in encoded.dictionary.to_pylist()] for aware in (True, False))
    times = pc.coalesce(pa.array(utc, TIME), _in_zone(pa.array(local, TIME), zone))
    return times.take(encoded.indices)


def _parsed(text: str, pattern: str, aware: bool) -> datetime | None:
    """The time of `text`, if it can be read and says its zone (`aware`) or does not."""
    try:
        time = datetime.strptime(text, pattern)
    except ValueError:
        return None
    if (time.tzinfo is not None) != aware:
        return None
    try:
        return time.astimezone(UTC) if aware else time.replace(tzinfo=UTC)
    except OverflowError:  # outside the years 1 to 9999
        return None


def _in_zone(times: pa.Array, zone: str | None) -> pa.Array:
    """`times`, read as UTC, as times of `zone`."""
    if zone is None:
        return times
    import pandas as pd  # it finds the zones where the machine has none of its own

    local = pd.DatetimeIndex(pc.cast(times, pa.timestamp("us")).to_numpy(zero_copy_only=False))
    is_first = np.ones(len(local), dtype=bool)
    zoned = local.tz_localize(zone, ambiguous=is_first, nonexistent="shift_forward")
    return pa.array(zoned.tz_convert("UTC").as_unit("us")).cast(TIME)


def _dates_in_zone(times: pa.Array, numbers: pa.Array, zone: str | None) -> pa.Array:
    """`times` of `numbers`: those that are dates, as times of `zone`."""
    if zone is None:
        return times
    values, _ = _numpy(pc.cast(numbers, pa.float64(), safe=False))
    whole = np.where(np.abs(values) < 2**53, values, 0).astype(np.int64)
    return pc.if_else(pa.array((whole == values) & _is_date(whole)), _in_zone(times, zone), times)


def _times(micros: np.ndarray, is_valid: np.ndarray) -> pa.Array:
    """`micros` [n] int64 as times; null where not `is_valid` or outside the years 1 to 9999."""
    valid = is_valid & (micros >= _FIRST) & (micros <= _LAST)
    return pa.array(micros, pa.int64(), mask=~valid).cast(TIME)


def _numpy(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The values of a primitive column, 0 where null, and where it is valid. Both [n]."""
    is_valid = column.is_valid().to_numpy(zero_copy_only=False)
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False), is_valid


def _int64(column: pa.Array) -> pa.Array:
    """Whole numbers as int64; null where they do not fit: no time is that large."""
    if pt.is_uint64(column.type) or pt.is_decimal(column.type):
        bound = pa.scalar(2**63 - 1).cast(column.type) if pt.is_uint64(column.type) else None
        if bound is None:
            return pa.array([v if v is None or abs(v) < 2**63 else None for v in column.to_pylist()], pa.int64())
        column = pc.if_else(pc.less_equal(column, bound), column, pa.scalar(None, column.type))
    return pc.cast(column, pa.int64())


def _scaled(column: pa.Array, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] in `unit` since 1970 -> microseconds, rounded down, and where they are in range."""
    values, is_valid = _numpy(column)
    if unit == "ns":
        return values // 1000, is_valid
    factor = _PER_UNIT[unit]
    in_range = (values >= _FIRST // factor) & (values <= _LAST // factor)
    return np.where(in_range, values, 0) * factor, is_valid & in_range


def _days(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, is_valid = _numpy(column)
    return values.astype(np.int64) * 86_400_000_000, is_valid


def _unix(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers as times (see the module docstring) -> microseconds, and where they are readable."""
    values, is_valid = _numpy(column)
    size = np.where(values == _MIN, _MAX, np.abs(values))
    nanoseconds = values // 1000 + (values % 1000 >= 500)
    micros = np.select(
        [size < 10**11, size < 10**14, size < 10**17],
        [np.where(size < 10**11, values, 0) * 1_000_000, np.where(size < 10**14, values, 0) * 1000, values],
        nanoseconds,
    )
    is_date = _is_date(values)
    if is_date.any():
        dates, exists = _calendar(values // 10_000, values // 100 % 100, values % 100)
        micros, is_valid = np.where(is_date, dates, micros), is_valid & (exists | ~is_date)
    return micros, is_valid


def _is_date(values: np.ndarray) -> np.ndarray:
    """Which whole numbers [n] are eight digits of a date, which may not exist. As seconds, all would be in 1970."""
    month, day = values // 100 % 100, values % 100
    return (values >= 19_000_101) & (values <= 20_991_231) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)


def _of_floats(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, is_valid = _numpy(column)
    is_finite = np.isfinite(values) & (np.abs(values) < 1e300)
    values = np.where(is_finite, values, 0.0)
    whole = (values == np.floor(values)) & (np.abs(values) < 2**53)
    micros, readable = _unix(pa.array(np.where(whole, values, 0).astype(np.int64)))
    size = np.abs(values)
    scale = np.select([size < 1e11, size < 1e14, size < 1e17], [1e6, 1e3, 1.0], 1e-3)
    scaled = values * scale
    in_range = np.abs(scaled) < 2**62
    rounded = np.where(in_range, np.floor(np.abs(scaled) + 0.5) * np.sign(scaled), 0).astype(np.int64)
    return np.where(whole, micros, rounded), is_valid & is_finite & np.where(whole, readable, in_range)


def _calendar(year: np.ndarray, month: np.ndarray, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first microsecond of these days, and where they exist. All [n]."""
    exists = (year >= 1) & (year <= 9999) & (month >= 1) & (month <= 12) & (day >= 1)
    months = np.where(exists, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + np.where(exists, day - 1, 0)
    exists &= days.astype("datetime64[M]") == months  # the 31st of a month of 30 days is in the next one
    return days.astype("datetime64[us]").astype(np.int64), exists


def _of_text(column: pa.Array, zone: str | None) -> pa.Array:
    """Each of the forms is read for all values that have it."""
    text = pc.utf8_trim(column, " \t\r\n")
    result = pa.nulls(len(text), TIME)
    readers = ((_DIGITS, _of_dates, zone), (_WHOLE, _of_whole, None), (NUMBER, _of_numbers, None),
               (_USUAL_ISO, _of_usual_iso, zone), (_USUAL_ZONED_ISO, _of_usual_zoned_iso, None),
               (_LOCAL_ISO, _of_iso, zone), (_ISO, _of_iso, None))  # fmt: skip
    rest = text.is_valid()
    for form, read, its_zone in readers:
        has_form = pc.and_(rest, pc.fill_null(pc.match_substring_regex(text, form), False))
        if pc.all(has_form).as_py():
            return _in_zone(read(text), its_zone)
        if pc.any(has_form).as_py():
            result = pc.replace_with_mask(result, has_form, _in_zone(read(text.filter(has_form)), its_zone))
            rest = pc.and_not(rest, has_form)
        if not pc.any(rest).as_py():
            break
    return result


def _of_dates(text: pa.Array) -> pa.Array:
    return _times(*_unix(pc.cast(pc.utf8_slice_codeunits(text, 0, 8), pa.int64())))


def _of_whole(text: pa.Array) -> pa.Array:
    return _times(*_unix(pc.cast(pc.utf8_ltrim(text, "+"), pa.int64())))


def _of_numbers(text: pa.Array) -> pa.Array:
    return _times(*_of_floats(pc.cast(pc.utf8_ltrim(text, "+"), pa.float64())))


def _of_usual_iso(text: pa.Array) -> pa.Array:
    return _of_usual(text, pa.timestamp("us"))


def _of_usual_zoned_iso(text: pa.Array) -> pa.Array:
    return _of_usual(text, TIME)


def _of_usual(text: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return _times(*_numpy(pc.cast(pc.cast(text, kind), pa.int64())))
    except pa.ArrowInvalid:  # one of them does not exist
        return _of_iso(text)


def _of_iso(text: pa.Array) -> pa.Array:
    parts = pc.extract_regex(text, _ISO)

    def number(name: str) -> np.ndarray:
        digits: Any = parts.field(name)
        return pc.cast(pc.if_else(pc.equal(digits, ""), "0", digits), pa.int64()).to_numpy(zero_copy_only=False)

    micros, exists = _calendar(number("year"), number("month"), number("day"))
    hour, minute, second = (number(name) for name in ("hour", "minute", "second"))
    exists &= (hour < 24) & (minute < 60) & (second < 60)
    zone_hour, zone_minute = number("zone_hour"), number("zone_minute")
    exists &= (zone_hour <= 18) & (zone_minute < 60)
    fraction = pc.cast(pc.utf8_slice_codeunits(pc.utf8_rpad(parts.field("fraction"), 6, "0"), 0, 6), pa.int64())
    offset = (zone_hour * 60 + zone_minute) * np.where(pc.equal(parts.field("sign"), "-"), -1, 1)
    seconds = hour * 3600 + (minute - offset) * 60 + second
    return _times(micros + seconds * 1_000_000 + fraction.to_numpy(zero_copy_only=False), exists)
