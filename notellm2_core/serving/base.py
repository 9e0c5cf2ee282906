"""The base of a live index: the notes of a release as they were at a place in the log, with their neighbours.

At first it is the release itself. Compaction makes a later one, with what was written since then, so that a service
compares its queries with fewer new notes, and starts sooner.

    LAKE/serving/RELEASE/MARK/    index/, neighbours/, golden.json and base.json: the notes of the log up to its mark

A mark is set in the log. So a base is never taken for one of another log, nor of a log that was restored from a backup
and has gone another way since.
"""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import SERVING_FOLDER, Release
from notellm2_core.release.served import served_releases
from notellm2_core.retrieval.neighbour_table import NeighbourTable
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NEIGHBOURS_FOLDER
from notellm2_core.serving.engine import BaseFiles, BaseIndex, Engine, EngineDown, FaissEngine

if TYPE_CHECKING:  # who only opens a release needs no database
    from notellm2_core.serving.log import NoteLog

METADATA = "base.json"
OF_RELEASE = "release"  # in place of a mark
_MARK = re.compile("[0-9a-f]{16}")
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """`cut_seq`: it holds the log's notes up to this entry. `waiting`: entries before it that it does not hold, because
    the model has not embedded them yet, or cannot, or because the weekly run has left them out. `mark`: its name.
    """

    index: BaseIndex
    table: NeighbourTable
    cut_seq: int
    mark: str
    waiting: tuple[int, ...] = ()

    @property
    def weights_id(self) -> str:
        """The model that made its vectors."""
        assert self.index.weights_id is not None  # `open_base` refuses others
        return self.index.weights_id

    @property
    def seq(self) -> int:
        """The last entry up to which it holds all."""
        return min(self.waiting, default=self.cut_seq + 1) - 1


def open_base(lake: Lake, release: Release, log: "NoteLog", engine: Engine | None = None) -> Base:
    """The newest base of a release that can be opened and answers as it should.

    engine: where it is searched; None: FAISS. A compacted base that is damaged is left out, with a warning. Raises
    ValueError where the release itself is damaged, OSError where its files are missing, and EngineDown.
    """
    for mark, cut in reversed(marked_bases(lake, release, log)):
        try:
            base = _open_base(lake, release, mark, cut, engine or FaissEngine())
        except (ValueError, OSError) as e:
            if mark == OF_RELEASE or isinstance(e, EngineDown):
                raise
            _LOGGER.warning("the base %s is left out: %s", base_folder(lake, release.id, mark), e)
            continue
        if mark == OF_RELEASE:  # it lacks notes that the weekly run has put in quarantine, for example
            lacking = [seq for seq, note_id in log.living(cut) if note_id not in base.index.rows]
            base = replace(base, waiting=tuple(lacking))
        return base
    raise AssertionError("the base of the release itself is always there")


def open_release_base(lake: Lake, release: Release) -> Base:
    """The release itself, without what was written after it. Raises as `open_base`."""
    return _open_base(lake, release, OF_RELEASE, 0, FaissEngine())


def _open_base(lake: Lake, release: Release, mark: str, cut: int, engine: Engine) -> Base:
    folder = release.path if mark == OF_RELEASE else base_folder(lake, release.id, mark)
    files = BaseFiles(release.id, mark, folder / INDEX_FOLDER, folder / NEIGHBOURS_FOLDER, folder / GOLDEN_FILE)
    index, neighbours = engine.open(files)
    if index.weights_id is None:
        raise ValueError(f"release {release.id} does not say which model made its vectors")
    waiting = () if mark == OF_RELEASE else json.loads((folder / METADATA).read_text())["waiting"]
    return Base(index, neighbours, cut, mark, tuple(waiting))


def marked_bases(lake: Lake, release: Release, log: "NoteLog") -> list[tuple[str, int]]:
    """The bases of a release for this log: their marks, and their places in it. The newest comes last."""
    marks = [folder.name for folder in _compacted(lake, release.id)]
    cuts = log.marked([release.posted]) if release.posted else ()
    return [(OF_RELEASE, cuts[0][1] if cuts else 0), *(log.marked(marks) if marks else ())]


def base_folder(lake: Lake, release_id: str, mark: str) -> Path:
    """The folder of a compacted base."""
    return lake.root / SERVING_FOLDER / release_id / mark


def recent_bases(lake: Lake) -> set[tuple[str, str]]:
    """The releases that a service has in memory, with the marks of their last two bases."""
    recent = set()
    for release_id in served_releases(lake):
        folders = sorted(_compacted(lake, release_id), key=lambda path: path.stat().st_mtime)
        recent |= {(release_id, mark) for mark in [OF_RELEASE, *(path.name for path in folders)][-2:]}
    return recent


def _compacted(lake: Lake, release_id: str) -> list[Path]:
    """The folders of the compacted bases of a release, for whatever log."""
    folder = lake.root / SERVING_FOLDER / release_id
    return [path for path in folder.iterdir() if _MARK.fullmatch(path.name)] if folder.is_dir() else []
