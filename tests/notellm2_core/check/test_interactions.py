"""The labels of events against a slow reference: row by row, with dictionaries."""

from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.check.interactions import label
from notellm2_core.check.log import read_log
from notellm2_core.config.source import EventReadingSettings, EventSettings
from notellm2_core.lake.window import Days, ResolvedWindow
from notellm2_core.tables.source import open_events

DAY0 = date(2024, 1, 1)
WINDOW = ResolvedWindow(Days(DAY0, DAY0 + timedelta(2)), Days(DAY0 + timedelta(2), DAY0 + timedelta(3)))
SETTINGS = {"view_events": ("view",), "click_events": ("click",), "max_events_per_day": 3}
KNOWN = {"n0", "n1"}
Row = tuple[str | None, str | None, int, str | None, float | None]  # user, note, hours since DAY0, event, weight
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["u0", "u0", "u1", "u2", None]), st.sampled_from(["n0", "n1", "n2", None]),
        st.integers(-6, 80).map(lambda hours: hours // 6 * 6),
        st.sampled_from(["view", "click", "skip", "view\0", None]),
        st.sampled_from([1.0, 1.0, 0.0, -0.0, -1.0, float("nan"), None]),
    ),
    max_size=40,
)  # fmt: skip


def reference(rows: list[Row], ignored: tuple[str, ...], weighted: bool) -> tuple[Counter[str], int, int]:
    """Events of the windows by reason ("": usable), the number of robots, and that of usable clicks."""
    reasons: Counter[str] = Counter()
    valid: dict[tuple[object, ...], Row] = {}
    by_day: Counter[tuple[str | None, int]] = Counter()
    for row in rows:
        user, note, hours, event, weight = row[0], row[1], row[2], row[3] or "", row[4] if weighted else 1.0
        key = (user, note, hours, event, str(weight + 0.0 if weight is not None else None))
        if not 0 <= hours < 72:
            continue
        if event in ignored:
            reasons["ignored_event"] += 1
        elif user is None:
            reasons["null_user"] += 1
        elif note is None:
            reasons["null_note"] += 1
        elif event not in ("view", "click"):
            reasons["unknown_event"] += 1
        elif event == "click" and not (weight is not None and weight >= 0):
            reasons["bad_weight"] += 1
        else:
            by_day[user, hours // 24] += 1
            reasons["duplicate_event"] += key in valid
            valid.setdefault(key, row)
    robots = {user for (user, _), num in by_day.items() if num > 3}
    usable = [row for row in valid.values() if row[0] not in robots and row[1] in KNOWN]
    for row in valid.values():
        reasons["robot" if row[0] in robots else "" if row[1] in KNOWN else "unknown_note"] += 1
    clicks = sum(row[3] == "click" and not (weighted and row[4] == 0) for row in usable)
    return +reasons, len(robots), clicks


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, size=st.integers(1, 15), ignore_all=st.booleans(), one_window=st.booleans(), weighted=st.booleans())
def test_labels(rows: list[Row], size: int, ignore_all: bool, one_window: bool, weighted: bool, tmp_path: Path) -> None:
    events = EventSettings(**SETTINGS, ignored_events=None if ignore_all else ("skip",))  # type: ignore[arg-type]
    whole = Days(WINDOW.train.start, WINDOW.test.end)
    window = ResolvedWindow(whole, whole) if one_window else WINDOW
    columns = [[row[i] for row in rows] for i in (0, 1, 3)]
    seconds = [1704067200 + 3600 * row[2] for row in rows]
    table = pa.table(
        {"user_id": pa.array(columns[0], pa.string()), "note_id": pa.array(columns[1], pa.string()),
         "timestamp": pa.array(seconds, pa.int64()), "event": pa.array(columns[2], pa.string()),
         "w": pa.array([row[4] for row in rows], pa.float64())}
    )  # fmt: skip
    pq.write_table(table, tmp_path / "events.parquet", row_group_size=size)
    reading = EventReadingSettings(columns={"weight": "w"} if weighted else None)
    log = read_log(tmp_path, open_events(tmp_path, reading), events)
    metrics = label(log, window, pa.array(sorted(KNOWN)), events).metrics(events)
    reasons, robots, clicks = reference(rows, ("skip", "view\0", "") if ignore_all else ("skip",), weighted)
    assert metrics["dropped"] == {r: n for r, n in reasons.items() if r not in ("", "ignored_event")}
    assert metrics["rows"] == reasons.total() and metrics["robots"] == robots
    assert metrics["ignored_event"] == reasons["ignored_event"]
    windows = [metrics["train"]] if one_window else [metrics["train"], metrics["test"]]
    assert sum(counts["events"] for counts in windows) == reasons[""]
    assert sum(counts["clicks"] for counts in windows) == clicks
    assert log.undated == {}
