"""Where the base of a live index is searched: by FAISS in this process, or by a Milvus on other machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from notellm2_core.config.milvus import MilvusUrl
from notellm2_core.lake.lake import Lake
from notellm2_core.release.golden import require_golden_answers
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import NeighbourTable


class EngineDown(ConnectionError):
    """The engine does not answer, or refuses to. Answers that need no search are given all the same."""


class BaseIndex(Protocol):
    """The notes of a base, which never change. A note's number is its row. N: notes, Q: queries, d: width."""

    @property
    def note_ids(self) -> np.ndarray:
        """[N] object."""

    @property
    def rows(self) -> Mapping[str, int]:
        """note_id -> row."""

    @property
    def dim(self) -> int:
        """d."""

    @property
    def weights_id(self) -> str | None:
        """The model that made the vectors."""

    def search_rows(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest notes of unit vectors [Q, d]: rows and inner products, both [Q, k].

        The best comes first; equal scores are in the order of the rows. Only where there are fewer notes than k, the
        rest is -1 and -inf. Any number of threads search. Raises EngineDown.
        """


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base. `release_id` and `mark` name it."""

    release_id: str
    mark: str
    index: Path  # folder
    table: Path  # folder
    golden: Path


class Engine(Protocol):
    """One for all bases of a service. `open` and `serve` are called by one thread at a time."""

    def open(self, files: BaseFiles) -> tuple[BaseIndex, NeighbourTable]:
        """A base that can be searched, and its table of neighbours.

        Raises ValueError where its files are damaged, or where it answers otherwise than it should, and EngineDown.
        """

    def serve(self, indexes: Sequence[BaseIndex]) -> None:
        """Hear which ones are in memory now, that which answers first."""

    def close(self) -> None:
        """End the connection."""


class FaissEngine:
    """FAISS in this process. It holds the indexes in memory and needs nothing else."""

    def open(self, files: BaseFiles) -> tuple[Index, NeighbourTable]:
        index = Index.load(files.index)
        table = NeighbourTable.load(files.table, index)
        require_golden_answers(files.golden, index, table.vectors)
        return index, table

    def serve(self, indexes: Sequence[BaseIndex]) -> None:
        pass

    def close(self) -> None:
        pass


def open_engine(url: str | None, lake: Lake) -> Engine:
    """The engine at a URL (`MilvusUrl`); None: FAISS.

    Raises ValueError for another URL or a package that is missing, and EngineDown.
    """
    if url is None:
        return FaissEngine()
    parsed = MilvusUrl.parse(url)
    try:
        from notellm2_core.serving.milvus import MilvusEngine
    except ImportError as e:
        raise ValueError(f"an engine milvus:// needs {e.name}: pip install -e '.[milvus]', in the repository") from None
    return MilvusEngine(parsed, lake)
