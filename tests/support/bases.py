"""The files of a base of a few notes, as a release or a compaction leaves them."""

import json
from collections.abc import Sequence

import numpy as np

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.release.golden import golden_queries
from notellm2_core.release.release import SERVING_FOLDER
from notellm2_core.release.served import mark_served
from notellm2_core.retrieval.build import save_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import write_neighbours
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, NEIGHBOURS_FOLDER
from notellm2_core.serving.base import OF_RELEASE
from notellm2_core.serving.engine import BaseFiles

WIDTH = 16  # of the table: searches for more neighbours need the engine


def write_base(
    lake: Lake, release_id: str, note_ids: Sequence[str], vectors: np.ndarray, mark: str = OF_RELEASE
) -> BaseFiles:
    """Index, table and golden queries of unit vectors [N, d]; the release counts as served."""
    folder = lake.root / SERVING_FOLDER / release_id / mark
    save_index(
        Embeddings(tuple(note_ids), vectors, weights_id="weights"), folder / INDEX_FOLDER, IndexSettings(factory="Flat")
    )
    index = Index.load(folder / INDEX_FOLDER)
    write_neighbours(index, vectors, folder / NEIGHBOURS_FOLDER, width=WIDTH)
    golden = golden_queries(index, note_ids[:3], vectors[:3])
    (folder / GOLDEN_FILE).write_text(json.dumps(golden))
    mark_served(lake, release_id)
    return BaseFiles(release_id, mark, folder / INDEX_FOLDER, folder / NEIGHBOURS_FOLDER, folder / GOLDEN_FILE)


def unit_vectors(seed: int, num: int, dim: int = 8) -> np.ndarray:
    """[num, dim], random."""
    vectors = np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
