"""Section 2.3 inside a Spark task: a file of scores in, counts or the strongest pairs out.

The tables of scores are the largest of the pipeline, and the filters drop most of their pairs. So the tables are never
shuffled or cached: each pass reads the files again, one row group at a time, with dictionary-encoded ids.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from spark_jobs.common.tables import BadInput, visible_files
from spark_jobs.scoring.arrays import Floats, Ints, run_starts
from spark_jobs.scoring.eq2 import Pairs
from spark_jobs.scoring.quantiles import bin_counts, value_counts

CANDIDATE_COUNTS = pa.schema(
    [
        pa.field("pairs_on_side", pa.int64()),  # pairs with both notes in the split
        pa.field("most_users", pa.int64()),  # the largest num_users of these pairs
        pa.field("bins", pa.list_(pa.int64())),  # of the candidates' scores (`quantiles.bins`) ...
        pa.field("counts", pa.list_(pa.int64())),  # ... and the candidates in each
    ]
)
SCORE_VALUES = pa.schema([pa.field("value", pa.float64()), pa.field("count", pa.int64())])
STRONGEST = SCORES.append(
    pa.field("chosen_from", pa.int64(), nullable=False)
)  # only in the first row of a row group, else 0
_IDS = ("query_id", "target_id")
_NUMBERS = {"score": pa.float64(), "num_users": pa.int64()}


@dataclass(frozen=True)
class CandidateFilter:
    """Which pairs of a table of scores are candidates, and their scores.

    Both notes of a candidate are in the split `split` of `note_split` (NOTE_SPLIT; None: all notes are). At least
    `min_users` users make the pair. Its score is divided by c ** `popularity_power`, where c is the number of users who
    clicked the target (`clicks`, TARGET_CLICKS). With that correction, a target without clicks is no candidate.

    The methods raise BadInput for files with invalid values.
    """

    note_split: Path | None = None
    split: str = ""
    min_users: int = 1
    clicks: Path | None = None
    popularity_power: float = 0.0

    def __post_init__(self) -> None:
        if self.popularity_power and self.clicks is None:
            raise ValueError(f"popularity_power = {self.popularity_power} needs the clicks of the targets.")

    def count(self, file: Path) -> Iterator[pa.RecordBatch]:
        """A file of SCORES -> CANDIDATE_COUNTS, one row."""
        num_pairs, most_users, bins = 0, 0, Counter[int]()
        for _, in_split, candidates in self._row_groups(file):
            num_pairs += len(in_split.score)
            most_users = max(most_users, int(in_split.num_users.max(initial=0)))
            bins.update(bin_counts(candidates.score))
        yield _batch(CANDIDATE_COUNTS, [num_pairs], [most_users], [list(bins)], [list(bins.values())])

    def values(self, file: Path, bin_numbers: Ints) -> Iterator[pa.RecordBatch]:
        """A file of SCORES -> SCORE_VALUES: the candidates' scores in the bins `bin_numbers`, by row group."""
        for _, _, candidates in self._row_groups(file):
            yield _batch(SCORE_VALUES, *value_counts(candidates.score, bin_numbers))

    def strongest(self, file: Path, low: float, up: float, top_t: int) -> Iterator[pa.RecordBatch]:
        """A file of SCORES -> STRONGEST: the `top_t` candidates with low <= score <= up for each query, by row group.

        They are ordered by (score descending, target id ascending). The `top_t` of the whole table are among them.
        """
        for (query_ids, target_ids), _, candidates in self._row_groups(file):
            pairs = candidates.chosen((low <= candidates.score) & (candidates.score <= up))
            id_rank = np.empty(len(target_ids), np.int64)
            id_rank[pc.sort_indices(target_ids).to_numpy()] = np.arange(len(target_ids))
            order = np.lexsort((id_rank[pairs.target], -pairs.score, pairs.query))
            first = run_starts(pairs.query[order])
            rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
            strongest = pairs.chosen(order[rank < top_t])
            chosen_from = np.zeros(len(strongest.score), np.int64)
            chosen_from[:1] = len(pairs.score)
            ids = query_ids.take(pa.array(strongest.query)), target_ids.take(pa.array(strongest.target))
            yield _batch(STRONGEST, *ids, strongest.score, strongest.num_users, chosen_from)

    def _row_groups(self, file: Path) -> Iterator[tuple[tuple[pa.Array, pa.Array], Pairs, Pairs]]:
        """For each row group: the ids of queries and targets, the pairs in the split, and the candidates among them."""
        split_ids, clicks = self._split_ids(), self._clicks()
        for batch in _read(file):
            ids = tuple(batch[name].dictionary.cast(pa.string()) for name in _IDS)
            query_in_split, target_in_split = (_are_in(column, split_ids) for column in ids)
            pairs = Pairs(
                *(batch[name].indices.to_numpy().astype(np.int64) for name in _IDS),
                *(batch[name].cast(kind).to_numpy() for name, kind in _NUMBERS.items()),
            )
            if not np.isfinite(pairs.score).all():
                raise BadInput(f"{file} holds scores that are infinite or NaN: a score is a finite number.")
            in_split = pairs.chosen(query_in_split[pairs.query] & target_in_split[pairs.target])
            candidates = in_split.chosen(in_split.num_users >= self.min_users)
            if clicks is not None:
                divisor = _clicks_of(ids[1], clicks) ** self.popularity_power
                candidates = candidates.chosen(~np.isnan(divisor[candidates.target]))
                candidates = candidates._replace(score=candidates.score / divisor[candidates.target])
            yield ids, in_split, candidates

    def _split_ids(self) -> pa.ChunkedArray | None:
        """The ids of the notes in the split; None: all notes."""
        if self.note_split is None:
            return None
        with _shared(self.note_split):
            return pq.read_table(self.note_split, columns=["note_id"], filters=[("side", "=", self.split)])["note_id"]

    def _clicks(self) -> pa.Table | None:
        """TARGET_CLICKS; None without a popularity correction."""
        if self.clicks is None or not self.popularity_power:
            return None
        with _shared(self.clicks):
            return pq.read_table(self.clicks)


def score_files(scores: Path) -> list[Path]:
    """The files of a table of SCORES.

    Raises ValueError where there is none, and naming a file that is damaged or has other columns.
    """
    if not scores.exists():
        raise ValueError(f"{scores} does not exist; run the step that writes it.")
    files = visible_files(scores)
    if not files:
        raise ValueError(f"{scores} holds no Parquet files.")
    for file in files:
        try:
            columns = pq.read_schema(file)
        except (OSError, pa.ArrowException) as e:
            raise ValueError(f"{file} is damaged, or no Parquet.") from e
        for field in SCORES:
            if columns.names.count(field.name) != 1:
                lacks = "has more than one" if field.name in columns.names else "lacks the"
                raise ValueError(f"{file} {lacks} column {field.name}; it has {', '.join(columns.names)}.")
            kind = columns.field(field.name).type
            if not (_is_text(kind) if field.name in _IDS else _is_number(kind)):
                raise ValueError(f"{file}: the column {field.name} has type {kind}, not {field.type}.")
    return files


def by_file(
    spark: SparkSession, files: Sequence[Path], work: Callable[[Path], Iterator[pa.RecordBatch]], schema: pa.Schema
) -> DataFrame:
    """The batches that `work` yields for each file, one task per file."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch["id"].to_pylist():
                yield from work(files[number])

    return spark.range(0, len(files), 1, len(files)).mapInArrow(run, from_arrow_schema(schema))


def _read(file: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a file of SCORES, one row group at a time, with dictionary-encoded ids."""
    with _shared(file):
        parquet = pq.ParquetFile(file, read_dictionary=_IDS)
    for i in range(parquet.num_row_groups):
        try:
            table = parquet.read_row_group(i, SCORES.names)
        except (OSError, pa.ArrowException) as e:
            raise BadInput(f"{file} is damaged.") from e
        if with_nulls := [name for name in SCORES.names if table[name].null_count]:
            raise BadInput(f"{file} holds nulls in the column {with_nulls[0]}: every row needs a value.")
        columns = [table[name].dictionary_encode() if name in _IDS else table[name] for name in SCORES.names]
        yield from pa.table(columns, SCORES.names).unify_dictionaries().combine_chunks().to_batches()


@contextmanager
def _shared(path: Path) -> Iterator[None]:
    """Inside, a file that this worker does not see raises BadInput: the user can correct it."""
    try:
        yield
    except FileNotFoundError as e:
        raise BadInput(f"not all workers see {path}; name a folder that they share.") from e


def _are_in(ids: pa.Array, notes: pa.ChunkedArray | None) -> npt.NDArray[np.bool_]:
    return np.ones(len(ids), bool) if notes is None else pc.is_in(ids, notes).to_numpy(zero_copy_only=False)


def _clicks_of(ids: pa.Array, clicks: pa.Table) -> Floats:
    """The number of users who clicked each of `ids`; NaN where nobody did."""
    row = pc.index_in(ids, clicks["note_id"].cast(pa.string()))
    users: Floats = clicks["num_users"].take(row).cast(pa.float64()).to_numpy()
    return users


def _is_text(kind: pa.DataType) -> bool:
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value_type) or pa.types.is_large_string(value_type)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _batch(schema: pa.Schema, *columns: Any) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
