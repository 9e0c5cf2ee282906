"""Eq. 2, second half: from the histories of a block of queries to its scores.

A block holds all pairs of its queries, so blocks are never merged. A pair and a user's N_u are packed into one integer;
sorting these integers groups the pairs. 1 / N_u is summed in two parts, the first of them exactly, so that a score is
rounded once: its last digit depends neither on the order of users nor on their partitions, and equal sums compare
equal (1/3 + 1/6 = 1/2).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from spark_jobs.scoring.arrays import Floats, Ints, ragged, run_starts

PAIRS_AT_A_TIME = 1 << 22  # bounds the memory: about 60 bytes per pair


class Pairs(NamedTuple):
    """Scored pairs; notes are numbers. Each array [n]."""

    query: Ints
    target: Ints
    score: Floats
    num_users: Ints

    def chosen(self, index: Any) -> "Pairs":
        """The pairs that `index`, a mask or an array of row numbers, selects."""
        return Pairs(*(column[index] for column in self))


class _Runs(NamedTuple):
    """The number of users by pair and N_u, sorted by key. Each array [n]."""

    key: Ints  # rank of the query, target and rank of N_u, packed into one integer
    users: Ints


def pair_scores(histories: pa.Table, pairs_at_a_time: int = PAIRS_AT_A_TIME) -> Iterator[Pairs]:
    """Eq. 2: HISTORIES of a block -> its pairs, in chunks. s(A -> B) = sum over u in U(A -> B) of 1 / N_u."""
    if not histories.num_rows:
        return
    table = histories.combine_chunks()
    views, skips, clicks = (table[name].chunk(0) for name in ("views", "skips", "clicks"))
    click = clicks.flatten().to_numpy()
    num_views = np.diff(views.offsets.to_numpy())
    user = np.repeat(np.arange(len(num_views)), num_views)
    query = views.flatten().to_numpy()
    order = np.argsort(query, kind="stable")
    query, user = query[order].astype(np.int64), user[order]
    bounds = clicks.offsets.to_numpy().astype(np.int64)
    bounds -= bounds[0]
    begin = bounds[user] + skips.flatten().to_numpy()[order]
    length = bounds[user + 1] - begin
    sizes, size = np.unique(table["num_clicked"].to_numpy(), return_inverse=True)

    size_bits, note_bits = int(len(sizes) - 1).bit_length(), int(click.max()).bit_length()
    most_queries = 1 << min(62, 63 - note_bits - size_bits)  # in one chunk
    pair_end, query_rank = np.cumsum(length), np.cumsum(np.append(False, query[1:] != query[:-1]))
    carried = _Runs(
        np.empty(0, np.int64), np.empty(0, np.int64)
    )  # of the last query, which may continue in the next chunk
    low, weight = 0, _in_two_parts(sizes)
    while low < len(query):
        done = int(pair_end[low - 1]) if low else 0
        high = int(np.searchsorted(pair_end, done + pairs_at_a_time, side="right"))
        high = max(low + 1, min(high, int(np.searchsorted(query_rank, query_rank[low] + most_queries))))
        chunk = slice(low, high)
        rank = query_rank[chunk] - query_rank[low]
        key = np.repeat(rank << (note_bits + size_bits) | size[user[chunk]], length[chunk])
        key |= click[ragged(begin[chunk], length[chunk])].astype(np.int64) << size_bits
        key.sort()
        first = run_starts(key)
        runs = _merged(carried, _Runs(key[first], np.diff(np.append(first, len(key)))))
        continues = high < len(query) and query_rank[high] == query_rank[high - 1]
        last = rank[-1] << (note_bits + size_bits)
        cut = int(np.searchsorted(runs.key, last)) if continues else len(runs.key)
        carried = _Runs(runs.key[cut:] - last, runs.users[cut:])
        complete = _Runs(runs.key[:cut], runs.users[:cut])
        pairs = _summed(complete, query[chunk], query_rank[chunk], weight, note_bits, size_bits)
        if len(pairs.query):
            yield pairs
        low = high


def _summed(
    runs: _Runs, query: Ints, query_rank: Ints, weight: tuple[Floats, Floats], note_bits: int, size_bits: int
) -> Pairs:
    """The pairs of complete runs, without self-pairs. A score sums the weights of its users, by N_u."""
    pair = runs.key >> size_bits
    first = run_starts(pair)
    size = runs.key & ((1 << size_bits) - 1)
    parts = (np.add.reduceat(runs.users * part[size], first) for part in weight)
    score = next(parts) + next(parts)
    num_users = np.add.reduceat(runs.users, first)
    pair = pair[first]
    target = pair & ((1 << note_bits) - 1)
    queries = query[run_starts(query_rank)][pair >> note_bits]
    return Pairs(queries, target, score, num_users).chosen(queries != target)  # a note is not paired with itself


def _in_two_parts(sizes: Ints) -> tuple[Floats, Floats]:
    """1 / size as a + b. a has 26 binary places, so its sums below 2**27 are exact; b is below 2**-26."""
    first = np.round(2.0**26 / sizes) / 2.0**26
    return first, (1.0 - first * sizes) / sizes


def _merged(a: _Runs, b: _Runs) -> _Runs:
    if not len(a.key):
        return b
    key, count = np.concatenate([a.key, b.key]), np.concatenate([a.users, b.users])
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = run_starts(key)
    return _Runs(key[first], np.add.reduceat(count[order], first))
