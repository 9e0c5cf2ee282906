"""Eq. 2, second half: the scores of a block of queries. Every pair of a query lies in its block: nothing is merged.

A pair and a user's N_u are packed into one whole number; sorting these numbers groups the pairs. 1 / N_u is added up in
two parts, of which the first adds up exactly, so that a score is rounded once: its last digit depends neither on the
order of users nor on their partition, and sums that are equal are equal (1/3 + 1/6 = 1/2).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from spark_jobs.scoring.arrays import Floats, Ints, ragged, run_starts

PAIRS_AT_A_TIME = 1 << 22  # bounds the memory: about 60 bytes for each


class Pairs(NamedTuple):
    """Scored pairs of notes that are numbers; each [n]."""

    query: Ints
    target: Ints
    score: Floats
    num_users: Ints

    def chosen(self, which: Any) -> "Pairs":
        """Those that `which`, a mask or places, picks."""
        return Pairs(*(column[which] for column in self))


class _Runs(NamedTuple):
    """How many users with the same N_u have the same pair; each [n], by key."""

    key: Ints  # query's place, target, place of N_u: one number
    users: Ints


def pair_scores(lists: pa.Table, pairs_at_a_time: int = PAIRS_AT_A_TIME) -> Iterator[Pairs]:
    """HISTORIES of a block -> its pairs in pieces: s(A -> B) = sum over u in U(A -> B) of 1 / N_u."""
    if not lists.num_rows:
        return
    table = lists.combine_chunks()
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
    most_queries = 1 << min(62, 63 - note_bits - size_bits)  # of one chunk
    pair_end, place = np.cumsum(length), np.cumsum(np.append(False, query[1:] != query[:-1]))
    carried = _Runs(np.empty(0, np.int64), np.empty(0, np.int64))  # of the last query, which may go on
    low, weight = 0, _in_two_parts(sizes)
    while low < len(query):
        done = int(pair_end[low - 1]) if low else 0
        high = int(np.searchsorted(pair_end, done + pairs_at_a_time, side="right"))
        high = max(low + 1, min(high, int(np.searchsorted(place, place[low] + most_queries))))
        here = slice(low, high)
        key = np.repeat((place[here] - place[low]) << (note_bits + size_bits) | size[user[here]], length[here])
        key |= click[ragged(begin[here], length[here])].astype(np.int64) << size_bits
        key.sort()
        first = run_starts(key)
        runs = _merged(carried, _Runs(key[first], np.diff(np.append(first, len(key)))))
        goes_on = high < len(query) and place[high] == place[high - 1]
        last = (place[high - 1] - place[low]) << (note_bits + size_bits)
        cut = int(np.searchsorted(runs.key, last)) if goes_on else len(runs.key)
        carried = _Runs(runs.key[cut:] - last, runs.users[cut:])
        whole = _Runs(runs.key[:cut], runs.users[:cut])
        pairs = _summed(whole, query[here], place[here], weight, note_bits, size_bits)
        if len(pairs.query):
            yield pairs
        low = high


def _summed(
    runs: _Runs, query: Ints, place: Ints, weight: tuple[Floats, Floats], note_bits: int, size_bits: int
) -> Pairs:
    """The pairs of whole runs, without self pairs: the weights of their users added up, size by size."""
    pair = runs.key >> size_bits
    first = run_starts(pair)
    size = runs.key & ((1 << size_bits) - 1)
    parts = (np.add.reduceat(runs.users * part[size], first) for part in weight)
    score = next(parts) + next(parts)
    num_users = np.add.reduceat(runs.users, first)
    pair = pair[first]
    target = pair & ((1 << note_bits) - 1)
    queries = query[run_starts(place)][pair >> note_bits]
    other = queries != target  # a note is not paired with itself
    return Pairs(queries, target, score, num_users).chosen(other)


def _in_two_parts(sizes: Ints) -> tuple[Floats, Floats]:
    """1 / size as a + b: a has 26 binary places, so that sums of it below 2**27 are exact; b is below 2**-26."""
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
