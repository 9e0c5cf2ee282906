"""The events of a source, read once: counts by file, and every row with a plausible time as a few numbers.

What the graph keeps as tables of Spark (`spark_jobs.ingest`) is here in memory: 20 bytes a row, and each id once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.config.source import EventSettings, Partition
from notellm2_core.lake.window import first_day_of_week
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.tables.formats import Split
from notellm2_core.tables.log import IGNORED, PLAUSIBLE, UNDATED, ingested_together
from notellm2_core.tables.source import WEIGHT
from notellm2_core.tables.table import MALFORMED, Table
from notellm2_core.tables.times import TIME

DAY = 86_400_000_000  # in microseconds
EPOCH = date(1970, 1, 1)
_FIRST, _LAST = (datetime.fromisoformat(bound).replace(tzinfo=UTC) for bound in PLAUSIBLE)
_CODES = pa.dictionary(pa.int32(), pa.string())
_DATED = pa.schema(
    [("user_id", _CODES), ("note_id", _CODES), ("event", _CODES), ("time", pa.int64()), ("weight", pa.float64())]
)


@dataclass
class FileCounts:
    """The counts of files that are ingested together."""

    files: list[str]  # relative to the source
    rows_by_day: Counter[int] = field(default_factory=Counter)  # days since 1970
    undated: Counter[str] = field(default_factory=Counter)  # by reason, among them IGNORED
    events: Counter[str] = field(default_factory=Counter)

    def metrics(self, unit: Partition) -> dict[str, Any]:
        """What `spark_jobs.ingest.ingest` returns for these files; of `events`, all names."""
        days = {EPOCH + timedelta(days=day): rows for day, rows in sorted(self.rows_by_day.items())}
        rows: Counter[str] = Counter()
        for day, num in days.items():
            rows[str(first_day_of_week(day) if unit == "week" else date(day.year, 1, 1))] += num
        if undated := self.undated.total():
            rows[UNDATED] = undated
        by_day = {str(day): num for day, num in days.items()}
        return {"files": self.files, "rows": dict(rows), "days": by_day, "events": dict(self.events)}


@dataclass(frozen=True)
class DatedRows:
    """The rows with a plausible time. All arrays [n]; ids and names are places in the lists of them."""

    users: np.ndarray  # -1: null
    notes: np.ndarray  # -1: null
    events: np.ndarray
    times: np.ndarray  # microseconds since 1970
    user_ids: pa.Array
    note_ids: pa.Array
    names: list[str]  # of events; a null one is ""
    weights: np.ndarray | None  # of clicks, where the log has them; NaN: none
    weight_keys: np.ndarray | None  # int64, equal where the weights are


@dataclass(frozen=True)
class Place:
    """A batch of a table: the first that has a row of some kind."""

    table: Table
    split: Split
    batch: int


@dataclass(frozen=True)
class Log:
    """All events of a source."""

    tables: Sequence[Table]
    by_file: list[FileCounts]
    rows: DatedRows
    places: Mapping[str, Place]  # of the first row without a plausible time, by reason

    @property
    def undated(self) -> Counter[str]:
        """The rows without a plausible time, by reason."""
        return sum((counts.undated for counts in self.by_file), Counter())

    @property
    def events(self) -> Counter[str]:
        """The rows by the name of their event."""
        return sum((counts.events for counts in self.by_file), Counter())


def read_log(source: Path, tables: Sequence[Table], settings: EventSettings) -> Log:
    """The events of `tables`. Raises ValueError naming the file and the column that cannot be read."""
    files = dict.fromkeys(str(file.relative_to(source)) for table in tables for file in table.files)
    by_file = [FileCounts(group) for group in ingested_together(list(files))]
    counts_of = {file: counts for counts in by_file for file in counts.files}
    places: dict[str, Place] = {}
    batches: list[pa.RecordBatch] = []
    for table in tables:
        names = [column.name for column in table.columns]
        for split in table.splits():
            counts = counts_of[str(split.file.relative_to(source))]
            for number, batch in enumerate(Prefetcher(table.read(split, names))):
                dated, undated = _count(batch, counts, settings)
                batches.append(dated)
                for reason in undated:
                    places.setdefault(reason, Place(table, split, number))
    has_weights = any(column.name == WEIGHT.name for column in tables[0].columns)
    return Log(tables, by_file, _as_numbers(batches, has_weights), places)


def _count(batch: pa.RecordBatch, counts: FileCounts, settings: EventSettings) -> tuple[pa.RecordBatch, Counter[str]]:
    """Adds the rows of a batch to `counts`. Returns those with a plausible time, and the number of others by reason."""
    times = batch.column("timestamp")
    after, before = pc.greater_equal(times, pa.scalar(_FIRST, TIME)), pc.less_equal(times, pa.scalar(_LAST, TIME))
    is_plausible = pc.fill_null(pc.and_(after, before), False)
    events = pc.dictionary_encode(pc.fill_null(batch.column("event"), ""))
    for name in pc.value_counts(events):
        counts.events[name["values"].as_py()] += name["counts"].as_py()
    undated = Counter() if pc.all(is_plausible).as_py() else _undated(batch, is_plausible, events, settings)
    counts.undated += undated
    columns = {name: pc.dictionary_encode(batch.column(name)) for name in ("user_id", "note_id")}
    weights = batch.column(WEIGHT.name) if WEIGHT.name in batch.schema.names else pa.nulls(len(batch), pa.float64())
    columns |= {"event": events, "time": pc.cast(times, pa.int64()), "weight": weights}
    dated = pa.RecordBatch.from_pydict(columns, _DATED)
    dated = dated.filter(is_plausible)
    days, rows = np.unique(dated.column("time").to_numpy() // DAY, return_counts=True)
    counts.rows_by_day.update(dict(zip(days.tolist(), rows.tolist(), strict=True)))
    return dated, undated


def _undated(
    batch: pa.RecordBatch, is_plausible: pa.Array, events: pa.DictionaryArray, settings: EventSettings
) -> Counter[str]:
    """The rows without a plausible time by reason; the first that applies counts, as in `spark_jobs.clean`."""
    ignored = ignored_names(events.dictionary.to_pylist(), settings)
    is_ignored = pc.is_in(events.cast(pa.string()), pa.array(ignored, pa.string()))
    rest = pc.invert(is_plausible)
    counts: Counter[str] = Counter()
    for reason, holds in (
        ("malformed_row", batch.column(MALFORMED)),
        (IGNORED, is_ignored),
        ("bad_timestamp", batch.column("timestamp").is_null()),
        ("absurd_timestamp", rest),
    ):
        counts[reason] = pc.and_(rest, holds).true_count
        rest = pc.and_not(rest, holds)
    return +counts


def ignored_names(names: Sequence[str], settings: EventSettings) -> list[str]:
    """Those of the event names `names` that the settings ignore."""
    if settings.ignored_events is not None:
        return [name for name in names if name in settings.ignored_events]
    return [name for name in names if name not in (*settings.view_events, *settings.click_events)]


def _as_numbers(batches: Sequence[pa.RecordBatch], has_weights: bool) -> DatedRows:
    table = pa.Table.from_batches(batches, _DATED).unify_dictionaries()
    codes: dict[str, np.ndarray] = {}
    values: dict[str, pa.Array] = {}
    for name in ("user_id", "note_id", "event"):
        chunks = table[name].chunks
        codes[name] = pa.chunked_array([pc.fill_null(chunk.indices, -1) for chunk in chunks], pa.int32()).to_numpy()
        values[name] = chunks[0].dictionary if chunks else pa.array([], pa.string())
    weights, keys = _weights(table["weight"]) if has_weights else (None, None)
    return DatedRows(
        codes["user_id"], codes["note_id"], codes["event"], table["time"].to_numpy(), values["user_id"],
        values["note_id"], values["event"].to_pylist(), weights, keys,
    )  # fmt: skip


def _weights(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The weights, NaN where null, and keys that tell null from NaN, and not 0 from -0."""
    weights = pc.fill_null(column, float("nan")).to_numpy() + 0.0
    keys = np.where(np.isnan(weights), np.nan, weights).view(np.int64)
    return weights, np.where(column.is_null().to_numpy(), -1, keys)  # -1: the bits of no number, and of no other NaN
