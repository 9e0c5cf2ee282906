"""The vectors that an index gives back."""

import numpy as np
import pytest

from notellm2_core.inference.index_queries import find_neighbours, stored_note
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.stored import stored_vector
from tests.notellm2_core.retrieval.test_index import factory, random_embeddings


def index_of(name: str) -> Index:
    return make_index(random_embeddings(300), factory(name))


@pytest.mark.parametrize(
    "name", ["Flat", "HNSW8", "NSG16", "IVF8,Flat", "IDMap,IVF8_HNSW4,Flat", "RR,Flat", "OPQ4,HNSW8", "PQ4x4,RFlat",
             "PCA8,IVF4,SQ4,RFlat"],
)  # fmt: skip
def test_an_index_of_vectors_gives_them_back(name: str) -> None:
    """Those of a rotation up to its rounding; a search by the stored vector equals that by the table's."""
    table, index = random_embeddings(300), index_of(name)
    for row in (0, 7, 299):
        vector = stored_vector(index.faiss_index, int(index.points.of_row[row]))
        assert vector is not None
        np.testing.assert_allclose(vector, table.vectors[row], atol=1e-6)
    stored = stored_note(index, "note7")
    ((_, hits),) = find_neighbours(index, stored, 5)
    expected, _ = index.search(table.vectors[7:8], 5, leave_out=["note7"])
    assert [hit["note_id"] for hit in hits] == expected[0].tolist()


@pytest.mark.parametrize(
    "name", ["SQ8", "HNSW8,SQ8", "IVF8,SQfp16", "PQ4x4", "PCA8,Flat", "PCAW16,Flat", "SQ4,Refine(SQ8)"]
)
def test_compressed_vectors_are_not_given_back(name: str) -> None:
    index = index_of(name)
    assert stored_vector(index.faiss_index, 7) is None
    with pytest.raises(ValueError, match=r"the index \(.*\) holds compressed vectors: name the table of the notes by"):
        stored_note(index, "note7")


def test_equal_vectors_and_missing_notes() -> None:
    """The third note is at the second's position."""
    table = random_embeddings(4)
    table.vectors[2] = table.vectors[1]
    index = make_index(table, factory("HNSW8"))
    np.testing.assert_array_equal(stored_note(index, "note2").vectors, table.vectors[1:2])
    np.testing.assert_array_equal(stored_note(index, "note3").vectors, table.vectors[3:])
    with pytest.raises(ValueError, match=r"the index holds no note 'note4'; for another note, name its table by"):
        stored_note(index, "note4")
