"""A release as the service uses it: its index with all that was written after it, and its model."""

from dataclasses import dataclass, replace
from pathlib import Path

from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import Release
from notellm2_core.release.served import mark_served
from notellm2_core.schema import NOTES_TABLE
from notellm2_core.serving.base import Base, open_base
from notellm2_core.serving.embedder_client import EmbedderClient
from notellm2_core.serving.embedding import Embedding
from notellm2_core.serving.embedding_process import EmbeddingProcess
from notellm2_core.serving.engine import Engine, EngineDown
from notellm2_core.serving.live_index import LiveIndex
from notellm2_core.serving.log import LogUnavailable, NoteLog


@dataclass(frozen=True, eq=False)
class LiveRelease:
    """`weights_id`: of the model that made its vectors. `base`: what it holds of the log from the start."""

    release: Release
    weights_id: str
    base: Base
    index: LiveIndex
    model: Embedding
    notes: Path | None  # the table of the notes that it was made of; None: it is no longer in the lake

    @property
    def id(self) -> str:
        return self.release.id

    @property
    def week(self) -> str:
        return self.release.week

    @staticmethod
    def checked_base(lake: Lake, release: Release, log: NoteLog, engine: Engine | None = None) -> Base:
        """The newest base of a release whose files are all whole. engine: where it is searched; None: FAISS.

        Raises ValueError, in one sentence, if a file is damaged or missing, or if an answer is not the golden one,
        LogUnavailable, and EngineDown.
        """
        try:
            release.verify()
            mark_served(lake, release.id)  # opening may take long, and nobody is to remove it meanwhile
            return open_base(lake, release, log, engine)
        except (LogUnavailable, EngineDown):
            raise
        except OSError as e:
            raise ValueError(f"release {release.id} cannot be opened: {e}") from None

    @classmethod
    def start(
        cls, lake: Lake, release: Release, base: Base, waits: bool = True, embedder: str | None = None
    ) -> "LiveRelease":
        """Start its model, or have that of the `embedder` at this URL. waits: until it is loaded, because another
        release answers meanwhile, to which loading gives way; raises ValueError if it cannot be loaded.
        """
        index, notes = LiveIndex(base.index, base.table, base.seq), notes_of(lake, release)
        model: Embedding
        try:
            if embedder is None:
                model = EmbeddingProcess(release.path / "model", waits, gives_way=waits)
            else:
                model = EmbedderClient(embedder, base.weights_id, base.table.vectors.shape[1], waits)
        except OSError as e:
            raise ValueError(f"the model of release {release.id} cannot be started: {e}") from None
        return cls(release, base.weights_id, base, index, model, notes)

    def with_base(self, base: Base) -> "LiveRelease":
        """The same release, with its model, on a later base."""
        return replace(self, base=base, index=LiveIndex(base.index, base.table, base.seq))

    def close(self) -> None:
        """Its model is not needed any more."""
        self.model.close()


def notes_of(lake: Lake, release: Release) -> Path | None:
    """The table of the notes that a release was made of; None: it is no longer in the lake."""
    verdict = lake.find("verdict", release.dataset.manifest.inputs.get("verdict", ""))
    notes = None if verdict is None else lake.find("notes", verdict.manifest.inputs.get("notes", ""))
    return None if notes is None else notes.path / NOTES_TABLE
