"""Eq. 2 inside a Spark task: Arrow rows in, Arrow rows out, and the files of scores.

`build_histories` turns whole users' interactions into lists (`histories.py`), `write_scores` turns the lists of one
block of
queries into a file of scores (`eq2.py`). Notes are numbers in between: their places among the ids that `write_note_ids`
has put into a file, which every worker maps into its memory.
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
from notellm2_core.schema import SCORES
from spark_jobs.scoring.eq2 import Pairs, pair_scores
from spark_jobs.scoring.histories import HISTORIES, NEVER, histories, summed
from spark_jobs.scoring.quantiles import SHARES, bin_counts, lower_ends
from spark_jobs.scoring.swing import swing_scores

_ROWS = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("first_view", pa.int64()),  # microseconds
        pa.field("last_click", pa.int64()),  # null: not clicked
    ]
)
HISTORY_CHUNKS = pa.schema(
    [
        pa.field("block", pa.int32()),
        pa.field("lists", pa.binary()),  # HISTORIES as bytes: Spark would take a list apart, number by number
        pa.field("losses", pa.binary()),  # _LOSSES, likewise
        pa.field("capped_users", pa.int64()),
        pa.field("users_loss", pa.float64()),
    ]
)
FIGURES = pa.schema(
    [
        pa.field("pairs", pa.int64()),
        pa.field("queries", pa.int64()),
        pa.field("max_users", pa.int64()),
        pa.field("max_score", pa.float64()),
        pa.field("scores", pa.list_(pa.float64())),  # a histogram: the lower ends of its bins ...
        pa.field("counts", pa.list_(pa.int64())),  # ... and the pairs in them
        pa.field("capped_users", pa.int64()),
        pa.field("users_loss", pa.float64()),
        pa.field("view_loss", pa.float64()),  # the largest of a note whose views were cut
        pa.field("click_loss", pa.float64()),
    ]
)
_LOSSES = pa.schema([pa.field("key", pa.int64()), pa.field("loss", pa.float64())])  # key: 2 note + (1 if clicked)
_NAMED = pa.schema(
    [f.with_type(pa.dictionary(pa.int32(), pa.string())) if pa.types.is_string(f.type) else f for f in SCORES]
)


def write_note_ids(note_ids: pa.ChunkedArray, file: Path) -> None:
    """`note_ids` in their order, distinct as they come: the place of an id is the note's number."""
    ids = note_ids.take(pc.sort_indices(note_ids)).cast(pa.string()).combine_chunks()
    batch = pa.record_batch([ids], ["note_id"])
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _read_note_ids(file: Path) -> pa.StringArray:
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)["note_id"]


def build_histories(
    batches: Iterator[pa.RecordBatch], note_ids: Path, num_blocks: int, scoring: ScoringSettings
) -> Iterator[pa.RecordBatch]:
    """_ROWS of whole users -> HISTORY_CHUNKS: their lists by block, and by block what the cap has cut from its
    notes."""
    rows = pa.Table.from_batches([b.cast(_ROWS) for b in batches], _ROWS)
    if scoring.score == "swing":
        rows = rows.filter(pc.is_valid(rows["last_click"]))
    if not rows.num_rows:
        return
    users, notes = (_numbered(rows[name]) for name in ("user_id", "note_id"))
    numbers = pc.index_in(notes.dictionary, _read_note_ids(note_ids)).to_numpy()
    lists, capped = histories(
        users.indices.to_numpy().astype(np.int64),
        numbers[notes.indices.to_numpy()].astype(np.int64),
        rows["first_view"].to_numpy(),
        rows["last_click"].fill_null(NEVER).to_numpy(),
        "any" if scoring.score == "swing" else "not earlier" if scoring.simultaneous else "later",
        scoring.max_user_notes,
    )
    for block, piece in lists.pieces(num_blocks):
        yield _row(HISTORY_CHUNKS, block, _bytes(piece), None, 0, 0.0)
    for block in np.unique(capped.note % num_blocks).tolist():
        here = capped.note % num_blocks == block
        losses = [pa.array((capped.note << 1 | capped.clicked)[here]), pa.array(capped.note_loss[here])]
        yield _row(HISTORY_CHUNKS, block, None, _bytes(pa.record_batch(losses, schema=_LOSSES)), 0, 0.0)
    yield _row(HISTORY_CHUNKS, 0, None, None, capped.users, capped.loss)


def _numbered(ids: pa.ChunkedArray) -> pa.DictionaryArray:
    """Only the distinct ids are put together: all of a partition can be more bytes than an Arrow array holds."""
    return ids.dictionary_encode().combine_chunks()


def write_scores(
    pieces: Iterator[pa.RecordBatch], note_ids: Path, out: Path, scoring: ScoringSettings
) -> Iterator[pa.RecordBatch]:
    """HISTORY_CHUNKS of one block -> its file of SCORES in `out`, by query and target, and one row of FIGURES.

    The file appears whole. A task that is tried again, or runs twice at once, writes the same bytes.
    """
    rows = [row for batch in pieces for row in batch.to_pylist()]
    if not rows:
        return
    table = _table(HISTORIES, (row["lists"] for row in rows))
    ids = _read_note_ids(note_ids)
    file = out / f"part-{rows[0]['block']:05d}.parquet"
    figures = _Figures()
    scored = _scored(table, scoring)
    pairs = next(scored, None)
    if pairs is not None:
        with written_whole(file) as draft, _writer(draft) as writer:
            while pairs is not None:
                writer.write_table(_named(pairs, ids))
                figures.add(pairs)
                pairs = next(scored, None)
    users, users_loss = sum(row["capped_users"] for row in rows), math.fsum(row["users_loss"] for row in rows)
    losses = _table(_LOSSES, (row["losses"] for row in rows))
    key, loss = summed(losses["key"].to_numpy(), losses["loss"].to_numpy())
    largest = (float(loss[key % 2 == clicked].max(initial=0.0)) for clicked in (0, 1))
    yield _row(FIGURES, *figures.row(), users, users_loss, *largest)


def _writer(file: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        file,
        _NAMED,
        store_schema=False,  # it would have readers make dictionaries of the ids
        dictionary_pagesize_limit=1 << 26,  # beyond, the ids themselves are written, which takes four times as long
        write_statistics=["query_id", "score", "num_users"],
    )


def _scored(lists: pa.Table, scoring: ScoringSettings) -> Iterator[Pairs]:
    if scoring.score == "swing":
        return swing_scores(lists, scoring.swing_alpha, scoring.swing_max_users)
    return pair_scores(lists)


def _named(pairs: Pairs, ids: pa.StringArray) -> pa.Table:
    """_NAMED: SCORES whose ids are numbers into the list of those that occur."""
    columns = [_dictionary(numbers, ids) for numbers in (pairs.query, pairs.target)]
    return pa.table([*columns, pairs.score, pairs.num_users], schema=_NAMED)


def _dictionary(numbers: Any, ids: pa.StringArray) -> pa.DictionaryArray:
    occurs = np.zeros(len(ids), bool)
    occurs[numbers] = True
    places = np.cumsum(occurs, dtype=np.int32) - 1
    return pa.DictionaryArray.from_arrays(pa.array(places[numbers]), ids.filter(pa.array(occurs)))


class _Figures:
    """What is to be told of a block's pairs."""

    def __init__(self) -> None:
        self.pairs = self.queries = self.max_users = 0
        self.max_score = 0.0
        self.bins: Counter[int] = Counter()

    def add(self, pairs: Pairs) -> None:
        self.pairs += len(pairs.query)
        self.queries += len(np.unique(pairs.query))
        self.max_users = max(self.max_users, int(pairs.num_users.max()))
        self.max_score = max(self.max_score, float(pairs.score.max()))
        self.bins.update(bin_counts(pairs.score))

    def row(self) -> tuple[Any, ...]:
        bins = sorted(self.bins)
        scores = lower_ends(np.array(bins, np.int64))
        return self.pairs, self.queries, self.max_users, self.max_score, scores, [self.bins[b] for b in bins]


def merged_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """FIGURES of all blocks -> pairs, queries, max_users, score {quantiles}, histogram, capped_users, max_loss.

    Quantiles are cut to 1 %. The histogram has two bins to an octave: `pairs` [n] between `edges` [n + 1].
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
    """No score has lost more by the cap.

    A score of A -> B loses 1 / N_u of each user that has lost the view of A or the click on B: not more than such users
    of one note A and of one note B have together, and not more than all capped users.
    """
    of_notes = sum(max((row[name] for row in rows), default=0.0) for name in ("view_loss", "click_loss"))
    return min(of_notes, math.fsum(row["users_loss"] for row in rows))


def _histogram(bins: Mapping[float, int]) -> dict[str, list[float]]:
    if not bins:
        return {"edges": [0.0, 1.0], "pairs": [0]}
    mantissa, exponent = np.frexp(list(bins))  # in [0.5, 1), cut at 0.75: where a bin ends, so none is counted wrong
    places = 2 * exponent + (mantissa >= 0.75)
    first = int(places.min())
    pairs = np.bincount(places - first, weights=list(bins.values())).astype(int)
    ends = np.arange(first, first + len(pairs) + 1)
    return {"edges": np.ldexp(np.where(ends % 2, 0.75, 0.5), ends // 2).tolist(), "pairs": pairs.tolist()}


def _bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _table(schema: pa.Schema, pieces: Iterable[bytes | None]) -> pa.Table:
    found = (batch for piece in pieces if piece is not None for batch in pa.ipc.open_stream(piece))
    return pa.Table.from_batches(found, schema)


def _row(schema: pa.Schema, *values: Any) -> pa.RecordBatch:
    columns = [pa.array([value], field.type) for value, field in zip(values, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
