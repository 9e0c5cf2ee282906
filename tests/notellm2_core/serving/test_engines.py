"""What a live index asks of its engine: FAISS, milvus-lite and a Milvus server beside comparing all notes."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.lake.lake import Lake
from notellm2_core.retrieval.neighbour_table import ROWS
from notellm2_core.serving.engine import open_engine
from notellm2_core.serving.live_index import Answer, LiveIndex
from tests.support.bases import WIDTH, unit_vectors, write_base
from tests.support.brute_force import brute_force
from tests.support.engines import FIRST_IDS, NUM, NUM_EQUAL, EngineSite, nearest, notes_of

QUERIES = unit_vectors(4, 6)
LONG = 2 * WIDTH  # more neighbours than the table has


def stacked(notes: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([*notes.values()])


def ids(answer: Answer) -> list[str]:
    return [hit.note_id for hit in answer.hits]


def require_nearest(answer: Answer, notes: dict[str, np.ndarray], query: np.ndarray, k: int, *without: str) -> None:
    """The hits are the nearest notes, with their inner products."""
    expected = nearest(notes, query, without)[:k]
    assert ids(answer) == [note_id for note_id, _ in expected]
    np.testing.assert_allclose([hit.score for hit in answer.hits], [score for _, score in expected], atol=1e-5)


# --- the base: rows of notes -----------------------------------------------------------------------------------------


def test_rows_are_the_nearest_with_their_inner_products(site: EngineSite) -> None:
    index, _ = site.base("main")
    rows, scores = index.search_rows(QUERIES, 10)
    exact = QUERIES @ stacked(notes_of("main")).T
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, axis=1), scores, atol=1e-5)


def test_the_best_comes_first(site: EngineSite) -> None:
    _, scores = site.base("main")[0].search_rows(QUERIES, 50)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_one_neighbour(site: EngineSite) -> None:
    vectors = stacked(notes_of("main"))
    rows, scores = site.base("main")[0].search_rows(vectors[40:41], 1)
    assert rows.tolist() == [[40]] and scores == pytest.approx(1, abs=1e-5)


def test_as_many_as_there_are_gives_each_note_once(site: EngineSite) -> None:
    rows, _ = site.base("main")[0].search_rows(QUERIES[:2], NUM)
    assert (np.sort(rows, axis=1) == np.arange(NUM)).all()


def test_more_than_there_are_leaves_the_rest_empty(site: EngineSite) -> None:
    rows, scores = site.base("main")[0].search_rows(QUERIES[:2], NUM + 5)
    assert rows.shape == scores.shape == (2, NUM + 5)
    assert (rows[:, NUM:] == -1).all() and np.isneginf(scores[:, NUM:]).all()
    assert (rows[:, :NUM] >= 0).all() and np.isfinite(scores[:, :NUM]).all()


def test_equal_vectors_are_in_the_order_of_their_rows(site: EngineSite) -> None:
    rows, scores = site.base("main")[0].search_rows(stacked(notes_of("main"))[:1], 10)
    assert rows[0, :NUM_EQUAL].tolist() == [*range(NUM_EQUAL)]
    assert len(set(scores[0, :NUM_EQUAL].tolist())) == 1 and scores[0, NUM_EQUAL] < scores[0, 0]


def test_of_equal_vectors_as_many_as_asked_for_are_found(site: EngineSite) -> None:
    """Which of them, is open."""
    rows, scores = site.base("main")[0].search_rows(stacked(notes_of("main"))[:1], NUM_EQUAL - 2)
    assert len({*rows[0].tolist()} & {*range(NUM_EQUAL)}) == NUM_EQUAL - 2
    np.testing.assert_allclose(scores, 1, atol=1e-5)


def test_a_base_of_equal_vectors(site: EngineSite) -> None:
    rows, scores = site.base("equal")[0].search_rows(QUERIES[:1], 5)
    assert len({*rows[0].tolist()} & {*range(7)}) == 5
    np.testing.assert_allclose(scores, QUERIES[0] @ notes_of("equal")["e0"], atol=1e-5)


def test_a_base_of_one_note(site: EngineSite) -> None:
    rows, scores = site.base("one")[0].search_rows(QUERIES[:2], 3)
    assert rows.tolist() == [[0, -1, -1]] * 2
    np.testing.assert_allclose(scores[:, 0], QUERIES[:2] @ notes_of("one")["only"], atol=1e-5)


def test_the_opposite_of_a_note_finds_it_last(site: EngineSite) -> None:
    rows, scores = site.base("main")[0].search_rows(-stacked(notes_of("main"))[50:51], NUM)
    assert rows[0, -1] == 50 and scores[0, -1] == pytest.approx(-1, abs=1e-5)


def test_queries_together_are_answered_as_alone(site: EngineSite) -> None:
    index, _ = site.base("main")
    rows, scores = index.search_rows(QUERIES, 20)
    for place, query in enumerate(QUERIES):
        alone, score = index.search_rows(query[None], 20)
        assert alone[0].tolist() == rows[place].tolist()
        np.testing.assert_allclose(score[0], scores[place], atol=1e-6)


def test_queries_of_another_precision_and_order_in_memory(site: EngineSite) -> None:
    index, _ = site.base("main")
    doubles = np.asfortranarray(QUERIES.astype(np.float64))
    assert index.search_rows(doubles, 5)[0].tolist() == index.search_rows(QUERIES, 5)[0].tolist()


def test_queries_of_another_width_are_refused(site: EngineSite) -> None:
    index, _ = site.base("main")
    for wrong in (unit_vectors(0, 2, 7), QUERIES[0]):
        with pytest.raises(ValueError, match="do not fit an index of width 8"):
            index.search_rows(wrong, 3)


def test_no_neighbours_are_refused(site: EngineSite) -> None:
    with pytest.raises(ValueError, match="k = 0 must be 1 or more"):
        site.base("main")[0].search_rows(QUERIES, 0)


def test_ids_are_any_text(site: EngineSite) -> None:
    index, _ = site.base("main")
    assert tuple(index.note_ids[:NUM_EQUAL]) == FIRST_IDS and len(index.note_ids) == NUM
    assert all(index.rows[note_id] == row for row, note_id in enumerate(index.note_ids)) and len(index.rows) == NUM


def test_a_base_knows_its_width_and_its_model(site: EngineSite) -> None:
    index, table = site.base("main")
    assert (index.dim, index.weights_id) == (8, "weights")
    np.testing.assert_array_equal(table.vectors, stacked(notes_of("main")))


def test_two_bases_are_searched_side_by_side(site: EngineSite) -> None:
    main, one = site.base("main")[0], site.base("one")[0]
    for _ in range(2):
        assert one.search_rows(QUERIES[:1], 1)[0].tolist() == [[0]]
        best = int((stacked(notes_of("main")) @ QUERIES[0]).argmax())
        assert main.search_rows(QUERIES[:1], 1)[0].tolist() == [[best]]


def test_threads_search_at_once(site: EngineSite) -> None:
    index, _ = site.base("main")
    expected = [index.search_rows(query[None], 15)[0].tolist() for query in QUERIES]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda n: index.search_rows(QUERIES[n % 6][None], 15)[0].tolist(), range(48))]
    assert found == expected * 8


# --- the live index: what a request asks -----------------------------------------------------------------------------


def test_similar_notes_are_the_nearest(site: EngineSite) -> None:
    live, notes = site.live()
    for query in QUERIES[:3]:
        require_nearest(live.similar(query, LONG), notes, query, LONG)


def test_more_similar_notes_than_there_are(site: EngineSite) -> None:
    live, notes = site.live()
    require_nearest(live.similar(QUERIES[0], 1000), notes, QUERIES[0], 1000)


def test_similar_notes_without_some(site: EngineSite) -> None:
    live, notes = site.live()
    first = [note_id for note_id, _ in nearest(notes, QUERIES[0])[:20]]
    require_nearest(live.similar(QUERIES[0], 5, frozenset([*first, "nobody"])), notes, QUERIES[0], 5, *first)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_query_that_is_no_direction_is_refused(site: EngineSite, value: float) -> None:
    live, _ = site.live()
    with pytest.raises(ValueError, match="not unit vectors"):
        live.similar(np.full(8, value, np.float32), 3)


def test_a_query_of_another_length_is_refused(site: EngineSite) -> None:
    live, _ = site.live()
    with pytest.raises(ValueError, match="has length 2"):
        live.similar(2 * QUERIES[0], 3)


def test_a_query_of_another_width_is_refused(site: EngineSite) -> None:
    live, _ = site.live()
    with pytest.raises(ValueError, match="do not fit an index of width 8"):
        live.similar(unit_vectors(0, 1, 9)[0], 3)


def test_the_vector_of_a_note(site: EngineSite) -> None:
    live, notes = site.live()
    np.testing.assert_array_equal(live.vector("猫 🐈"), notes["猫 🐈"])
    assert live.vector("nobody") is None


def test_neighbours_beyond_the_table(site: EngineSite) -> None:
    """The first of them are those of the table."""
    live, notes = site.live()
    require_nearest(live.similar_to("n60", LONG), notes, notes["n60"], LONG, "n60")
    assert ids(live.similar_to("n60", LONG))[:5] == ids(live.similar_to("n60", 5))


def test_neighbours_of_nobody(site: EngineSite) -> None:
    live, _ = site.live()
    with pytest.raises(KeyError, match="nobody"):
        live.similar_to("nobody", 3)


def test_a_deleted_note_is_not_found(site: EngineSite) -> None:
    live, notes = site.live()
    gone = nearest(notes, QUERIES[0])[0][0]
    live.apply({gone: None}, 1)
    require_nearest(live.similar(QUERIES[0], LONG), notes, QUERIES[0], LONG, gone)


def test_though_many_of_the_nearest_are_deleted_enough_are_found(site: EngineSite) -> None:
    live, notes = site.live()
    gone = [note_id for note_id, _ in nearest(notes, QUERIES[0])[:150]]
    live.apply(dict.fromkeys(gone), 1)
    require_nearest(live.similar(QUERIES[0], 20), notes, QUERIES[0], 20, *gone)


def test_where_three_notes_are_left_these_are_found(site: EngineSite) -> None:
    live, notes = site.live()
    left = ["n100", "n200", "ärger/ß"]
    live.apply(dict.fromkeys(notes.keys() - left), 1)
    require_nearest(live.similar(QUERIES[0], 20), {i: notes[i] for i in left}, QUERIES[0], 20)


def test_where_no_note_is_left_none_is_found(site: EngineSite) -> None:
    live, notes = site.live()
    live.apply(dict.fromkeys(notes), 1)
    assert live.similar(QUERIES[0], 5) == Answer((), 1)


def test_a_note_that_was_deleted_and_written_again(site: EngineSite) -> None:
    live, notes = site.live()
    live.apply({"n100": None}, 1)
    live.apply({"n100": QUERIES[0]}, 2)
    require_nearest(live.similar(QUERIES[0], 5), notes | {"n100": QUERIES[0]}, QUERIES[0], 5)


def test_a_changed_note_is_no_longer_found_where_it_was(site: EngineSite) -> None:
    live, notes = site.live()
    live.apply({"n100": QUERIES[0]}, 1)
    assert "n100" not in ids(live.similar(notes["n100"], 5))
    require_nearest(live.similar(notes["n100"], 5), notes | {"n100": QUERIES[0]}, notes["n100"], 5)


def test_new_notes_are_found_with_those_of_the_base(site: EngineSite) -> None:
    live, notes = site.live()
    new = {f"new{n}": vector for n, vector in enumerate(unit_vectors(9, 40))}
    live.apply(new, 7)
    answer = live.similar(QUERIES[1], LONG)
    require_nearest(answer, notes | new, QUERIES[1], LONG)
    assert answer.seq == 7 and {*ids(answer)} & new.keys() and {*ids(answer)} & notes.keys()


def test_the_neighbours_of_a_new_note_are_searched_in_the_base(site: EngineSite) -> None:
    live, notes = site.live()
    live.apply({"new": QUERIES[2]}, 1)
    require_nearest(live.similar_to("new", 10), notes, QUERIES[2], 10)


def test_a_new_note_that_equals_one_of_the_base(site: EngineSite) -> None:
    live, notes = site.live()
    live.apply({"a copy": notes["n77"]}, 1)
    assert ids(live.similar(notes["n77"], 2)) == ["a copy", "n77"]


@pytest.mark.parametrize("how", ["max", "sum", "rrf"])
def test_the_neighbours_of_a_history_are_merged(site: EngineSite, how: str) -> None:
    live, notes = site.live()
    live.apply({"new": QUERIES[3]}, 1)
    notes["new"] = QUERIES[3]
    history = {"n10": 1.0, "new": 2.0, "n40": 0.5, "n90": 1.0}
    answer = live.recall(history, LONG, how, {"n20"})  # type: ignore[arg-type]
    best, found_by = brute_force(notes, history, LONG, how, {"n20"})
    np.testing.assert_allclose([hit.score for hit in answer.hits], [score for _, score in best], atol=1e-5)
    assert all({*hit.because} == found_by[hit.note_id] for hit in answer.hits)


def test_the_history_itself_is_not_recommended(site: EngineSite) -> None:
    live, notes = site.live()
    history = [note_id for note_id, _ in nearest(notes, notes["n30"])[:10]]
    answer = live.recall(dict.fromkeys(history, 1.0), LONG)
    assert len(answer.hits) == LONG and not {*ids(answer)} & {*history}


def test_notes_of_a_history_that_are_not_there(site: EngineSite) -> None:
    live, _ = site.live()
    live.apply({"n40": None}, 1)
    answer = live.recall({"n10": 1.0, "nobody": 1.0, "n40": 1.0}, LONG)
    assert answer.unknown == ("nobody", "n40") and {hit.because for hit in answer.hits} == {("n10",)}


def test_after_the_deadline_only_the_table_answers(site: EngineSite) -> None:
    live, _ = site.live()
    live.apply({"new": QUERIES[0]}, 1)
    answer = live.recall({"n10": 1.0, "new": 5.0}, 5, deadline=time.monotonic())
    assert answer.is_partial and {hit.because for hit in answer.hits} == {("n10",)} and len(answer.hits) == 5
    later = live.recall({"n10": 1.0, "new": 5.0}, 5, deadline=time.monotonic() + 60)
    assert not later.is_partial and later.hits[0].because == ("new",)


def test_the_only_note_has_no_neighbour(site: EngineSite) -> None:
    live, notes = site.live("one")
    require_nearest(live.similar(QUERIES[0], 5), notes, QUERIES[0], 5)
    assert live.similar_to("only", 5).hits == ()
    live.apply({"second": QUERIES[0]}, 1)
    assert ids(live.similar_to("only", 5)) == ["second"] and ids(live.similar_to("second", 5)) == ["only"]


def test_equal_notes_are_in_the_order_of_their_ids(site: EngineSite) -> None:
    live, notes = site.live("equal")
    assert ids(live.similar(notes["e0"], 9)) == sorted(notes)


def test_searches_while_changes_are_applied(site: EngineSite) -> None:
    """A note moves between two places; each answer has it once, at one of them, and all other notes."""
    live, _ = site.live()
    places = [QUERIES[0], -QUERIES[0]]
    live.apply({"moving": places[0]}, 1)
    wrong: list[Answer] = []

    def read() -> None:
        for _ in range(15):
            answer = live.similar(QUERIES[0], NUM + 1)
            scores = [hit.score for hit in answer.hits if hit.note_id == "moving"]
            if len(answer.hits) != NUM + 1 or len(scores) != 1 or abs(abs(scores[0]) - 1) > 1e-5:
                wrong.append(answer)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    seq = 1
    while any(reader.is_alive() for reader in readers):
        seq += 1
        live.apply({"moving": places[seq % 2]}, seq)
    assert not wrong


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), num_steps=st.integers(1, 6))
def test_answers_are_those_of_comparing_all(site: EngineSite, seed: int, num_steps: int) -> None:
    live, notes = site.live()
    rng = np.random.default_rng([7, seed])
    names = [*(f"n{n}" for n in range(NUM_EQUAL, NUM)), "new a", "new b"]
    for note_id in FIRST_IDS:  # ties would let the answers differ
        notes.pop(note_id)
    live.apply(dict.fromkeys(FIRST_IDS), 1)
    for seq in range(2, num_steps + 2):
        changes = {
            str(name): unit_vectors(int(rng.integers(1 << 30)), 1)[0] if rng.random() < 0.5 else None
            for name in rng.choice(names, int(rng.integers(1, 80)), replace=False)
        }
        live.apply(changes, seq)
        notes = {i: v for i, v in notes.items() if i not in changes} | {
            i: v for i, v in changes.items() if v is not None
        }
        history = {str(name): float(rng.choice([0.5, 1, 2])) for name in rng.choice(names, 4)}
        k, how = int(rng.choice([1, 10, 40])), str(rng.choice(["max", "sum", "rrf"]))
        answer = live.recall(history, k, how, {"n33"})  # type: ignore[arg-type]
        best, found_by = brute_force(notes, history, k, how, {"n33"})
        np.testing.assert_allclose([hit.score for hit in answer.hits], [score for _, score in best], atol=1e-5)
        assert all({*hit.because} == found_by[hit.note_id] for hit in answer.hits)
        require_nearest(live.similar(QUERIES[0], k), notes, QUERIES[0], k)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_base_is_opened_again(site: EngineSite) -> None:
    index, table = site.engine.open(write_base(site.lake, "one", ["only"], stacked(notes_of("one"))))
    assert index.search_rows(QUERIES[:1], 1)[0].tolist() == [[0]]
    assert LiveIndex(index, table).similar(QUERIES[0], 1).hits[0].note_id == "only"


def test_a_folder_without_an_index_is_refused(site: EngineSite, tmp_path: Path) -> None:
    files = write_base(Lake(tmp_path), "one", ["only"], stacked(notes_of("one")))
    shutil.rmtree(files.index)
    with pytest.raises(ValueError, match="is no index"):
        site.engine.open(files)


def test_a_damaged_table_of_ids_is_refused(site: EngineSite, tmp_path: Path) -> None:
    files = write_base(Lake(tmp_path), "one", ["only"], stacked(notes_of("one")))
    (files.index / "ids.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="does not match its checksum"):
        site.engine.open(files)


def test_the_table_of_another_base_is_refused(site: EngineSite, tmp_path: Path) -> None:
    files = write_base(Lake(tmp_path), "one", ["only"], stacked(notes_of("one")))
    np.save(files.table / ROWS, np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match="is not the table of an index of 1 notes"):
        site.engine.open(files)


def test_an_index_that_answers_otherwise_than_it_should_is_refused(site: EngineSite, tmp_path: Path) -> None:
    """FAISS is asked its golden queries. Milvus is compared with the table, whose first rows are exchanged here."""
    notes = notes_of("main")
    files = write_base(Lake(tmp_path), "exchanged", [*notes][:40], stacked(notes)[:40][::-1])
    if site.kind == "faiss":
        golden = json.loads(files.golden.read_text())
        golden[0]["neighbours"] = golden[1]["neighbours"]
        files.golden.write_text(json.dumps(golden))
    else:
        scores = np.load(files.table / "scores.npy")
        np.save(files.table / "scores.npy", scores + 1)
    with pytest.raises(ValueError, match="other neighbours than when|finds only 0%"):
        site.engine.open(files)


def test_an_engine_hears_what_is_in_memory(site: EngineSite) -> None:
    """And still answers from all of it."""
    main, one = site.base("main")[0], site.base("one")[0]
    site.engine.serve([one, main])
    site.engine.serve([main, one])
    assert one.search_rows(QUERIES[:1], 1)[0].tolist() == [[0]] and main.search_rows(QUERIES[:1], 1)[0].size == 1


def test_an_engine_is_closed_and_opened(site: EngineSite, tmp_path: Path) -> None:
    """What it holds outlives the connection."""
    url = f"milvus://{tmp_path}/folder/other.db" if site.kind == "milvus-lite" else site.url
    for _ in range(2):
        engine = open_engine(url, site.lake)
        index, _ = engine.open(write_base(site.lake, "one", ["only"], stacked(notes_of("one"))))
        assert index.search_rows(QUERIES[:1], 2)[0].tolist() == [[0, -1]]
        engine.close()
