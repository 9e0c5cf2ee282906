"""Reading and writing Parquet tables so that two runs write the same bytes, and figures about them."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

_UNREADABLE = ("FAILED_READ_FILE", "CANNOT_READ_FILE_FOOTER", "UNABLE_TO_INFER_SCHEMA", "is not a Parquet file")


def write_table(df: DataFrame, out: Path, sort: Sequence[str], num_files: int = 1) -> None:
    """Write `df` to the new folder `out` as `num_files` Parquet files, each sorted by `sort`.

    Rows are placed by the hash of `sort[0]`, so the same rows make the same files on every run.
    """
    placed = df.repartition(1) if num_files == 1 else df.repartition(num_files, sort[0])
    placed.sortWithinPartitions(*sort).write.parquet(str(out))
    _settle(out)


def write_partitions(df: DataFrame, out: Path, partition: str, sort: Sequence[str]) -> None:
    """Write `df` to `out/<value of partition>/`, sorted within each file; `out` may exist.

    A value of ordinary size has one file; Spark spreads a large one over several tasks.
    """
    placed = df.hint("rebalance", partition).sortWithinPartitions(partition, *sort)
    placed.write.mode("append").partitionBy(partition).parquet(str(out))
    for folder in out.glob(f"{partition}=*"):
        _settle(folder.rename(out / folder.name.partition("=")[2]))


def _settle(folder: Path) -> None:
    """Give Spark's files plain names in their order, and drop its hidden checksums and markers."""
    for file in folder.iterdir():
        if file.name.startswith((".", "_")):
            file.unlink()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"part-{i:05d}.parquet")


def num_files(spark: SparkSession) -> int:
    """The files, and tasks, of a table that may be large: spark.shuffle_partitions."""
    return int(spark.conf.get("spark.sql.shuffle.partitions") or 1)


def read_table(spark: SparkSession, *paths: Path) -> DataFrame:
    """The rows of the Parquet folders `paths`. Raises ValueError naming the first that is not there."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there; run the step that writes it.")
    with readable(", ".join(map(str, paths))):
        return spark.read.parquet(*map(str, paths))


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn Spark's failure to read a damaged file into a ValueError that names it."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as e:
        if any(sign in str(e) for sign in _UNREADABLE):
            raise ValueError(f"{path} is damaged, or not of the format its name says; replace it.") from e
        raise


@contextmanager
def replacing(out: Path, made_from: Path, columns: Sequence[str]) -> Iterator[Path]:
    """A fresh folder beside `out` that takes its place when the block ends without an error.

    Raises ValueError where `out` holds anything but the files of a table with `columns`, or what the result is made
    from: only a former result is ever overwritten.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    if made_from.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} holds what is to be read, {made_from}; name another folder.")
    foreign = [f.name for f in out.iterdir() if not _is_result(f, columns)] if out.exists() else []
    if foreign:
        raise ValueError(f"--out {out} holds {sorted(foreign)[0]}, which is no former result; name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield work / "new"
        if out.exists():
            os.rename(out, work / "old")
        os.rename(work / "new", out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_result(file: Path, columns: Sequence[str]) -> bool:
    if not re.fullmatch(r"part-\d{5,}\.parquet", file.name) or not file.is_file():
        return False
    try:
        return pq.read_schema(file).names == list(columns)
    except (OSError, pa.ArrowException):
        return False


def counts_by(df: DataFrame, column: str) -> dict[str, int]:
    """Rows per value of `column`, the most frequent first; null is counted as ""."""
    rows = df.groupBy(F.coalesce(F.col(column), F.lit("")).alias("key")).count().collect()
    return {r["key"]: r["count"] for r in sorted(rows, key=lambda r: (-r["count"], r["key"]))}


def top_counts(df: DataFrame, column: str, num: int = 20) -> dict[str, int]:
    """As `counts_by` for a column that may hold as many values as rows: the `num` most frequent, and "(others)"."""
    key = F.coalesce(F.col(column), F.lit("")).alias("key")
    rows = df.groupBy(key).count().orderBy(F.desc("count"), "key").limit(num + 1).collect()
    top = {r["key"]: r["count"] for r in rows[:num]}
    return top if len(rows) <= num else {**top, "(others)": df.count() - sum(top.values())}


def figures(df: DataFrame, **expressions: Column) -> dict[str, Any]:
    """One row of aggregates, by name."""
    return df.agg(*(e.alias(name) for name, e in expressions.items())).collect()[0].asDict()


def score_quantiles(df: DataFrame) -> dict[str, float | None]:
    """Exact quantiles of `score`; None where there are no rows."""
    shares = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found = quantiles(df, "score", list(shares.values()))
    return dict(zip(shares, found, strict=True)) if found else dict.fromkeys(shares)


def quantiles(df: DataFrame, column: str, shares: Sequence[float]) -> list[float]:
    """Exact quantiles of a column of doubles, on the line between two values where they fall there; [] without rows.

    Two passes, however many rows: a histogram finds the bins where the wanted values lie, and only these are looked at.
    (Spark's own `percentile` holds every distinct value in one task's memory.)
    """

    def histogram(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            bins, rows = np.unique(_bins(batch["value"].to_numpy()), return_counts=True)
            yield pa.record_batch({"bin": bins, "rows": rows})

    whole = df.select(F.col(column).alias("value")).mapInArrow(histogram, "bin bigint, rows bigint")
    bins, rows = _sorted_counts(whole.groupBy("bin").sum("rows"))
    if not len(bins):
        return []
    upto = np.cumsum(rows)
    places = np.array(shares) * (upto[-1] - 1)
    low, high = np.floor(places).astype(int), np.ceil(places).astype(int)
    wanted = np.unique(np.searchsorted(upto, [low, high], side="right"))
    inside = reduce(or_, (F.col(column).between(*_edges(bins[n])) for n in wanted))
    values, rows = _sorted_counts(df.filter(inside).groupBy(column).count())
    # Places count from the first value: those before a bin, and those inside it.
    before = upto[wanted] - np.diff(upto, prepend=0)[wanted]
    first = np.searchsorted(_bins(values), bins[wanted])
    end_of = np.cumsum(rows) + np.repeat(
        before - np.append(0, np.cumsum(rows))[first], np.diff(np.append(first, len(values)))
    )
    at_low, at_high = (values[np.searchsorted(end_of, of, side="right")] for of in (low, high))
    return (at_low + (places - low) * (at_high - at_low)).tolist()


def _sorted_counts(counts: DataFrame) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The keys of a table of counts in ascending order, and their rows."""
    rows = sorted(map(tuple, counts.collect()))
    return np.array([key for key, _ in rows]), np.array([count for _, count in rows], np.int64)


_BIN_BITS = 40  # values of a bin differ in these last bits of their 64: 4096 bins to an octave


def _bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    bits = values.view(np.int64)
    return _in_order(bits) >> _BIN_BITS


def _edges(number: np.int64) -> tuple[float, float]:
    """The lowest and the highest value of a bin."""
    first = np.array([number, number + 1], np.int64) << _BIN_BITS
    low, high = _in_order(first - np.array([0, 1])).view(np.float64).tolist()
    return low, high


def _in_order(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bits of doubles as whole numbers of the same order, and back."""
    return bits ^ ((bits >> 63) & np.iinfo(np.int64).max)
