"""The engines that a base can be searched with, each with a lake of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from notellm2_core.lake.lake import Lake
from notellm2_core.retrieval.neighbour_table import NeighbourTable
from notellm2_core.serving.engine import BaseIndex, Engine, open_engine
from notellm2_core.serving.live_index import LiveIndex
from tests.support.bases import unit_vectors, write_base

KINDS = ("faiss", "milvus-lite", "milvus")
NUM, NUM_EQUAL = 300, 6  # notes of the base `main`, of which the first few have one vector
FIRST_IDS = ("ärger/ß", "猫 🐈", "a'b\"c", "x" * 128, "%_", "n5")


@dataclass
class EngineSite:
    """An engine, and the bases that were opened with it, each once."""

    kind: str
    url: str | None
    lake: Lake
    engine: Engine
    opened: dict[str, tuple[BaseIndex, NeighbourTable]] = field(default_factory=dict)

    def base(self, name: str) -> tuple[BaseIndex, NeighbourTable]:
        """The base of release `name`: its notes are those of `notes_of`."""
        if name not in self.opened:
            notes = notes_of(name)
            self.opened[name] = self.engine.open(write_base(self.lake, name, [*notes], np.stack([*notes.values()])))
        return self.opened[name]

    def live(self, name: str = "main") -> tuple[LiveIndex, dict[str, np.ndarray]]:
        """A new live index on the base, and its notes by id."""
        return LiveIndex(*self.base(name)), notes_of(name)


def notes_of(name: str) -> dict[str, np.ndarray]:
    """The notes of a base. main: NUM, the first NUM_EQUAL of them equal; one: a single one; equal: seven equal ones."""
    if name == "one":
        return {"only": unit_vectors(1, 1)[0]}
    if name == "equal":
        return dict.fromkeys((f"e{n}" for n in range(7)), unit_vectors(2, 1)[0])
    vectors = unit_vectors(3, NUM)
    vectors[:NUM_EQUAL] = vectors[0]
    ids = (*FIRST_IDS, *(f"n{n}" for n in range(NUM_EQUAL, NUM)))
    return dict(zip(ids, vectors, strict=True))


def nearest(notes: Mapping[str, np.ndarray], query: np.ndarray, without: Sequence[str] = ()) -> list[tuple[str, float]]:
    """All notes with their inner products, the best first; equal ones in the order of their ids."""
    scores = {note_id: float(query @ vector) for note_id, vector in notes.items() if note_id not in without}
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


@contextmanager
def engine_site(kind: str, folder: Path, server_url: str) -> Iterator[EngineSite]:
    """server_url: of the Milvus server, for the kind that needs it."""
    lake = Lake(folder / "lake")
    url = {"faiss": None, "milvus-lite": f"milvus://{folder}/milvus.db", "milvus": server_url}[kind]
    engine = open_engine(url, lake)
    try:
        yield EngineSite(kind, url, lake, engine)
    finally:
        engine.close()
