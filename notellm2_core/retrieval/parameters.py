"""Search-time parameters of FAISS indexes: their ranges, and searches with them that change nothing in the index.

    efSearch             HNSW: candidates in memory during the walk through the graph
    search_L             NSG: the same
    nprobe               IVF: clusters that are searched
    quantizer_efSearch   IVF with an HNSW of its clusters, such as IVF4096_HNSW32: efSearch among them
    k_factor_rf          Refine: candidates per neighbour that are ranked again

The names are those of `faiss.ParameterSpace`, which lacks search_L. Its own exploration (`explore`) is of no use here:
its efSearch ends at 512, below the k of recall, and it chooses by measured time, which differs from run to run.

P: points of the index, Q: queries, d: width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import faiss
import numpy as np

Parameters = Mapping[str, int]  # by name; a name that is missing has FAISS's default
Searcher = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
EXHAUSTIVE = "exhaustive"  # in place of parameters: compare the query with every vector of the index
GRAPHS = (faiss.IndexHNSW, faiss.IndexNSG)


def parameter_ranges(index: Any, k: int) -> dict[str, tuple[int, int]]:
    """name -> the least and the largest sensible value in a search for k points. Empty: the index has no parameters.

    A graph is compared with a query at some 32 points per candidate, so efSearch ends where all points are.
    """
    space = faiss.ParameterSpace()
    while isinstance(index, faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    space.initialize(index)
    names = {space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())}
    if isinstance(_without_transforms(index), faiss.IndexNSG):
        names.add("search_L")
    num_points = index.ntotal
    candidates = k, max(k, num_points // 32)
    ranges = {"k_factor_rf": (1, max(1, num_points // max(k, 1))), "efSearch": candidates, "search_L": candidates}
    if "nprobe" in names:
        num_clusters = faiss.extract_index_ivf(index).nlist
        ranges |= {"nprobe": (1, num_clusters), "quantizer_efSearch": (16, max(16, num_clusters))}
    return {name: bounds for name, bounds in ranges.items() if name in names}


def parse_parameters(text: str, index: Any) -> Parameters | None:
    """ "efSearch=200" -> {"efSearch": 200}; None for "exhaustive", {} for "".

    Raises ValueError for anything else, and for a parameter that `index` does not have.
    """
    if text == EXHAUSTIVE:
        return None
    names = parameter_ranges(index, 1)
    values = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in names or not value.strip().isdigit() or int(value) < 1:
            known = ", ".join(f"{n}=NUMBER" for n in names) or "none"
            raise ValueError(f"{part!r} is no search parameter of this index: it has {known}, or {EXHAUSTIVE}.")
        values[name.strip()] = int(value)
    return values


def format_parameters(parameters: Parameters | None) -> str:
    """The text that `parse_parameters` reads."""
    return EXHAUSTIVE if parameters is None else ",".join(f"{name}={value}" for name, value in parameters.items())


def scaled_parameters(parameters: Parameters, tuned_k: int, k: int) -> Parameters:
    """Parameters for `tuned_k` neighbours in a search for k: as many candidates are ranked again."""
    factor = {name: -(-parameters[name] * tuned_k // k) for name in parameters if name == "k_factor_rf"}
    return {**parameters, **factor}


def searcher(index: Any, parameters: Parameters | None) -> Searcher:
    """A search with these parameters, for the k best points of queries [Q, d].

    It returns inner products and positions, [Q, k]; position -1: none was found. Parameters None compare with every
    vector. Several threads may search an index, each with its own parameters.
    """
    if parameters is None:
        return partial(_compare_all, index)
    if "search_L" in parameters:
        return partial(_search_nsg, index, parameters["search_L"])
    return partial(index.search, params=_search_parameters(index, parameters))


def _search_nsg(index: Any, length: int, queries: np.ndarray, k: int) -> tuple[Any, Any]:
    """FAISS takes no search_L per search, but uses max(search_L, k)."""
    scores, points = index.search(queries, max(k, min(length, index.ntotal)))
    return scores[:, :k], points[:, :k]


def _without_transforms(index: Any) -> Any:
    """The index in an IndexPreTransform, or `index` itself."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _search_parameters(index: Any, values: Parameters) -> Any:
    """The `faiss.SearchParameters` of an index and of those within it; None: there is nothing to set."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        return _search_parameters(index.index, values)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(index.index, values)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        factor = values.get("k_factor_rf", index.k_factor)
        inner = _search_parameters(index.base_index, values)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexHNSW) and "efSearch" in values:
        return faiss.SearchParametersHNSW(efSearch=values["efSearch"])
    if isinstance(index, faiss.IndexIVF) and "nprobe" in values:
        quantizer = values.get("quantizer_efSearch")
        inner = None if quantizer is None else faiss.SearchParametersHNSW(efSearch=quantizer)
        return faiss.SearchParametersIVF(nprobe=values["nprobe"], quantizer_params=inner)
    return None


def _compare_all(index: Any, queries: np.ndarray, k: int) -> tuple[Any, Any]:
    """The k best of all vectors of the index, by the scores that its codes give."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):  # maps every position to itself
        return _compare_all(index.index, queries, k)
    if isinstance(index, faiss.IndexPreTransform):
        for i in range(index.chain.size()):
            queries = faiss.downcast_VectorTransform(index.chain.at(i)).apply(queries)
        return _compare_all(index.index, queries, k)
    if isinstance(index, faiss.IndexRefine):
        return _compare_all(index.refine_index, queries, k)
    if isinstance(index, GRAPHS):
        return _compare_all(index.storage, queries, k)
    if isinstance(index, faiss.IndexIVF):
        return index.search(queries, k, params=_all_clusters(index))
    return index.search(queries, k)


def _all_clusters(index: Any) -> Any:
    """The parameters of an IVF index with which every cluster is searched, for any index that finds the clusters."""
    quantizer, inner = faiss.downcast_index(index.quantizer), None
    if isinstance(quantizer, faiss.IndexIVF):
        inner = _all_clusters(quantizer)
    elif isinstance(quantizer, faiss.IndexHNSW):
        inner = faiss.SearchParametersHNSW(efSearch=index.nlist)
    return faiss.SearchParametersIVF(nprobe=index.nlist, quantizer_params=inner)
