"""A collection of Milvus as the base of a live index.

The collection never changes, so reads are `Bounded`: they wait for nothing. What is newer is in the delta before it.

N: notes, Q: queries, d: width.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import faiss
import grpc
import numpy as np
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from notellm2_core.config.milvus import MilvusUrl
from notellm2_core.retrieval.index import IndexedNotes
from notellm2_core.retrieval.neighbour_table import WIDTH, NeighbourTable
from notellm2_core.serving.engine import EngineDown

ANSWER_SECONDS = 2.0  # that a connection, or a search, may take
_PAUSE_SECONDS = 1.0  # after a failure, in which searches fail at once
_MOST = 16_384  # notes that Milvus finds for a query
_CANDIDATES = (256, 512, 1024, 2048, 4096)  # of the walk through a graph (`ef`) for up to WIDTH + 1 notes
_MOST_CANDIDATES = 32_768
_TARGET_RECALL = 0.95
_NUM_SAMPLES, _SAMPLE_SECONDS = 20, 60.0
_TOLERANCE = 1e-5  # of an inner product, between two libraries
_LOGGER = logging.getLogger(__name__)
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it would log what it raises, with 60 lines of traceback


class Connection:
    """A connection to a Milvus, for any number of threads."""

    def __init__(self, url: MilvusUrl) -> None:
        """Raises EngineDown."""
        self._url, self._not_before, self._failed = url, 0.0, False
        with self.errors():
            self.client = MilvusClient(
                url.address, user=url.user, password=url.password, db_name=url.database, timeout=ANSWER_SECONDS,
                dedicated=True,  # closed when the client is
            )  # fmt: skip

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what Milvus says into EngineDown."""
        try:
            yield
        except MilvusException as e:
            raise EngineDown(f"the Milvus {self._url} cannot be used now: {e.message}") from e
        except grpc.RpcError as e:
            raise EngineDown(f"the Milvus {self._url} cannot be used now: {e}") from e

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Like `errors`, for searches: while Milvus is down, only one of them at a time waits for it."""
        now = time.monotonic()
        if now < self._not_before:
            raise EngineDown(f"the Milvus {self._url} did not answer a moment ago")
        if self._failed:
            self._not_before = now + ANSWER_SECONDS + _PAUSE_SECONDS
        try:
            with self.errors():
                yield
        except EngineDown as e:
            if not self._failed:
                _LOGGER.warning("%s; only the table of neighbours answers", e)
            self._failed, self._not_before = True, time.monotonic() + _PAUSE_SECONDS
            raise
        self._failed, self._not_before = False, 0.0


@dataclass(frozen=True)
class MilvusIndex:
    """A whole collection, in Milvus's memory. `candidates`: of a walk through its graph; None: it has none."""

    connection: Connection
    collection: str
    notes: IndexedNotes
    vectors: np.ndarray  # [N, d]
    candidates: int | None = None

    @property
    def note_ids(self) -> np.ndarray:
        return self.notes.note_ids

    @property
    def dim(self) -> int:
        return self.notes.dim

    @property
    def weights_id(self) -> str | None:
        return self.notes.weights_id

    @cached_property
    def rows(self) -> dict[str, int]:
        return {note_id: row for row, note_id in enumerate(self.note_ids)}

    def search_rows(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`BaseIndex.search_rows`. Raises ValueError for another width, or k below 1."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries of shape {queries.shape} do not fit an index of width {self.dim}.")
        if k < 1:
            raise ValueError(f"k = {k} must be 1 or more.")
        num = min(k, len(self.note_ids))
        found = None
        if num <= _MOST:
            with self.connection.guarded():
                found = self._search(queries, num, ANSWER_SECONDS)
        if found is None or (found[0] < 0).any():
            # So many are gone that Milvus cannot find enough others, or its graph has lost some: rare, and slow.
            scores, rows = faiss.knn(queries, self.vectors, num, faiss.METRIC_INNER_PRODUCT)
            found = _best_first(rows, scores)
        rest = ((0, 0), (0, k - num))
        return np.pad(found[0], rest, constant_values=-1), np.pad(found[1], rest, constant_values=-np.inf)

    def tuned(self, table: NeighbourTable, has_graph: bool) -> "MilvusIndex":
        """The same index, with as many candidates as find enough of what the table knows.

        Raises ValueError where it finds too few, or other vectors than those of the table.
        """
        num_others = min(table.rows.shape[1], len(self.note_ids) - 1)
        samples = np.unique(np.linspace(0, len(self.note_ids) - 1, _NUM_SAMPLES).astype(int))
        floors = table.scores[samples, num_others - 1] if num_others else np.full(len(samples), -np.inf)
        for candidates in _CANDIDATES if has_graph else (None,):
            index = replace(self, candidates=candidates)
            with self.connection.errors():
                rows, scores = index._search(self.vectors[samples], num_others + 1, _SAMPLE_SECONDS)
            expected = np.einsum("qkd,qd->qk", self.vectors[rows], self.vectors[samples])
            if not (np.abs(expected - scores)[rows >= 0] < _TOLERANCE).all():
                raise ValueError(f"the collection {self.collection} holds other vectors than its table")
            is_right = (rows >= 0) & (rows != samples[:, None]) & (scores >= floors[:, None] - _TOLERANCE)
            recall = 1.0 if not num_others else np.minimum(is_right.sum(axis=1) / num_others, 1).mean()
            if recall >= _TARGET_RECALL:
                return index
        raise ValueError(f"the collection {self.collection} finds only {recall:.0%} of the nearest notes")

    def _search(self, queries: np.ndarray, k: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """As `search_rows`, for k of at most N and _MOST; -1 also where Milvus has found fewer."""
        params = {} if self.candidates is None else {"ef": _scaled(self.candidates, k)}
        answer = self.connection.client.search(
            self.collection, queries, limit=k, output_fields=["id"], search_params={"params": params},
            consistency_level="Bounded", timeout=seconds,
        )  # fmt: skip
        rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        for query, hits in enumerate(answer):
            rows[query, : len(hits)], scores[query, : len(hits)] = hits.ids, hits.distances
        return _best_first(rows, scores)


def _scaled(candidates: int, k: int) -> int:
    """The candidates of a search for k notes."""
    return min(_MOST_CANDIDATES, max(candidates, -(-candidates * k // (WIDTH + 1))))


def _best_first(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal scores are in the order of the rows."""
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
