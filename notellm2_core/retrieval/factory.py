"""Factory strings: which FAISS builds, for inner products, and which it answers with an abort."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

_MAX_LINKS = 512  # of a vector in a graph: 4 kB
_FEWEST_LINKS = {"HNSW": 2, "NSG": 16}  # FAISS crashes below, or never ends: NSG8 with one data set in five
_LARGEST_NUMBER = 1 << 24  # clusters, bits and widths are smaller; FAISS allocates memory for what it reads


def empty_index(dim: int, factory: str) -> Any:
    """A FAISS index for vectors of width `dim`, ranked by inner product. Raises ValueError if there is none."""
    require_harmless(factory)
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as e:
        raise ValueError(f"index.factory = {factory!r} is no FAISS factory string for width {dim}: {_reason(e)}") from e
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"index.factory = {factory!r} ranks by Euclidean distance in FAISS, not by inner product; use another."
        )
    return index


def require_harmless(factory: str) -> None:
    """Raises ValueError for numbers in a factory string on which FAISS aborts, never ends or runs out of memory.

    Tried on FAISS 1.15: the crashes have a 0 for a number (HNSW0, PQ4x0, OPQ4_0, RQ0x4), or too few links.
    """
    for digits in re.findall(r"\d+", factory):
        if not 1 <= int(digits) <= _LARGEST_NUMBER:
            raise ValueError(
                f"index.factory = {factory!r}: FAISS cannot build with {digits}; use 1 to {_LARGEST_NUMBER}."
            )
    if "Refine(NSG" in factory:
        raise ValueError(f"index.factory = {factory!r}: FAISS cannot rank again with a graph of NSG; use RFlat.")
    for graph, links in re.findall(r"(HNSW|NSG)(\d+)", factory):
        if not _FEWEST_LINKS[graph] <= int(links) <= _MAX_LINKS:
            raise ValueError(
                f"index.factory = {factory!r}: FAISS cannot build a graph with {links} links per vector; use {graph}"
                f"{_FEWEST_LINKS[graph]} to {graph}{_MAX_LINKS}, such as {graph}32."
            )


def filled_index(vectors: np.ndarray, factory: str, num_threads: int) -> Any:
    """A trained FAISS index of `vectors` [P, d], at their rows. Raises ValueError if FAISS cannot build it."""
    index = trained_index(vectors, factory, num_threads)
    add_vectors(index, vectors, factory, num_threads)
    return index


def trained_index(vectors: np.ndarray, factory: str, num_threads: int) -> Any:
    """A FAISS index that holds nothing yet, trained with `vectors` [P, d] if need be. Raises as `filled_index`."""
    index = empty_index(vectors.shape[1], factory)
    if not index.is_trained:
        with _building(len(vectors), index.d, factory, num_threads):
            index.train(vectors)
    return index


def add_vectors(index: Any, vectors: np.ndarray, factory: str, num_threads: int) -> None:
    """Add `vectors` [P, d] at the next positions of a trained index. Raises as `filled_index`."""
    with _building(index.ntotal + len(vectors), index.d, factory, num_threads):
        if isinstance(index, faiss.IndexIDMap):
            index.add_with_ids(vectors, index.ntotal + np.arange(len(vectors)))
        else:
            index.add(vectors)


def can_grow(index: Any) -> bool:
    """Whether vectors can be added to an index that holds some: NSG makes its graph of all at once."""
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform | faiss.IndexRefine):
        inner = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
        index = faiss.downcast_index(inner)
    return not isinstance(index, faiss.IndexNSG)


@contextmanager
def _building(num_vectors: int, dim: int, factory: str, num_threads: int) -> Iterator[None]:
    """FAISS works with `num_threads`; its errors are ValueErrors that name the setting."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        raise ValueError(
            f"index.factory = {factory!r} cannot be built from {num_vectors} distinct vectors of width {dim}: "
            f"{_reason(e)}. Use fewer clusters or codes, or Flat or HNSW32, which need no training."
        ) from e
    finally:
        faiss.omp_set_num_threads(threads)


def _reason(error: Exception) -> str:
    """The message of a FAISS error, without the C++ function, line and condition."""
    return re.sub(r"^.*(\.cpp:\d+: |failed: )", "", " ".join(str(error).split())).rstrip(".")
