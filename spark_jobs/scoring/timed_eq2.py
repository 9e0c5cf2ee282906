"""Eq. 2 with times, second half: from the histories of a block of queries to its scores.

As in `eq2.py`, a block holds all pairs of its queries, and sorting packed integers groups the pairs. Here a click has
its own share, so the integers hold the user instead of N_u, and shares are summed as they come.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from spark_jobs.scoring.arrays import Floats, Ints, ragged, run_starts
from spark_jobs.scoring.eq2 import Pairs
from spark_jobs.scoring.timed_histories import TIMED_HISTORIES

PAIRS_AT_A_TIME = 1 << 21  # bounds the memory: about 100 bytes per visit and click that follows it
_PLACES = (26, 52, 78)  # binary places of the parts that a share is summed in


class _Sums(NamedTuple):
    """The users of pairs, and the sums of their shares in parts, sorted by key. Each array [n]."""

    key: Ints  # rank of the query and target, packed into one integer
    users: Ints
    parts: tuple[Floats, ...]

    def merged(self, other: "_Sums") -> "_Sums":
        if not len(self.key):
            return other
        order = np.argsort(key := np.append(self.key, other.key), kind="stable")
        first = run_starts(key[order])
        columns = zip((self.users, *self.parts), (other.users, *other.parts), strict=True)
        users, *parts = (np.add.reduceat(np.append(a, b)[order], first) for a, b in columns)
        return _Sums(key[order][first], users, tuple(parts))

    def split(self, row: int, less: int) -> tuple["_Sums", "_Sums"]:
        """The rows before `row`, and those from it on with `less` taken from their keys."""
        before, after = (
            _Sums(self.key[s], self.users[s], tuple(p[s] for p in self.parts)) for s in (slice(row), slice(row, None))
        )
        return before, after._replace(key=after.key - less)


_NOTHING = _Sums(np.empty(0, np.int64), np.empty(0, np.int64), (np.empty(0),) * len(_PLACES))


def timed_scores(histories: pa.Table, pairs_at_a_time: int = PAIRS_AT_A_TIME) -> Iterator[Pairs]:
    """TIMED_HISTORIES of a block -> its pairs, in chunks, by query and target.

    A share is rounded to 78 binary places, to fewer where scores may reach 2**27, and summed in three parts, each
    exactly. So scores depend neither on the order of users nor on their partitions. A pair whose score is rounded to 0
    is left out.
    """
    if not histories.num_rows:
        return
    table = histories.combine_chunks()
    views, skips, follow, clicks, shares = (table[name].chunk(0) for name in TIMED_HISTORIES.names)
    click, share = clicks.flatten().to_numpy().astype(np.int64), shares.flatten().to_numpy()
    user = np.repeat(np.arange(table.num_rows), np.diff(views.offsets.to_numpy()))
    query = views.flatten().to_numpy()
    order = np.argsort(query, kind="stable")  # users stay in order
    query, user, length = (
        query[order].astype(np.int64),
        user[order],
        follow.flatten().to_numpy()[order].astype(np.int64),
    )
    bounds = clicks.offsets.to_numpy().astype(np.int64)
    begin = (bounds - bounds[0])[user] + skips.flatten().to_numpy()[order]

    user_bits, note_bits = int(table.num_rows - 1).bit_length(), int(click.max()).bit_length()
    most_queries = 1 << min(62, 63 - note_bits - user_bits)  # in one chunk
    rank = np.cumsum(np.append(False, query[1:] != query[:-1]))
    # The visits of a user to a note are never divided, so that a pair of theirs is seen once.
    last = np.append(np.flatnonzero((rank[1:] != rank[:-1]) | (user[1:] != user[:-1])), len(rank) - 1)
    pair_end, last_rank = np.cumsum(length)[last], rank[last]
    places = _places(share, table.num_rows)
    carried, low, done = _NOTHING, 0, 0  # carried: the last query, which may continue in the next chunk
    while done < len(last):
        pairs_done = int(pair_end[done - 1]) if done else 0
        upto = int(np.searchsorted(pair_end, pairs_done + pairs_at_a_time, side="right"))
        upto = max(done + 1, min(upto, int(np.searchsorted(last_rank, rank[low] + most_queries))))
        high = int(last[upto - 1]) + 1
        chunk = slice(low, high)
        in_chunk = rank[chunk] - rank[low]
        key = np.repeat(in_chunk << (note_bits + user_bits) | user[chunk], length[chunk])
        which = ragged(begin[chunk], length[chunk])
        sums = carried.merged(_summed(key | click[which] << user_bits, share[which], user_bits, places))
        continues = high < len(rank) and rank[high] == rank[high - 1]
        newest = int(in_chunk[-1]) << note_bits
        complete, carried = sums.split(int(np.searchsorted(sums.key, newest)) if continues else len(sums.key), newest)
        pairs = _scored(complete, query[chunk][run_starts(in_chunk)], note_bits)
        if len(pairs.query):
            yield pairs
        low, done = high, upto


def _places(share: Floats, num_users: int) -> list[int]:
    """The binary places of the parts of shares, of which any sum is exact: its largest part is below 2**53 units."""
    too_many = max(0, int(np.frexp(share.max() * num_users)[1]) - 27)
    return [places - too_many for places in _PLACES]


def _summed(key: Ints, share: Floats, user_bits: int, places: Sequence[int]) -> _Sums:
    """`key`: rank of the query, target and user, packed. Of a user's clicks on a target, the largest share counts."""
    order = np.argsort(key)
    key = key[order]
    first = run_starts(key)
    rest, pair = np.maximum.reduceat(share[order], first), key[first] >> user_bits
    first = run_starts(pair)
    parts = []
    for num in places:
        part = np.rint(rest * 2.0**num) / 2.0**num
        parts.append(np.add.reduceat(part, first))
        rest = rest - part
    return _Sums(pair[first], np.diff(np.append(first, len(pair))), tuple(parts))


def _scored(sums: _Sums, queries: Ints, note_bits: int) -> Pairs:
    """The pairs of complete sums, without self-pairs. `queries`: the notes by their rank."""
    query, target = queries[sums.key >> note_bits], sums.key & ((1 << note_bits) - 1)
    large, middle, small = sums.parts
    score = large + (middle + small)
    return Pairs(query, target, score, sums.users).chosen((query != target) & (score > 0))
