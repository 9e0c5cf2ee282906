"""Milvus as the engine: a collection for each base, which any number of services search.

    notes_RELEASE_MARK_DIGEST    the notes of a base: id (its row), note_id, vector
    notes_current                an alias: the collection of the release that answers, for other readers

A collection is filled under the name of a draft, and renamed when it is whole: what a killed service leaves behind is
never searched, and removed when the base is opened again. Collections of bases that nobody needs any more are dropped;
all that is in Milvus can be made again from the lake. A database of Milvus belongs to one lake.
"""

import fcntl
import hashlib
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pymilvus import DataType
from pymilvus.exceptions import MilvusException

from notellm2_core.config.milvus import MilvusUrl
from notellm2_core.embeddings.unit_vectors import require_unit_vectors
from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import SERVING_FOLDER
from notellm2_core.retrieval.index import FILES, IndexedNotes
from notellm2_core.retrieval.neighbour_table import EXACT_NOTES, NeighbourTable
from notellm2_core.serving.base import OF_RELEASE, recent_bases
from notellm2_core.serving.engine import BaseFiles, BaseIndex, EngineDown
from notellm2_core.serving.milvus_index import Connection, MilvusIndex

ALIAS = "notes_current"
_OURS = re.compile(rf"(?a)notes_\w+_({OF_RELEASE}|[0-9a-f]{{16}})_[0-9a-f]{{8}}(_draft_[0-9a-f]{{8}})?")
_BATCH_BYTES = 4 << 20  # of vectors; a server takes messages of 64 MB
_GRAPH = {"M": 32, "efConstruction": 200}
_SECONDS = 60.0  # that a step may take that is no search, and waits for nothing
_LOGGER = logging.getLogger(__name__)


class MilvusEngine:
    """A connection to a Milvus, and the collections of a lake in it."""

    def __init__(self, url: MilvusUrl, lake: Lake, exact_notes: int = EXACT_NOTES) -> None:
        """exact_notes: up to here, a collection has no graph: a query is compared with all. Raises EngineDown."""
        if url.is_file:
            Path(url.address).parent.mkdir(parents=True, exist_ok=True)
        self._url, self._lake, self._exact_notes = url, lake, exact_notes
        self._before: set[str] = set()  # collections that were in memory until the last switch
        self._connection = Connection(url)
        self._client = self._connection.client

    def open(self, files: BaseFiles) -> tuple[MilvusIndex, NeighbourTable]:
        """Fill the collection of a base, unless it is there, and see that it answers as the table does."""
        notes = IndexedNotes.load(files.index)
        table = NeighbourTable.load(files.table, notes)
        name = _collection(files)
        has_graph = len(notes.note_ids) > self._exact_notes
        with self._connection.errors(), self._alone():
            if not self._is_whole(name, len(notes.note_ids)):
                _LOGGER.warning("%d notes of release %s go to Milvus", len(notes.note_ids), files.release_id)
                self._fill(name, notes, table.vectors, has_graph)
                if not self._is_whole(name, len(notes.note_ids)):
                    raise EngineDown(f"the Milvus {self._url} has not kept all notes of the collection {name}")
        return MilvusIndex(self._connection, name, notes, table.vectors).tuned(table, has_graph), table

    def serve(self, indexes: Sequence[BaseIndex]) -> None:
        """Point the alias to the collection that answers first, and drop those that nobody needs. A failure is logged:
        the next call does both.
        """
        names = [index.collection for index in indexes if isinstance(index, MilvusIndex)]
        recent = tuple(_prefix(*base) for base in recent_bases(self._lake))
        try:
            with self._connection.errors():
                self._point_to(names[0])
                for name in self._client.list_collections(timeout=_SECONDS):
                    is_needed = name in {*names, *self._before} or name.startswith(recent)
                    if _OURS.fullmatch(name) and not is_needed:
                        self._client.drop_collection(name, timeout=_SECONDS)
        except EngineDown as e:
            _LOGGER.warning("the alias %s is not moved yet: %s", ALIAS, e)
        self._before = {*names}

    def close(self) -> None:
        self._client.close()
        if self._url.is_file:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self._url.address)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other process fills a collection of the lake."""
        folder = self._lake.root / SERVING_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".milvus").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fill(self, name: str, notes: IndexedNotes, vectors: np.ndarray, has_graph: bool) -> None:
        """Make the collection. What was left of an earlier attempt is removed first."""
        client = self._client
        for left in client.list_collections(timeout=_SECONDS):
            if left == name or left.startswith(f"{name}_draft_"):
                client.drop_collection(left, timeout=_SECONDS)
        draft = f"{name}_draft_{secrets.token_hex(4)}"
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("note_id", DataType.VARCHAR, max_length=65_535)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=notes.dim)
        client.create_collection(draft, schema=schema, consistency_level="Bounded", timeout=_SECONDS)
        step = max(1, _BATCH_BYTES // (4 * notes.dim))
        for start in range(0, len(vectors), step):
            ids, part = notes.note_ids[start : start + step], vectors[start : start + step]
            require_unit_vectors(part, list(ids))  # milvus-lite takes NaN
            rows = [{"id": start + i, "note_id": ids[i], "vector": part[i]} for i in range(len(ids))]
            client.insert(draft, rows, timeout=_SECONDS)
        client.flush(draft)
        index = client.prepare_index_params()
        kind, params = ("HNSW", _GRAPH) if has_graph else ("FLAT", {})
        index.add_index("vector", index_type=kind, metric_type="IP", params=params)
        client.create_index(draft, index)
        client.rename_collection(draft, name, timeout=_SECONDS)

    def _is_whole(self, name: str, num_notes: int) -> bool:
        """Take a collection into Milvus's memory, if it is there, and count its notes. All later reads see them all."""
        if not self._client.has_collection(name, timeout=_SECONDS):
            return False
        self._client.load_collection(name)
        (counted,) = self._client.query(name, output_fields=["count(*)"], consistency_level="Strong", timeout=_SECONDS)
        return bool(counted["count(*)"] == num_notes)

    def _point_to(self, name: str) -> None:
        try:
            self._client.create_alias(name, ALIAS, timeout=_SECONDS)
        except MilvusException:  # it is there
            self._client.alter_alias(name, ALIAS, timeout=_SECONDS)


def _prefix(release_id: str, mark: str) -> str:
    """How the collections of a base begin. Names in Milvus have letters, digits and underscores."""
    return re.sub(r"(?a)\W", "_", f"notes_{release_id}_{mark}_")


def _collection(files: BaseFiles) -> str:
    """Index.json has the checksums of an index: so one name never means two contents."""
    return _prefix(files.release_id, files.mark) + hashlib.sha256((files.index / FILES[2]).read_bytes()).hexdigest()[:8]
