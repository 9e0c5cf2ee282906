"""Eq. 2 inside a Spark task: Arrow batches in, Arrow batches and files of scores out.

`build_histories` turns the interactions of whole users into histories (`histories.py`); `write_scores` turns the
histories of one block of queries into a file of scores (`eq2.py`). In between, a note is its index among the ids that
`write_note_ids` wrote to a file, which every worker memory-maps. Given a Timing, `timed_histories.py` and
`timed_eq2.py` take the place of the two.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.config.data import ScoringSettings
from notellm2_core.runtime.files import written_whole
from notellm2_core.schema import CLICK_WEIGHT, SCORES
from spark_jobs.scoring.arrays import run_starts
from spark_jobs.scoring.eq2 import Pairs, gathered, pair_scores
from spark_jobs.scoring.histories import HISTORIES, NEVER, Follows, Histories, histories, summed
from spark_jobs.scoring.quantiles import SHARES, bin_counts, lower_ends
from spark_jobs.scoring.swing import swing_scores
from spark_jobs.scoring.timed_eq2 import timed_scores
from spark_jobs.scoring.timed_histories import TIMED_HISTORIES, TimedRows, Timing, timed_histories

_INTERACTIONS = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("first_view", pa.int64()),  # microseconds
        pa.field("last_click", pa.int64()),  # null: not clicked
    ]
)
_TIMED_INTERACTIONS = _INTERACTIONS.append(CLICK_WEIGHT)
HISTORY_CHUNKS = pa.schema(
    [
        pa.field("block", pa.int32()),
        pa.field("histories", pa.binary()),  # HISTORIES as bytes: Spark would convert a list number by number
        pa.field("losses", pa.binary()),  # _LOSSES, likewise
        pa.field("capped_users", pa.int64()),
        pa.field("users_loss", pa.float64()),
    ]
)
BLOCK_METRICS = pa.schema(
    [
        pa.field("pairs", pa.int64()),
        pa.field("queries", pa.int64()),
        pa.field("max_users", pa.int64()),
        pa.field("max_score", pa.float64()),
        pa.field("scores", pa.list_(pa.float64())),  # a histogram: the lower ends of its bins (`quantiles.bins`) ...
        pa.field("counts", pa.list_(pa.int64())),  # ... and the pairs in them
        pa.field("capped_users", pa.int64()),
        pa.field("users_loss", pa.float64()),
        pa.field("view_loss", pa.float64()),  # the largest note_loss of a note cut from views
        pa.field("click_loss", pa.float64()),  # ... and from clicks
    ]
)
_LOSSES = pa.schema(
    [pa.field("key", pa.int64()), pa.field("loss", pa.float64())]
)  # key: 2 note + (1 if cut from clicks)
_SCORES_BY_DICTIONARY = pa.schema(
    [f.with_type(pa.dictionary(pa.int32(), pa.string())) if pa.types.is_string(f.type) else f for f in SCORES]
)


def write_note_ids(note_ids: pa.ChunkedArray, file: Path) -> None:
    """Write `note_ids` (distinct), sorted, to `file`: the index of an id is the note's number."""
    ids = note_ids.take(pc.sort_indices(note_ids)).cast(pa.string()).combine_chunks()
    batch = pa.record_batch([ids], ["note_id"])
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _read_note_ids(file: Path) -> pa.StringArray:
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)["note_id"]


def build_histories(
    batches: Iterator[pa.RecordBatch],
    note_ids: Path,
    num_blocks: int,
    scoring: ScoringSettings,
    timing: Timing | None = None,
) -> Iterator[pa.RecordBatch]:
    """_INTERACTIONS of whole users -> HISTORY_CHUNKS: by block, their histories and what the cap cut from its notes.

    Given a `timing`, the interactions have CLICK_WEIGHT, too.
    """
    columns = _INTERACTIONS if timing is None else _TIMED_INTERACTIONS
    rows = pa.Table.from_batches([b.cast(columns) for b in batches], columns)
    if scoring.score == "swing":
        rows = rows.filter(pc.is_valid(rows["last_click"]))
    if not rows.num_rows:
        return
    users, notes = (_numbered(rows[name]) for name in ("user_id", "note_id"))
    numbers = pc.index_in(notes.dictionary, _read_note_ids(note_ids)).to_numpy()
    user, note = users.indices.to_numpy().astype(np.int64), numbers[notes.indices.to_numpy()].astype(np.int64)
    view, click = rows["first_view"].to_numpy(), rows["last_click"].fill_null(NEVER).to_numpy()
    built: Histories
    if timing is not None:
        # A limit needs every view and click: rows that were reduced to the first and the last would give wrong scores.
        assert timing.max_gap is None or ((click == NEVER) | (click == view)).all()
        weight = rows[CLICK_WEIGHT.name].to_numpy()
        built, capped = timed_histories(TimedRows(user, note, view, click, weight), timing)
    else:
        follows: Follows = "any" if scoring.score == "swing" else "not earlier" if scoring.simultaneous else "later"
        built, capped = histories(user, note, view, click, follows, scoring.max_user_notes)
    for block, chunk in built.chunks(num_blocks):
        yield _row(HISTORY_CHUNKS, block, _bytes(chunk), None, 0, 0.0)
    for block in np.unique(capped.note % num_blocks).tolist():
        in_block = capped.note % num_blocks == block
        losses = [pa.array((capped.note << 1 | capped.clicked)[in_block]), pa.array(capped.note_loss[in_block])]
        yield _row(HISTORY_CHUNKS, block, None, _bytes(pa.record_batch(losses, schema=_LOSSES)), 0, 0.0)
    yield _row(HISTORY_CHUNKS, 0, None, None, capped.users, capped.loss)


def _numbered(ids: pa.ChunkedArray) -> pa.DictionaryArray:
    """Dictionary-encoded first: all ids of a partition can be more bytes than one Arrow array holds."""
    return ids.dictionary_encode().combine_chunks()


def write_scores(
    chunks: Iterator[pa.RecordBatch],
    note_ids: Path,
    out: Path,
    scoring: ScoringSettings,
    timing: Timing | None = None,
) -> Iterator[pa.RecordBatch]:
    """HISTORY_CHUNKS of one block -> its file of SCORES in `out`, by query and target; yields one row of BLOCK_METRICS.

    The file is written whole, then renamed. A task that is retried, or runs twice at once, writes the same bytes.
    """
    rows = [row for batch in chunks for row in batch.to_pylist()]
    if not rows:
        return
    table = _table(HISTORIES if timing is None else TIMED_HISTORIES, (row["histories"] for row in rows))
    ids = _read_note_ids(note_ids)
    file = out / f"part-{rows[0]['block']:05d}.parquet"
    metrics = _BlockMetrics()
    scored = gathered(_scored(table, scoring) if timing is None else timed_scores(table))
    pairs = next(scored, None)
    if pairs is not None:
        with written_whole(file) as draft, _writer(draft) as writer:
            while pairs is not None:
                writer.write_table(_with_ids(pairs, ids))
                metrics.add(pairs)
                pairs = next(scored, None)
    users, users_loss = sum(row["capped_users"] for row in rows), math.fsum(row["users_loss"] for row in rows)
    losses = _table(_LOSSES, (row["losses"] for row in rows))
    key, loss = summed(losses["key"].to_numpy(), losses["loss"].to_numpy())
    largest = (float(loss[key % 2 == clicked].max(initial=0.0)) for clicked in (0, 1))
    yield _row(BLOCK_METRICS, *metrics.row(), users, users_loss, *largest)


def _writer(file: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        file,
        _SCORES_BY_DICTIONARY,
        store_schema=False,  # with it, readers would return dictionaries for the ids
        dictionary_pagesize_limit=1 << 26,  # beyond it, ids are written in plain, four times as slowly
        write_statistics=["query_id"],  # the other columns are not sorted, so theirs would exclude no row group
        write_batch_size=1 << 16,
    )


def _scored(table: pa.Table, scoring: ScoringSettings) -> Iterator[Pairs]:
    if scoring.score == "swing":
        return swing_scores(table, scoring.swing_alpha, scoring.swing_max_users)
    return pair_scores(table)


def _with_ids(pairs: Pairs, ids: pa.StringArray) -> pa.Table:
    """SCORES with dictionary-encoded ids; the dictionaries hold only the ids that occur."""
    columns = [_dictionary(numbers, ids) for numbers in (pairs.query, pairs.target)]
    return pa.table([*columns, pairs.score, pairs.num_users], schema=_SCORES_BY_DICTIONARY)


def _dictionary(numbers: Any, ids: pa.StringArray) -> pa.DictionaryArray:
    occurs = np.zeros(len(ids), bool)
    occurs[numbers] = True
    index = np.cumsum(occurs, dtype=np.int32) - 1
    return pa.DictionaryArray.from_arrays(pa.array(index[numbers]), ids.filter(pa.array(occurs)))


class _BlockMetrics:
    """The metrics of a block's pairs, added up chunk by chunk. A chunk holds all pairs of its queries, in order."""

    def __init__(self) -> None:
        self.pairs = self.queries = self.max_users = 0
        self.max_score = 0.0
        self.bins: Counter[int] = Counter()

    def add(self, pairs: Pairs) -> None:
        self.pairs += len(pairs.query)
        self.queries += len(run_starts(pairs.query))
        self.max_users = max(self.max_users, int(pairs.num_users.max()))
        self.max_score = max(self.max_score, float(pairs.score.max()))
        self.bins.update(bin_counts(pairs.score))

    def row(self) -> tuple[Any, ...]:
        bins = sorted(self.bins)
        scores = lower_ends(np.array(bins, np.int64))
        return self.pairs, self.queries, self.max_users, self.max_score, scores, [self.bins[b] for b in bins]


def merged_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """BLOCK_METRICS of all blocks -> pairs, queries, max_users, score {quantiles}, histogram, capped_users, max_loss.

    Quantiles are rounded down to 1 %. The histogram has two bins per octave: `pairs` [n] between `edges` [n + 1].
    """
    bins: Counter[float] = Counter()
    for row in rows:
        bins.update(dict(zip(row["scores"], row["counts"], strict=True)))
    scores = sorted(bins)
    upto = np.cumsum([bins[s] for s in scores])
    quantiles = {
        name: scores[int(np.searchsorted(upto, max(1, share * upto[-1])))] if scores else None
        for name, share in SHARES.items()
    }
    return {
        "pairs": sum(row["pairs"] for row in rows),
        "queries": sum(row["queries"] for row in rows),
        "max_users": max((row["max_users"] for row in rows), default=0),
        "score": quantiles | {"max": max((row["max_score"] for row in rows), default=0) or None},
        "histogram": _histogram(bins),
        "capped_users": sum(row["capped_users"] for row in rows),
        "max_loss": _max_loss(rows),
    }


def _max_loss(rows: list[dict[str, Any]]) -> float:
    """An upper bound on what the cap takes from any score.

    A -> B loses 1 / N_u for each user whose view of A or click on B was cut: at most the largest view_loss plus the
    largest click_loss, and at most the loss over all capped users.
    """
    note_loss = sum(max((row[name] for row in rows), default=0.0) for name in ("view_loss", "click_loss"))
    return min(note_loss, math.fsum(row["users_loss"] for row in rows))


def _histogram(bins: Mapping[float, int]) -> dict[str, list[float]]:
    if not bins:
        return {"edges": [0.0, 1.0], "pairs": [0]}
    mantissa, exponent = np.frexp(list(bins))  # in [0.5, 1), split at 0.75, which is also a border of the finer bins
    half_octave = 2 * exponent + (mantissa >= 0.75)
    first = int(half_octave.min())
    pairs = np.bincount(half_octave - first, weights=list(bins.values())).astype(int)
    ends = np.arange(first, first + len(pairs) + 1)
    return {"edges": np.ldexp(np.where(ends % 2, 0.75, 0.5), ends // 2).tolist(), "pairs": pairs.tolist()}


def _bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _table(schema: pa.Schema, streams: Iterable[bytes | None]) -> pa.Table:
    batches = (batch for stream in streams if stream is not None for batch in pa.ipc.open_stream(stream))
    return pa.Table.from_batches(batches, schema)


def _row(schema: pa.Schema, *values: Any) -> pa.RecordBatch:
    columns = [pa.array([value], field.type) for value, field in zip(values, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
