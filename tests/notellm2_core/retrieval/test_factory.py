"""Factory strings: each family is built, tuned and searched, or refused in one sentence before FAISS aborts."""

from functools import cache

import numpy as np
import pytest

from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.parameters import parse_parameters
from tests.notellm2_core.retrieval.test_index import factory, random_embeddings, recall

TABLE = random_embeddings(1500)

EXACT = {  # vectors, or codes that are nearly as good, or a last step with vectors -> the parameters that are tuned
    "Flat": (),
    "SQ8": (),
    "SQfp16": (),
    "RR,Flat": (),
    "L2norm,Flat": (),
    "IDMap,Flat": (),
    "HNSW32": ("efSearch",),
    "HNSW16,SQ8": ("efSearch",),
    "RR,HNSW16": ("efSearch",),
    "IDMap,HNSW16": ("efSearch",),
    "NSG16": ("search_L",),
    "IDMap,RR,NSG16": ("search_L",),
    "NSG16,SQ4,RFlat": ("k_factor_rf",),
    "IVF16,Flat": ("nprobe",),
    "IVF16,SQ8": ("nprobe",),
    "RR,IVF16,Flat": ("nprobe",),
    "IVF16(PQ4x4np),Flat": ("nprobe",),
    "IVF16_HNSW8,Flat": ("nprobe", "quantizer_efSearch"),
    "PQ8x4np,RFlat": ("k_factor_rf",),
    "PCA8,Flat,RFlat": ("k_factor_rf",),
    "HNSW16,SQ4,RFlat": ("k_factor_rf", "efSearch"),
    "IVF16,PQ8x4np,RFlat": ("k_factor_rf", "nprobe"),
    "IVF16,PQ8x4fs,RFlat": ("k_factor_rf", "nprobe"),
    "IVF16,RaBitQ,RFlat": ("k_factor_rf", "nprobe"),
    "OPQ4,IVF16,PQ4x4,RFlat": ("k_factor_rf", "nprobe"),
}
COMPRESSED = ("SQ4", "PQ4x4np", "PQ4x4fs", "PCA8,Flat", "IVF16,PQ4x4np", "RQ4x4", "LSQ2x4", "RaBitQ")


@cache
def index_of(name: str) -> Index:
    return make_index(TABLE, factory(name))


def recall_at_10(name: str) -> tuple[float, float]:
    """Recall by brute force of notes of an index, and as the build measured it; always k hits.

    All 1,499 others are left to the rest: FAISS's fast scan (fs) can lose the last of all vectors.
    """
    index, queries = index_of(name), np.arange(0, 1500, 10)
    for k in (10, 46, 47, 300, 1498):
        rows, _ = index.search_rows(TABLE.vectors[queries], k, own=queries)
        assert all(len({*row} - {-1, query}) == k for query, row in zip(queries, rows, strict=True))
        if k == 10:
            actual = recall(rows, TABLE.vectors, queries, queries, 10)
    (tuned,) = index.tuned
    return actual, tuned.recall


@pytest.mark.parametrize("name", EXACT)
def test_k_notes_at_the_target_recall(name: str) -> None:
    actual, measured = recall_at_10(name)
    assert measured >= 95 and actual >= 95


@pytest.mark.parametrize("name", COMPRESSED)
def test_k_notes_below_the_target_recall(name: str) -> None:
    """The recall that the build measures, and of which the command and the check warn, is the actual one."""
    actual, measured = recall_at_10(name)
    assert measured < 94 and abs(actual - measured) < 8


@pytest.mark.parametrize("name", EXACT)
def test_the_parameters_of_a_factory(name: str) -> None:
    index = index_of(name).faiss_index
    text = ",".join(f"{parameter}=20" for parameter in EXACT[name])
    assert parse_parameters(text, index) == dict.fromkeys(EXACT[name], 20)
    assert {*(index_of(name).tuned[0].parameters or {})} <= {*EXACT[name]}
    known = ", ".join(f"{parameter}=NUMBER" for parameter in EXACT[name]) or "none"
    with pytest.raises(ValueError, match=f"it has {known}, or exhaustive"):
        parse_parameters("ht=3", index)


def test_a_longer_search_through_a_graph_finds_more() -> None:
    """FAISS takes no search_L per search: more points are asked for."""
    table, queries = random_embeddings(3000, 128), np.arange(200)
    index = make_index(table, factory("NSG16"))
    recalls = []
    for length in (10, 20, 100):
        rows, _ = index.search_rows(table.vectors[queries], 10, queries, f"search_L={length}")
        recalls.append(recall(rows, table.vectors, queries, queries, 10))
    assert recalls[0] + 0.4 < recalls[1] < recalls[2] - 0.2
    assert index_of("NSG16").tuned[0].parameters == {"search_L": 20}


@pytest.mark.parametrize(
    "name",
    ["HNSW0", "HNSW1", "HNSW01,Flat", "HNSW1,SQ8", "IVF8_HNSW0,Flat", "IVF8(HNSW1),Flat", "IDMap,HNSW1", "PCA8,HNSW1",
     "Flat,Refine(HNSW0)", "HNSW100000000", "NSG1", "NSG8", "PQ4x0", "IVF8,PQ4x0", "PQ4x4fs_0", "OPQ4_0,PQ4",
     "Flat,Refine(NSG16)", "RR0,Flat", "PCAR0,Flat", "RQ0x4", "LSQ2x0", "PRQ2x0x4", "ZnLattice0x10_4",
     "HNSW32_0+PQ4", "IVF0,Flat"],
)  # fmt: skip
def test_factories_on_which_faiss_aborts(name: str) -> None:
    with pytest.raises(ValueError, match=r"index.factory = .*: FAISS cannot (build|rank)"):
        make_index(random_embeddings(600), factory(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("IVF4096,Flat", r"cannot be built from 600 distinct .*Number of training points \(600\).*Flat or HNSW32"),
        ("PQ7", r"is no FAISS factory string for width 16: The dimension"),
        ("Nonsense", r"is no FAISS factory string for width 16: could not parse index string Nonsense"),
        ("HNSW-1", r"is no FAISS factory string for width 16: could not parse index string HNSW-1"),
        ("HNSW16,PQ4", r"ranks by Euclidean distance in FAISS"),
    ],
)
def test_a_factory_that_cannot_be_built_is_named(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"index.factory = '{name}' {reason}"):
        make_index(random_embeddings(600), factory(name))
