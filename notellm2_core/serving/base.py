"""The base of a live index: the notes of a release as they were at a place in the log, with their neighbours.

At first it is the release itself, and only its table of neighbours is made. Compaction makes a later one, with what was
written since then, so that a service compares its queries with fewer new notes, and starts sooner.

    LAKE/serving/RELEASE/release/      the table of the release's own index
    LAKE/serving/RELEASE/MARK/         index/, table/, golden.json and base.json: the notes of the log up to its mark

A mark is set in the log. So a base is never taken for one of another log, nor of a log that was restored from a backup
and has gone another way since.
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.release.golden import require_golden_answers
from notellm2_core.release.release import SERVING_FOLDER, Release
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import NeighbourTable, write_neighbours
from notellm2_core.runtime.files import new_folder
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER

if TYPE_CHECKING:  # who only opens a release needs no database
    from notellm2_core.serving.log import NoteLog

TABLE, METADATA = "table", "base.json"
OF_RELEASE = "release"  # in place of a mark
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """`cut_seq`: it holds the log's notes up to this entry. `waiting`: entries before it that it does not hold, because
    the model has not embedded them yet, or cannot. `mark`: its name.
    """

    index: Index
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


def open_base(lake: Lake, release: Release, log: "NoteLog") -> Base:
    """The newest base of a release that can be opened and answers its golden queries. The table of a release is made
    when it is first asked for, which takes minutes for a million notes.

    A compacted base that is damaged is left out, with a warning. Raises ValueError where the release itself is damaged,
    and OSError where its files are missing.
    """
    for mark, cut in reversed(marked_bases(lake, release.id, log)):
        try:
            return _open_base(lake, release, mark, cut)
        except (ValueError, OSError) as e:
            if mark == OF_RELEASE:
                raise
            _LOGGER.warning("the base %s is left out: %s", base_folder(lake, release.id, mark), e)
    raise AssertionError("the base of the release itself is always there")


def open_release_base(lake: Lake, release: Release) -> Base:
    """The release itself, without what was written after it. Raises as `open_base`."""
    return _open_base(lake, release, OF_RELEASE, 0)


def _open_base(lake: Lake, release: Release, mark: str, cut: int) -> Base:
    folder = base_folder(lake, release.id, mark)
    home = release.path if mark == OF_RELEASE else folder
    index = Index.load(home / INDEX_FOLDER)
    if index.weights_id is None:
        raise ValueError(f"release {release.id} does not say which model made its vectors")
    if not folder.exists():
        _write_table(release, index, folder)
    table = NeighbourTable.load(folder if mark == OF_RELEASE else folder / TABLE, index)
    require_golden_answers(home / GOLDEN_FILE, index, table.vectors)
    waiting = json.loads((folder / METADATA).read_text())["waiting"] if mark != OF_RELEASE else ()
    return Base(index, table, cut, mark, tuple(waiting))


def _write_table(release: Release, index: Index, folder: Path) -> None:
    embeddings = read_embeddings(release.path / "embeddings")
    vectors = embeddings.vectors[embeddings.rows(list(index.note_ids))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        write_neighbours(index, vectors, draft)


def marked_bases(lake: Lake, release_id: str, log: "NoteLog") -> list[tuple[str, int]]:
    """The bases of a release for this log: their marks, and their places in it. The newest comes last."""
    folder = lake.root / SERVING_FOLDER / release_id
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    marks = [name for name in names if re.fullmatch("[0-9a-f]{16}", name)]
    return [(OF_RELEASE, 0), *(log.marked(marks) if marks else ())]


def base_folder(lake: Lake, release_id: str, mark: str) -> Path:
    """The folder of a base: of a compacted one, or of the table of the release itself."""
    return lake.root / SERVING_FOLDER / release_id / mark
