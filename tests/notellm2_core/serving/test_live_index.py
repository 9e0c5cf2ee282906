"""The live index beside comparing all living notes: by random changes and questions, and under concurrent writes."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.neighbour_table import NeighbourTable, write_neighbours
from notellm2_core.serving.live_index import LiveIndex
from tests.support.brute_force import brute_force

DIM = 8
MakeIndex = Callable[[int], tuple[LiveIndex, dict[str, np.ndarray]]]


def unit(rng: np.random.Generator, num: int) -> np.ndarray:
    vectors = rng.normal(size=(num, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def make_live(tmp_path_factory: pytest.TempPathFactory) -> MakeIndex:
    """An index of so many notes, and the notes by id. The files are made once, the live index is new."""
    made: dict[int, tuple[LiveIndex, Mapping[str, np.ndarray]]] = {}

    def make(num: int) -> tuple[LiveIndex, dict[str, np.ndarray]]:
        if num not in made:
            ids, vectors = tuple(f"n{i:03d}" for i in range(num)), unit(np.random.default_rng(num), num)
            index = make_index(Embeddings(ids, vectors, Path("x")), IndexSettings(factory="Flat"))
            folder = tmp_path_factory.mktemp("table")
            write_neighbours(index, vectors, folder, width=16)
            made[num] = LiveIndex(index, NeighbourTable.load(folder, index)), dict(zip(ids, vectors, strict=True))
        live, notes = made[num]
        return LiveIndex(live.index, live.table), dict(notes)

    return make


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data(), num=st.sampled_from([1, 2, 5, 40, 200]), seed=st.integers(0, 10_000))
def test_answers_are_those_of_comparing_all(make_live: MakeIndex, data: st.DataObject, num: int, seed: int) -> None:
    live, notes = make_live(num)
    rng = np.random.default_rng([1, seed])
    names = [f"n{i:03d}" for i in range(2 * num + 3)]
    for seq in range(1, data.draw(st.integers(1, 40)) + 1):
        changed = [str(name) for name in rng.choice(names, min(len(names), int(rng.integers(1, 4))), replace=False)]
        changes = {name: unit(rng, 1)[0] if rng.random() < 0.6 else None for name in changed}
        live.apply(changes, seq)
        for name, vector in changes.items():
            notes.pop(name, None)
            if vector is not None:
                notes[name] = vector
        history = {str(name): float(rng.choice([0.5, 1.0, 2.0])) for name in rng.choice(names, int(rng.integers(1, 6)))}
        exclude = {str(name) for name in rng.choice(names, int(rng.integers(0, 3)))}
        k, how = int(rng.choice([1, 3, 10, 30])), rng.choice(["max", "sum", "rrf"])
        answer = live.recall(history, k, how, exclude)
        best, found_by = brute_force(notes, history, k, how, exclude)
        assert answer.unknown == tuple(name for name in history if name not in notes) and answer.seq == seq
        assert len(answer.hits) == len(best)
        np.testing.assert_allclose([hit.score for hit in answer.hits], [score for _, score in best], atol=1e-5)
        for hit in answer.hits:
            assert set(hit.because) == found_by[hit.note_id]
        query = unit(rng, 1)[0]
        scores = {name: float(query @ vector) for name, vector in notes.items() if name not in exclude}
        nearest = sorted(scores, key=lambda name: -scores[name])[:k]
        assert [hit.note_id for hit in live.similar(query, k, exclude).hits] == nearest


def test_equal_scores_are_in_the_order_of_their_ids(make_live: MakeIndex) -> None:
    live, notes = make_live(5)
    vector = notes["n000"]
    live.apply({"b": vector, "a": vector, "c": vector}, 1)
    answer = live.similar_to("n000", 2)
    assert [hit.note_id for hit in answer.hits] == ["a", "b"]
    assert answer.hits[0].score == pytest.approx(1) and answer.hits[0].because == ("n000",)


def test_a_note_is_gone_and_comes_back(make_live: MakeIndex) -> None:
    live, notes = make_live(40)
    live.apply({"n001": None}, 1)
    assert live.vector("n001") is None
    assert "n001" not in {hit.note_id for hit in live.similar(notes["n001"], 39).hits}
    with pytest.raises(KeyError):
        live.similar_to("n001", 3)
    live.apply({"n001": notes["n002"]}, 2)
    assert live.similar_to("n002", 1).hits[0].note_id == "n001"
    np.testing.assert_array_equal(live.vector("n001"), notes["n002"])


def test_after_the_deadline_the_answer_is_partial(make_live: MakeIndex) -> None:
    """Rows of the table are always looked up; of the searches for new notes, none begins after the deadline."""
    live, _ = make_live(40)
    live.apply({"new": unit(np.random.default_rng(5), 1)[0]}, 1)
    assert not live.recall({"n000": 1.0, "new": 1.0}, 5, deadline=np.inf).is_partial
    answer = live.recall({"n000": 1.0, "new": 1.0}, 5, deadline=0.0)
    assert answer.is_partial and len(answer.hits) == 5


def test_readers_see_changes_together_or_not_at_all(make_live: MakeIndex) -> None:
    """A note moves between two places, and its twin with it: every answer has both, at the same place, once."""
    live, notes = make_live(40)
    places = [notes["n000"], notes["n001"]]
    live.apply({"twin a": places[0], "twin b": places[0]}, 1)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            answer = live.similar(places[0], 60)
            twins = {hit.note_id: round(hit.score, 4) for hit in answer.hits if hit.note_id.startswith("twin")}
            ids = [hit.note_id for hit in answer.hits]
            if len(twins) != 2 or len(set(twins.values())) != 1 or len(ids) != len(set(ids)) or len(ids) != 42:
                wrong.append(answer)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for seq in range(2, 1500):  # beyond the capacity of a new delta, which grows meanwhile
        live.apply({"twin a": places[seq % 2], "twin b": places[seq % 2]}, seq)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong, wrong[0]
