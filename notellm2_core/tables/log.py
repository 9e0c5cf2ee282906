"""A log of events as a whole: its days, the files that are ingested together, and its partitions.

However the rows were read, by Spark or without it, these functions judge the log by the same counts.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

from notellm2_core.config.source import Partition

UNDATED = "undated"  # the partition of rows without a plausible time
IGNORED = "ignored_event"  # the reason of rows that the settings ignore; they are not faulty, so not quarantined
PLAUSIBLE = ("1970-01-02", "2099-12-31 23:59:59.999999")
Span = tuple[date, date]  # days [start, end)
_MAX_INGESTIONS = 64  # in one run


def ingested_together(files: Sequence[str]) -> list[list[str]]:
    """The groups of files that are ingested together: one file each; from more than _MAX_INGESTIONS files, several."""
    size = max(1, -(-len(files) // _MAX_INGESTIONS))
    return [list(files[start : start + size]) for start in range(0, len(files), size)]


def ingestion_metrics(source: Path, ingestions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of a log: the results of `ingest` over all files of `source`, summed up.

    Returns rows, undated (rows), most_undated {file, share}, first_day, last_day, covered_until (see the function),
    events {name: rows}, and partitions [{partition, rows}]. most_undated is the ingestion with the largest share of
    undated rows, named by its first file, so that many good weeks do not hide a broken one. Ingestions under 1 % of the
    usual size are ignored. Raises ValueError for a log without rows, and for one without a readable time.
    """
    rows, days, events = (summed_counts(metrics[key] for metrics in ingestions) for key in ("rows", "days", "events"))
    if not rows:
        raise ValueError(f"the events of {source} have no rows.")
    if not days:
        raise ValueError(
            f"no timestamp of the events of {source} is readable and between {PLAUSIBLE[0]} and 2099; use Unix "
            "seconds or ISO 8601, or set source.timestamp_format."
        )
    sizes = [sum(metrics["rows"].values()) for metrics in ingestions]
    shares = [
        (-metrics["rows"].get(UNDATED, 0) / size, metrics["files"][0])
        for metrics, size in zip(ingestions, sizes, strict=True)
        if size >= _usual(sizes) / 100
    ]
    share, file = min(shares)  # the first file among equal shares
    return {
        "rows": sum(rows.values()),
        "undated": rows[UNDATED],
        "most_undated": {"file": file, "share": -share},
        "first_day": min(days),
        "last_day": max(days),
        "covered_until": covered_until(days),
        "events": dict(sorted(events.items(), key=lambda item: (-item[1], item[0]))),
        "partitions": [
            {"partition": partition, "rows": rows[partition]} for partition in sorted(rows) if rows[partition]
        ],
    }


def covered_until(rows_by_day: Mapping[str, int]) -> str:
    """The last day with at least 1 % of a usual day's rows (usual: the day of the median row).

    Later rows come from devices with a wrong clock. The median day is no measure of a usual day: a few such devices,
    each on its own day, can account for most of the days.
    """
    usual = _usual(rows_by_day.values())
    return max(day for day, rows in rows_by_day.items() if rows >= usual / 100)


def _usual(sizes: Iterable[int]) -> int:
    """The size of the group that holds the median row."""
    ordered = sorted(sizes)
    below = list(accumulate(ordered))
    return ordered[bisect_left(below, below[-1] / 2)]


def partition_days(name: str, unit: Partition) -> Span:
    """The days of a partition, which is named by its first day."""
    first = date.fromisoformat(name)
    return first, first + timedelta(days=7) if unit == "week" else date(first.year + 1, 1, 1)


def missing_days(rows_by_day: Mapping[str, int], week: Span) -> list[str]:
    """The days of `week` whose rows have not arrived: fewer than a tenth of what is usual for this day of the week.

    Usual: the median of the same day in the eight weeks before, as far as the log reaches. Days that usually have fewer
    than ten rows may have none.
    """
    start, end = week
    first = date.fromisoformat(min(rows_by_day))
    missing = []
    for day in (start + timedelta(days=n) for n in range((end - start).days)):
        earlier = [day - timedelta(weeks=n) for n in range(1, 9)]
        usual = _median([rows_by_day.get(str(d), 0) for d in earlier if d >= first])
        if usual >= 10 and rows_by_day.get(str(day), 0) < usual / 10:
            missing.append(str(day))
    return missing


def _median(values: Sequence[int]) -> int:
    """The middle one, the larger of two; 0 of none."""
    return sorted(values)[len(values) // 2] if values else 0


def partitions_between(
    start: date,
    end: date,
    unit: Partition,
    partitions: Sequence[Mapping[str, Any]],
    first_day: str,
    last_day: str,
    **others: Any,
) -> list[tuple[str, Span]]:
    """The ingested partitions that overlap the days [start, end), with the days of the overlap; without the undated.

    `partitions`, `first_day`, `last_day`: from `ingestion_metrics`. Raises ValueError where the log ends before `start`
    or begins at `end` or later.
    """
    if not (first_day < str(end) and str(start) <= last_day):
        raise ValueError(
            f"the log reaches from {first_day} to {last_day}, not into the window from {start} to {end} (exclusive): "
            "set window.end (or WEEK, where you named one), window.train_days or window.test_days"
        )
    overlaps = []
    for partition in sorted(p["partition"] for p in partitions if p["partition"] != UNDATED):
        first, after = partition_days(partition, unit)
        overlaps.append((partition, (max(first, start), min(after, end))))
    return [(partition, days) for partition, days in overlaps if days[0] < days[1]]


def summed_counts(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of several counts, by name."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return total
