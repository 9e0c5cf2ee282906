"""Section 2.3 inside a Spark task: a file of scores in, counts or few pairs out.

A table of scores is by far the largest of the pipeline, and most of it is dropped here. So it is never shuffled or
cached: each question reads the files again, in which an id is a number into a list of few.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from notellm2_core.schema import SCORES
from spark_jobs.pair_scores import Pairs
from spark_jobs.quantiles import Floats, Ints, bin_counts, value_counts
from spark_jobs.user_lists import run_starts

COUNTED = pa.schema(
    [
        pa.field("pairs_on_side", pa.int64()),
        pa.field("most_users", pa.int64()),  # of one of them
        pa.field("bins", pa.list_(pa.int64())),  # of the candidates' scores ...
        pa.field("counts", pa.list_(pa.int64())),  # ... and how many lie in each
    ]
)
VALUES = pa.schema([pa.field("value", pa.float64()), pa.field("count", pa.int64())])
_IDS = ("query_id", "target_id")
STRONGEST = SCORES.append(pa.field("within_bounds", pa.int64(), nullable=False))  # in one row: of all it was chosen of


@dataclass(frozen=True)
class Competition:
    """Which pairs of a table of scores compete, and with which score.

    Both notes have the side `side` in the NOTE_SIDES of the folder `sides` (None: any note will do). A candidate has
    `min_users` users; its score is divided by (users who clicked the target) ** `popularity_power`, by the
    TARGET_CLICKS of the folder `clicks`.
    """

    sides: Path | None = None
    side: str = ""
    min_users: int = 1
    clicks: Path | None = None
    popularity_power: float = 0.0

    def count(self, file: Path) -> Iterator[pa.RecordBatch]:
        """-> COUNTED, one row."""
        num_pairs, most_users, bins = 0, 0, Counter[int]()
        for on_side, candidates in self._pairs(file)[1]:
            num_pairs += len(on_side.score)
            most_users = max(most_users, int(on_side.num_users.max(initial=0)))
            bins.update(bin_counts(candidates.score))
        yield _batch(COUNTED, [num_pairs], [most_users], [list(bins)], [list(bins.values())])

    def values(self, file: Path, bins: Ints) -> Iterator[pa.RecordBatch]:
        """-> VALUES: the candidates' scores that lie in one of `bins`."""
        values = Counter[float]()
        for _, candidates in self._pairs(file)[1]:
            values.update(value_counts(candidates.score, bins))
        yield _batch(VALUES, list(values), list(values.values()))

    def strongest(self, file: Path, low: float, up: float, top_t: int) -> Iterator[pa.RecordBatch]:
        """-> STRONGEST: of the candidates with low <= score <= up, the `top_t` of each query and row group, and so all
        that can be among the `top_t` of the whole table: by (score descending, target id ascending).
        """
        (query_ids, target_ids), found = self._pairs(file)
        place = np.empty(len(target_ids), np.int64)  # of each target in the order of ids
        place[pc.sort_indices(target_ids).to_numpy()] = np.arange(len(target_ids))
        for _, candidates in found:
            pairs = candidates.chosen((low <= candidates.score) & (candidates.score <= up))
            order = np.lexsort((place[pairs.target], -pairs.score, pairs.query))
            first = run_starts(pairs.query[order])
            rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
            kept = pairs.chosen(order[rank < top_t])
            within_bounds = np.zeros(len(kept.score), np.int64)
            within_bounds[:1] = len(pairs.score)
            ids = query_ids.take(pa.array(kept.query)), target_ids.take(pa.array(kept.target))
            yield _batch(STRONGEST, *ids, kept.score, kept.num_users, within_bounds)

    def _pairs(self, file: Path) -> tuple[tuple[pa.Array, pa.Array], Iterator[tuple[Pairs, Pairs]]]:
        """The ids of queries and targets, and by row group the pairs on the side, and the candidates among them."""
        table = pq.ParquetFile(file, read_dictionary=_IDS).read(SCORES.names).unify_dictionaries()
        if any(column.null_count for column in table.columns):
            raise pa.ArrowInvalid(f"{file} holds nulls")
        if not table.num_rows:
            return (pa.array([], pa.string()),) * 2, iter(())
        ids = tuple(table[name].chunk(0).dictionary for name in _IDS)
        return ids, self._by_row_group(table, *ids)

    def _by_row_group(
        self, table: pa.Table, query_ids: pa.Array, target_ids: pa.Array
    ) -> Iterator[tuple[Pairs, Pairs]]:
        query_competes, target_competes = self._on_side(query_ids), self._on_side(target_ids)
        divisor = self._divisor(target_ids) if self.clicks and self.popularity_power else None
        for batch in table.to_batches():
            query, target = (batch[name].indices.to_numpy() for name in _IDS)
            pairs = Pairs(query, target, batch["score"].to_numpy(), batch["num_users"].to_numpy())
            on_side = pairs.chosen(query_competes[pairs.query] & target_competes[pairs.target])
            candidates = on_side.chosen(on_side.num_users >= self.min_users)
            if divisor is not None:
                candidates = candidates.chosen(~np.isnan(divisor[candidates.target]))
                candidates = candidates._replace(score=candidates.score / divisor[candidates.target])
            yield on_side, candidates

    def _on_side(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        if self.sides is None:
            return np.ones(len(ids), bool)
        there = pq.read_table(self.sides, columns=["note_id"], filters=[("side", "=", self.side)])["note_id"]
        return pc.is_in(ids, there).to_numpy(zero_copy_only=False)

    def _divisor(self, ids: pa.Array) -> Floats:
        """By id; NaN where no user clicked it."""
        clicks = pq.read_table(self.clicks)
        place = pc.index_in(ids, clicks["note_id"])
        users = clicks["num_users"].take(place).cast(pa.float64()).to_numpy()
        return users**self.popularity_power


def score_files(scores: Path) -> list[Path]:
    """The files of a folder of SCORES. Raises ValueError where there is none, naming one that is damaged or of other
    columns.
    """
    if not scores.is_dir():
        raise ValueError(f"{scores} is not there; run the step that writes it.")
    files = sorted(file for file in scores.glob("*.parquet") if not file.name.startswith((".", "_")))
    if not files:
        raise ValueError(f"{scores} holds no Parquet files.")
    for file in files:
        try:
            found = pq.read_schema(file)
        except (OSError, pa.ArrowException) as e:
            raise ValueError(f"{file} is damaged, or no Parquet; replace it.") from e
        for field in SCORES:
            if field.name not in found.names:
                raise ValueError(f"{file} lacks the column {field.name}; it has {', '.join(found.names)}.")
            if (kind := found.field(field.name).type) != field.type:
                raise ValueError(f"{file}: the column {field.name} has type {kind}, not {field.type}.")
    return files


def by_file(
    spark: SparkSession, files: Sequence[Path], work: Callable[[Path], Iterator[pa.RecordBatch]], schema: pa.Schema
) -> DataFrame:
    """What `work` makes of each file: a task for each."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch["id"].to_pylist():
                yield from work(files[number])

    return spark.range(0, len(files), 1, len(files)).mapInArrow(run, from_arrow_schema(schema))


def _batch(schema: pa.Schema, *columns: Any) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
