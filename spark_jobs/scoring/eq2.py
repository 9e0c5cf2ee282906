"""Eq. 2, second half: from the histories of a block of queries to its scores.

A block holds all pairs of its queries, so blocks are never merged. A term is a query, a target and the N_u of a user.
The terms of some queries are the elements of a sparse matrix, queries by targets; transposing it twice groups them by
pair, in linear time. 1 / N_u is summed in two parts, the first of them exactly, so that a score is rounded once: its
last digit depends neither on the order of users nor on their partitions, and equal sums compare equal
(1/3 + 1/6 = 1/2).
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from spark_jobs.scoring.arrays import Floats, Ints, ragged, run_starts

PAIRS_AT_A_TIME = 1 << 22  # bounds the memory: about 60 bytes per pair
_PAIRS_IN_CACHE = 1 << 18  # a processor's cache holds their terms, which makes every step faster
_PAIRS_IN_ROW_GROUP = 1 << 20  # larger arrays are given back to the system and fetched again, page by page
_Int32s = npt.NDArray[np.int32]


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
    """The number of users by query, target and N_u, sorted by these. Each array [n]."""

    query: _Int32s  # its index among the queries of the chunk
    target: _Int32s
    size: _Int32s  # index of N_u among the sizes
    users: Ints


def gathered(chunks: Iterable[Pairs], num_pairs: int = _PAIRS_IN_ROW_GROUP) -> Iterator[Pairs]:
    """Consecutive chunks concatenated to at least `num_pairs` pairs; only the last may have fewer, but at least one."""
    pending: list[Pairs] = []
    size = 0
    for pairs in chunks:
        pending.append(pairs)
        size += len(pairs.query)
        if size >= num_pairs:
            yield Pairs(*map(np.concatenate, zip(*pending, strict=True)))
            pending, size = [], 0
    if size:
        yield Pairs(*map(np.concatenate, zip(*pending, strict=True)))


def pair_scores(histories: pa.Table, pairs_at_a_time: int = PAIRS_AT_A_TIME) -> Iterator[Pairs]:
    """Eq. 2: HISTORIES of a block -> its pairs, in chunks. s(A -> B) = sum over u in U(A -> B) of 1 / N_u.

    All pairs of a query are in one chunk. A query with more than `pairs_at_a_time` terms is summed in parts.
    """
    if not histories.num_rows:
        return
    table = histories.combine_chunks()
    views, skips, clicks = (table[name].chunk(0) for name in ("views", "skips", "clicks"))
    click = clicks.flatten().to_numpy()
    num_views = np.diff(views.offsets.to_numpy())
    sizes, size = np.unique(table["num_clicked"].to_numpy(), return_inverse=True)
    user, query = np.repeat(np.arange(len(num_views)), num_views), views.flatten().to_numpy()
    order = np.lexsort((size[user], query))
    query, user = query[order], user[order]
    bounds = clicks.offsets.to_numpy().astype(np.int64)
    bounds -= bounds[0]
    begin = bounds[user] + skips.flatten().to_numpy()[order]
    length, size_of_view = bounds[user + 1] - begin, size[user].astype(np.int32)

    weight, num_notes, carried = _in_two_parts(sizes), int(click.max()) + 1, None
    for chunk in _chunks(query, np.cumsum(length), pairs_at_a_time):
        first = run_starts(query[chunk])
        before = np.append(0, np.cumsum(length[chunk]))
        target = click[ragged(begin[chunk], length[chunk])]
        term_end = before[np.append(first, len(before) - 1)].astype(np.int32)
        runs = _runs(target, np.repeat(size_of_view[chunk], length[chunk]), term_end, num_notes)
        if carried is not None:
            runs = _merged(carried, runs)
        is_part = chunk.stop < len(query) and query[chunk.stop] == query[chunk.stop - 1]
        carried = runs if is_part else None
        if not is_part:
            pairs = _scored(runs, query[chunk][first].astype(np.int64), weight)
            if len(pairs.query):
                yield pairs


def _chunks(query: _Int32s, pair_end: Ints, pairs_at_a_time: int) -> Iterator[slice]:
    """Slices of the views, sorted by `query`: of whole queries, or of a part of one with more terms than a chunk.

    `pair_end`: for each view, the number of terms up to its last one.
    """
    query_start = run_starts(query)
    query_end = np.append(query_start[1:], len(query))  # index after the last view of each query
    terms_end = pair_end[query_end - 1]
    done = at = 0  # views and queries in the chunks so far
    while done < len(query):
        terms_done = int(pair_end[done - 1]) if done else 0
        upto = at + 1
        if done == query_start[at]:  # else the rest of a query is a chunk of its own
            most = terms_done + min(_PAIRS_IN_CACHE, pairs_at_a_time)
            upto = max(upto, int(np.searchsorted(terms_end, most, side="right")))
        end = int(query_end[upto - 1])
        if terms_end[upto - 1] - terms_done > pairs_at_a_time:
            part = int(np.searchsorted(pair_end, terms_done + pairs_at_a_time, side="right"))
            end = min(end, max(done + 1, part))
        yield slice(done, end)
        done, at = end, upto if end == query_end[upto - 1] else at


def _runs(target: _Int32s, size: _Int32s, term_end: _Int32s, num_notes: int) -> _Runs:
    """Terms, in order of query and size -> their runs. The terms of query q: `term_end[q]` to `term_end[q + 1] - 1`."""
    num_queries = len(term_end) - 1
    terms = sparse.csr_array((size, target, term_end), shape=(num_queries, num_notes))
    terms = terms.tocsc().tocsr()  # a stable sort by target, then one by query
    target, size = terms.indices, terms.data
    is_first = np.append(True, (target[1:] != target[:-1]) | (size[1:] != size[:-1]))
    is_first[term_end[:-1]] = True
    first = np.flatnonzero(is_first)
    query = np.repeat(np.arange(num_queries, dtype=np.int32), np.diff(term_end))
    return _Runs(query[first], target[first], size[first], np.diff(np.append(first, len(target))))


def _merged(a: _Runs, b: _Runs) -> _Runs:
    """The runs of two parts of one query."""
    key = np.concatenate([runs.target.astype(np.int64) << 32 | runs.size for runs in (a, b)])
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = run_starts(key)
    users = np.add.reduceat(np.append(a.users, b.users)[order], first)
    target, size = (key[first] >> 32).astype(np.int32), (key[first] & 0xFFFFFFFF).astype(np.int32)
    return _Runs(np.zeros(len(first), np.int32), target, size, users)


def _scored(runs: _Runs, queries: Ints, weight: tuple[Floats, Floats]) -> Pairs:
    """The pairs of complete runs, without self-pairs. A score sums the weights of its users, by N_u."""
    first = run_starts(runs.query.astype(np.int64) << 32 | runs.target)
    num_runs = np.diff(np.append(first, len(runs.target)))
    is_pair = queries[runs.query[first]] != runs.target[first]  # a note is not paired with itself
    first, num_runs = first[is_pair], num_runs[is_pair]
    users, size = runs.users[first], runs.size[first]
    large, small = (users * part[size] for part in weight)
    several = np.flatnonzero(num_runs > 1)  # most pairs have one run
    if len(several):
        each = ragged(first[several], num_runs[several])
        start = np.cumsum(num_runs[several]) - num_runs[several]
        for sums, part in zip((large, small), weight, strict=True):
            sums[several] = np.add.reduceat(runs.users[each] * part[runs.size[each]], start)
        users[several] = np.add.reduceat(runs.users[each], start)
    return Pairs(queries[runs.query[first]], runs.target[first].astype(np.int64), large + small, users)


def _in_two_parts(sizes: Ints) -> tuple[Floats, Floats]:
    """1 / size as a + b. a has 26 binary places, so its sums below 2**27 are exact; b is below 2**-26."""
    first = np.round(2.0**26 / sizes) / 2.0**26
    return first, (1.0 - first * sizes) / sizes
