"""Compaction: the new, changed and deleted notes of the log become part of the bases that services search."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from notellm2_core.config.settings import Config
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.release.golden import NUM_QUERIES, golden_queries
from notellm2_core.release.release import SERVING_FOLDER, Release, open_release
from notellm2_core.release.served import served_releases
from notellm2_core.retrieval.build import index_settings, save_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import write_neighbours
from notellm2_core.runtime.files import new_folder, remove_folder
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NEIGHBOURS_FOLDER
from notellm2_core.serving.base import METADATA, Base, base_folder, marked_bases, open_base
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.log_url import log_url, may_exist

_TAIL_ENTRIES = 1000


@dataclass(frozen=True)
class Compacted:
    """What a compaction came to."""

    cut_seq: int  # of the newest base now
    num_notes: int
    num_changes: int  # notes of the log that the base before it did not hold; 0: there is no new base
    num_waiting: int  # notes that are not embedded yet

    def __str__(self) -> str:
        waiting = f"; waiting for the model: {self.num_waiting}" if self.num_waiting else ""
        if not self.num_changes:
            return f"nothing new{waiting}"
        return f"notes taken in up to entry {self.cut_seq}: {self.num_changes}; in all: {self.num_notes}{waiting}"


def compact_served(config: Config, url: str | None = None) -> dict[str, Compacted]:
    """Compact the releases of a configuration that services have in memory or may need next: the champion, and the one
    before it.

    url: of the log; None: that of the configuration. Returns what became of each, by its id; nothing where there is no
    log. Raises ValueError where one cannot be compacted, after the others were, and where another compaction is
    running.
    """
    lake = Lake(config.lake.resolve())
    ledger = Ledger(lake.root, config.name)
    state = ledger.state()
    in_use = served_releases(lake) | {state.champion, state.previous}
    ours = {decision.release for decision in state.decisions if decision.release in in_use}
    url = log_url(config, ledger, url)
    if not ours or not may_exist(url):
        return {}
    compacted: dict[str, Compacted] = {}
    problems = []
    with _alone(lake), closing(NoteLog.open(url)) as log:
        for release_id in sorted(ours):
            try:
                compacted[release_id] = compact(lake, open_release(lake, release_id), log)
            except (ValueError, OSError) as e:
                problems.append(f"release {release_id}: {e}")
    if problems:
        raise ValueError("; ".join(problems))
    return compacted


@contextmanager
def _alone(lake: Lake) -> Iterator[None]:
    """Raises ValueError where another process of this machine compacts releases of the lake."""
    folder = lake.root / SERVING_FOLDER
    folder.mkdir(exist_ok=True)
    with (folder / ".compaction").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another compaction is running in this lake: this one has nothing to add") from None
        yield


def compact(lake: Lake, release: Release, log: NoteLog) -> Compacted:
    """Make a base of the newest one and of what the log has had since then; none where that is nothing.

    No note is embedded: the services that follow the log have put the vectors there. A note that waits for its vector
    stays as it was. Of the bases before, the last one stays, because a service may be opening it. Superseded entries of
    the log are forgotten. Killed anywhere, the next call does the rest.
    """
    base, upto = open_base(lake, release, log), log.last_seq()
    newest, gone = _changes(log, base, upto)
    vectors = log.vectors_of(base.weights_id, base.waiting)
    vectors |= dict(zip(*log.vectors(base.weights_id, base.cut_seq, upto), strict=True))
    added = {note_id: vectors[seq] for note_id, seq in newest.items() if seq in vectors}
    waiting = tuple(sorted(seq for seq in newest.values() if seq not in vectors))
    num_changes = len((gone & base.index.rows.keys()) | added.keys())
    keep = [row for row, note_id in enumerate(base.index.note_ids) if note_id not in gone | added.keys()]
    if not num_changes or not (keep or added):
        return Compacted(base.cut_seq, len(base.index.note_ids), 0, len(waiting))
    note_ids = (*base.index.note_ids[keep], *added)
    rows = np.concatenate([base.table.vectors[keep], *(vector[None] for vector in added.values())])
    _write_base(lake, release, log.mark(upto), Embeddings(note_ids, rows, weights_id=base.weights_id), waiting)
    for mark, _ in marked_bases(lake, release, log)[:-2]:
        with suppress(FileNotFoundError):  # another process was quicker, or nobody has needed the table
            remove_folder(base_folder(lake, release.id, mark))
    log.forget(upto)
    return Compacted(upto, len(note_ids), num_changes, len(waiting))


def _write_base(lake: Lake, release: Release, mark: str, embeddings: Embeddings, waiting: tuple[int, ...]) -> None:
    """Index, table and golden queries of a base."""
    with new_folder(base_folder(lake, release.id, mark)) as draft:
        save_index(embeddings, draft / INDEX_FOLDER, index_settings(release.path / INDEX_FOLDER))
        index = Index.load(draft / INDEX_FOLDER)
        write_neighbours(index, embeddings.vectors, draft / NEIGHBOURS_FOLDER)
        rows = np.unique(np.linspace(0, len(index.note_ids) - 1, NUM_QUERIES).astype(int))
        golden = golden_queries(index, index.note_ids[rows].tolist(), embeddings.vectors[rows])
        (draft / GOLDEN_FILE).write_text(json.dumps(golden))
        (draft / METADATA).write_text(json.dumps({"waiting": waiting}))


def _changes(log: NoteLog, base: Base, upto: int) -> tuple[dict[str, int], set[str]]:
    """How entry `upto` left other notes than a base has: note_id -> its last entry, if it lives; and those that were
    deleted, even if they came back: what was before the deletion does not stay while the new text waits.
    """
    newest = {entry.note.note_id: entry.seq for entry in log.newest(base.waiting)}
    gone: set[str] = set()
    after = base.cut_seq
    while after < upto:
        for entry in log.tail(after, min(_TAIL_ENTRIES, upto - after)):
            after, note_id = entry.seq, entry.note.note_id
            if after > upto:  # some before it are forgotten
                break
            newest[note_id] = after
            if entry.deleted:
                del newest[note_id]
                gone.add(note_id)
    return newest, gone
