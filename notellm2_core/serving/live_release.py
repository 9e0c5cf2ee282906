"""A release as the service uses it: its index with all that was written after it, and its model in a process."""

import json
from dataclasses import dataclass
from pathlib import Path

from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import SERVING_FOLDER, Release
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import NeighbourTable, write_neighbours
from notellm2_core.runtime.files import new_folder
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NOTES_TABLE
from notellm2_core.serving.embedding import EmbeddingProcess
from notellm2_core.serving.live_index import LiveIndex


@dataclass(frozen=True)
class LiveRelease:
    """`weights_id`: of the model that made its vectors. `cut_seq`: up to there, the release holds the log's notes."""

    id: str
    week: str
    weights_id: str
    cut_seq: int
    index: LiveIndex
    model: EmbeddingProcess
    notes: Path | None  # the table of the notes that it was made of; None: it is no longer in the lake

    @classmethod
    def open(cls, lake: Lake, release: Release) -> "LiveRelease":
        """Load a release, start its model, and ask the golden queries.

        Raises ValueError, in one sentence, if a file is damaged or missing, or if an answer is not the golden one.
        """
        try:
            return cls._open(lake, release)
        except OSError as e:
            raise ValueError(f"release {release.id} cannot be opened: {e}") from None

    @classmethod
    def _open(cls, lake: Lake, release: Release) -> "LiveRelease":
        release.verify()
        index = Index.load(release.path / INDEX_FOLDER)
        if index.weights_id is None:
            raise ValueError(f"release {release.id} does not say which model made its vectors")
        cut_seq = int(release.lineage.get("cut_seq", 0))
        live = LiveIndex(index, neighbour_table(lake, release, index), cut_seq)
        require_golden_answers(release.path / GOLDEN_FILE, live)
        model = EmbeddingProcess(release.path / "model")
        return cls(release.id, release.week, index.weights_id, cut_seq, live, model, notes_of(lake, release))

    def close(self) -> None:
        """End its model's process."""
        self.model.close()


def neighbour_table(lake: Lake, release: Release, index: Index) -> NeighbourTable:
    """The table of a release's neighbours, made when it is first served, which takes minutes for a million notes."""
    folder = lake.root / SERVING_FOLDER / release.id
    if not folder.exists():
        embeddings = read_embeddings(release.path / "embeddings")
        vectors = embeddings.vectors[embeddings.rows(list(index.note_ids))]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as draft:
            write_neighbours(index, vectors, draft)
    return NeighbourTable.load(folder, index)


def notes_of(lake: Lake, release: Release) -> Path | None:
    """The table of the notes that a release was made of; None: it is no longer in the lake."""
    verdict = lake.find("verdict", release.dataset.manifest.inputs.get("verdict", ""))
    notes = None if verdict is None else lake.find("notes", verdict.manifest.inputs.get("notes", ""))
    return None if notes is None else notes.path / NOTES_TABLE


def require_golden_answers(golden: Path, live: LiveIndex) -> None:
    """Raises ValueError where a golden query is not answered with its neighbours, in any order."""
    for query in json.loads(golden.read_text()):
        row = live.index.rows.get(query["note_id"])
        if row is None:
            raise ValueError(f"the index lacks the golden note {query['note_id']!r}")
        found, _ = live.index.search(
            live.table.vectors[row][None], len(query["neighbours"]), leave_out=[query["note_id"]]
        )
        if set(found[0]) != set(query["neighbours"]):
            raise ValueError(f"the golden note {query['note_id']!r} has other neighbours than when it was released")
