"""The vectors that an index holds, as they were added to it."""

from typing import Any

import faiss
import numpy as np

from notellm2_core.retrieval.parameters import GRAPHS


def stored_vector(index: Any, position: int) -> np.ndarray | None:
    """The vector [d] at `position`, up to the rounding of a rotation (OPQ, RR); None: the index holds compressed ones.

    An IVF index is given the table of positions that FAISS needs for this.
    """
    if not _holds_vectors(index):
        return None
    while isinstance(index, faiss.IndexIDMap):  # maps every position to itself
        index = faiss.downcast_index(index.index)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()
    vector: np.ndarray = index.reconstruct(position)
    return vector


def _holds_vectors(index: Any) -> bool:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        transforms = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        are_rotations = all(isinstance(t, faiss.LinearTransform) and t.is_orthonormal for t in transforms)
        return are_rotations and index.index.d == index.d and _holds_vectors(index.index)
    if isinstance(index, faiss.IndexIDMap):
        return _holds_vectors(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _holds_vectors(index.refine_index)
    if isinstance(index, GRAPHS):
        return _holds_vectors(index.storage)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat)
