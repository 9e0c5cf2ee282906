"""Section 2.3 inside a Spark task: a file of scores in, counts or few pairs out.

A table of scores is by far the largest of the pipeline, and most of it is dropped here. So it is never shuffled or
cached: each question reads the files again, a row group at a time, in which an id is a number into a list of few.
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

COUNTED = pa.schema(
    [
        pa.field("pairs_on_side", pa.int64()),
        pa.field("most_users", pa.int64()),  # of one of them
        pa.field("bins", pa.list_(pa.int64())),  # of the candidates' scores ...
        pa.field("counts", pa.list_(pa.int64())),  # ... and how many lie in each
    ]
)
VALUES = pa.schema([pa.field("value", pa.float64()), pa.field("count", pa.int64())])
STRONGEST = SCORES.append(pa.field("chosen_from", pa.int64(), nullable=False))  # 0 but in one row of each choice
_IDS = ("query_id", "target_id")
_NUMBERS = {"score": pa.float64(), "num_users": pa.int64()}


@dataclass(frozen=True)
class CandidateFilter:
    """Which pairs of a table of scores compete, and with which score.

    Both notes have the side `side` in the NOTE_SPLIT of the folder `sides` (None: any note will do). A candidate has
    `min_users` users; its score is divided by (users who clicked the target) ** `popularity_power`, by the
    TARGET_CLICKS of the folder `clicks`. Files that tell nothing of sense raise BadInput.
    """

    sides: Path | None = None
    side: str = ""
    min_users: int = 1
    clicks: Path | None = None
    popularity_power: float = 0.0

    def __post_init__(self) -> None:
        if self.popularity_power and self.clicks is None:
            raise ValueError(f"popularity_power = {self.popularity_power} needs the clicks of the targets.")

    def count(self, file: Path) -> Iterator[pa.RecordBatch]:
        """-> COUNTED, one row."""
        num_pairs, most_users, bins = 0, 0, Counter[int]()
        for _, on_side, candidates in self._row_groups(file):
            num_pairs += len(on_side.score)
            most_users = max(most_users, int(on_side.num_users.max(initial=0)))
            bins.update(bin_counts(candidates.score))
        yield _batch(COUNTED, [num_pairs], [most_users], [list(bins)], [list(bins.values())])

    def values(self, file: Path, wanted: Ints) -> Iterator[pa.RecordBatch]:
        """-> VALUES: the candidates' scores that lie in one of the bins `wanted`, of each row group."""
        for _, _, candidates in self._row_groups(file):
            yield _batch(VALUES, *value_counts(candidates.score, wanted))

    def strongest(self, file: Path, low: float, up: float, top_t: int) -> Iterator[pa.RecordBatch]:
        """-> STRONGEST: of the candidates with low <= score <= up, the `top_t` of each query and row group, and so all
        that can be among the `top_t` of the whole table: by (score descending, target id ascending).
        """
        for (query_ids, target_ids), _, candidates in self._row_groups(file):
            pairs = candidates.chosen((low <= candidates.score) & (candidates.score <= up))
            place = np.empty(len(target_ids), np.int64)  # of each target in the order of ids
            place[pc.sort_indices(target_ids).to_numpy()] = np.arange(len(target_ids))
            order = np.lexsort((place[pairs.target], -pairs.score, pairs.query))
            first = run_starts(pairs.query[order])
            rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
            kept = pairs.chosen(order[rank < top_t])
            chosen_from = np.zeros(len(kept.score), np.int64)
            chosen_from[:1] = len(pairs.score)
            ids = query_ids.take(pa.array(kept.query)), target_ids.take(pa.array(kept.target))
            yield _batch(STRONGEST, *ids, kept.score, kept.num_users, chosen_from)

    def _row_groups(self, file: Path) -> Iterator[tuple[tuple[pa.Array, pa.Array], Pairs, Pairs]]:
        """Of each row group the ids of queries and targets, the pairs on the side, and the candidates among them."""
        sides, clicks = self._sides(), self._clicks()
        for batch in _read(file):
            ids = tuple(batch[name].dictionary.cast(pa.string()) for name in _IDS)
            competes = [_are_in(of, sides) for of in ids]
            pairs = Pairs(
                *(batch[name].indices.to_numpy().astype(np.int64) for name in _IDS),
                *(batch[name].cast(kind).to_numpy() for name, kind in _NUMBERS.items()),
            )
            if not np.isfinite(pairs.score).all():
                raise BadInput(f"{file} holds scores that are infinite or no numbers (NaN); leave them out.")
            on_side = pairs.chosen(competes[0][pairs.query] & competes[1][pairs.target])
            candidates = on_side.chosen(on_side.num_users >= self.min_users)
            if clicks is not None:
                divisor = _clicks_of(ids[1], clicks) ** self.popularity_power
                candidates = candidates.chosen(~np.isnan(divisor[candidates.target]))
                candidates = candidates._replace(score=candidates.score / divisor[candidates.target])
            yield ids, on_side, candidates

    def _sides(self) -> pa.ChunkedArray | None:
        """The notes that compete; None: all."""
        if self.sides is None:
            return None
        with _shared(self.sides):
            return pq.read_table(self.sides, columns=["note_id"], filters=[("side", "=", self.side)])["note_id"]

    def _clicks(self) -> pa.Table | None:
        """TARGET_CLICKS; None where scores stay as they are."""
        if self.clicks is None or not self.popularity_power:
            return None
        with _shared(self.clicks):
            return pq.read_table(self.clicks)


def score_files(scores: Path) -> list[Path]:
    """The files of a table of SCORES. Raises ValueError where there is none, naming one that is damaged or of other
    columns.
    """
    if not scores.exists():
        raise ValueError(f"{scores} is not there; run the step that writes it.")
    files = visible_files(scores)
    if not files:
        raise ValueError(f"{scores} holds no Parquet files.")
    for file in files:
        try:
            found = pq.read_schema(file)
        except (OSError, pa.ArrowException) as e:
            raise ValueError(f"{file} is damaged, or no Parquet; replace it.") from e
        for field in SCORES:
            if found.names.count(field.name) != 1:
                lacks = "has more than one" if field.name in found.names else "lacks the"
                raise ValueError(f"{file} {lacks} column {field.name}; it has {', '.join(found.names)}.")
            kind = found.field(field.name).type
            if not (_is_text(kind) if field.name in _IDS else _is_number(kind)):
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


def _read(file: Path) -> Iterator[pa.RecordBatch]:
    """The rows of SCORES, a row group at a time, with dictionaries for ids."""
    with _shared(file):
        parquet = pq.ParquetFile(file, read_dictionary=_IDS)
    for i in range(parquet.num_row_groups):
        try:
            table = parquet.read_row_group(i, SCORES.names)
        except (OSError, pa.ArrowException) as e:
            raise BadInput(f"{file} is damaged; replace it.") from e
        if empty := [name for name in SCORES.names if table[name].null_count]:
            raise BadInput(f"{file} holds nulls in the column {empty[0]}; leave them out.")
        columns = [table[name].dictionary_encode() if name in _IDS else table[name] for name in SCORES.names]
        yield from pa.table(columns, SCORES.names).unify_dictionaries().combine_chunks().to_batches()


@contextmanager
def _shared(path: Path) -> Iterator[None]:
    """Inside, a file that this worker does not see is the user's to mend."""
    try:
        yield
    except FileNotFoundError as e:
        raise BadInput(f"not all workers see {path}; name a folder that they share.") from e


def _are_in(ids: pa.Array, notes: pa.ChunkedArray | None) -> npt.NDArray[np.bool_]:
    return np.ones(len(ids), bool) if notes is None else pc.is_in(ids, notes).to_numpy(zero_copy_only=False)


def _clicks_of(ids: pa.Array, clicks: pa.Table) -> Floats:
    """By id, the users who clicked it; NaN where nobody did."""
    place = pc.index_in(ids, clicks["note_id"].cast(pa.string()))
    users: Floats = clicks["num_users"].take(place).cast(pa.float64()).to_numpy()
    return users


def _is_text(kind: pa.DataType) -> bool:
    of = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(of) or pa.types.is_large_string(of)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _batch(schema: pa.Schema, *columns: Any) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
