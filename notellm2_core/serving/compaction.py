"""Compaction: the new, changed and deleted notes of the log become part of the bases that services search."""

import json
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from notellm2_core.config.settings import Config
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.release.golden import NUM_QUERIES, golden_queries
from notellm2_core.release.release import SERVING_FOLDER, Release, open_release
from notellm2_core.retrieval.build import index_settings, save_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import write_neighbours
from notellm2_core.runtime.files import new_folder, remove_folder
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER
from notellm2_core.serving.base import METADATA, TABLE, Base, base_folder, marked_bases, open_base
from notellm2_core.serving.log import NoteLog

_TAIL_ENTRIES = 1000


@dataclass(frozen=True)
class Compacted:
    """What a compaction came to."""

    cut_seq: int  # of the newest base now
    num_notes: int
    num_changes: int  # notes of the log that the base before it did not hold; 0: there is no new base
    num_waiting: int  # notes that are not embedded yet

    def __str__(self) -> str:
        waiting = f"; {self.num_waiting} notes wait for the model" if self.num_waiting else ""
        if not self.num_changes:
            return f"nothing new{waiting}"
        return f"{self.num_changes} notes of the log up to {self.cut_seq} taken in, {self.num_notes} in all{waiting}"


def compact_served(config: Config, url: str | None = None) -> dict[str, Compacted]:
    """Compact the releases of a configuration that a service has opened: the champion, and the one before it.

    url: of the log; None: that of the configuration. Returns what became of each, by its id.
    """
    lake = Lake(config.lake.resolve())
    ledger = Ledger(lake.root, config.name)
    state = ledger.state()
    served = [r for r in (state.champion, state.previous) if r and (lake.root / SERVING_FOLDER / r).is_dir()]
    if not served:
        return {}
    log = NoteLog.open(log_url(config, ledger, url))
    try:
        return {release_id: compact(lake, open_release(lake, release_id), log) for release_id in served}
    finally:
        log.close()


def log_url(config: Config, ledger: Ledger, url: str | None = None) -> str:
    """The URL of the log of notes: `url`, or else that of the configuration, or else of a file beside the ledger."""
    return url or config.serving.log or f"sqlite:///{(ledger.folder / 'notes.db').absolute()}"


def compact(lake: Lake, release: Release, log: NoteLog) -> Compacted:
    """Make a base of the newest one and of what the log has had since then; none where that is nothing.

    No note is embedded: the services that follow the log have put the vectors there. A note that waits for its vector
    stays as it was. Of the bases before, the last one stays, because a service may be opening it. Superseded entries of
    the log are forgotten. Killed anywhere, the next call does the rest.
    """
    base, upto = open_base(lake, release, log), log.last_seq()
    newest, deleted = _changes(log, base, upto)
    seqs, vectors = log.vectors(str(base.index.weights_id), min(newest.values(), default=upto + 1) - 1, upto)
    place = {seq: n for n, seq in enumerate(seqs)}
    added = {note_id: place[seq] for note_id, seq in newest.items() if seq in place}
    waiting = tuple(sorted(seq for note_id, seq in newest.items() if seq not in place and note_id not in deleted))
    if not (changed := deleted | added.keys()):
        return Compacted(base.cut_seq, len(base.index.note_ids), 0, len(waiting))
    keep = [row for row, note_id in enumerate(base.index.note_ids) if note_id not in changed]
    rows = vectors[[*added.values()]] if added else np.empty((0, base.table.vectors.shape[1]), np.float32)
    embeddings = Embeddings(
        (*base.index.note_ids[keep], *added),
        np.concatenate([base.table.vectors[keep], rows]),
        weights_id=base.index.weights_id,
    )
    with new_folder(base_folder(lake, release, log.mark(upto))) as draft:
        save_index(embeddings, draft / INDEX_FOLDER, index_settings(release.path / INDEX_FOLDER))
        index = Index.load(draft / INDEX_FOLDER)
        write_neighbours(index, embeddings.vectors, draft / TABLE)
        rows = np.unique(np.linspace(0, len(index.note_ids) - 1, NUM_QUERIES).astype(int))
        golden = golden_queries(index, index.note_ids[rows].tolist(), embeddings.vectors[rows])
        (draft / GOLDEN_FILE).write_text(json.dumps(golden))
        (draft / METADATA).write_text(json.dumps({"waiting": waiting}))
    for mark, _ in marked_bases(lake, release, log)[:-2]:
        with suppress(FileNotFoundError):  # another process was quicker, or nobody has needed the table
            remove_folder(base_folder(lake, release, mark))
    log.forget(upto)
    return Compacted(upto, len(embeddings.note_ids), len(changed), len(waiting))


def _changes(log: NoteLog, base: Base, upto: int) -> tuple[dict[str, int], set[str]]:
    """The notes that entry `upto` left other than in a base: note_id -> its last entry; and the deleted ones."""
    newest = {entry.note.note_id: entry.seq for entry in log.newest(base.waiting)}
    deleted: set[str] = set()
    after = base.cut_seq
    while after < upto:
        for entry in log.tail(after, min(_TAIL_ENTRIES, upto - after)):
            after = entry.seq
            if after > upto:  # some before it are forgotten
                break
            newest[entry.note.note_id] = after
            (deleted.add if entry.deleted else deleted.discard)(entry.note.note_id)
    return newest, deleted
