"""A base in Milvus: collections are filled whole, switched and dropped; the server fails, and comes back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from notellm2_core.config.milvus import MilvusUrl
from notellm2_core.lake.lake import Lake
from notellm2_core.serving import milvus as module
from notellm2_core.serving import milvus_index
from notellm2_core.serving.engine import BaseIndex, EngineDown, open_engine
from notellm2_core.serving.live_index import LiveIndex
from notellm2_core.serving.milvus import ALIAS, MilvusEngine
from notellm2_core.serving.milvus_index import MilvusIndex
from tests.support.bases import unit_vectors, write_base
from tests.support.engines import EngineSite, nearest, notes_of
from tests.support.milvus_server import MilvusServer

QUERIES = unit_vectors(4, 6)


@contextmanager
def reader(site: EngineSite) -> Iterator[MilvusClient]:
    """Somebody else who reads the collections."""
    url = MilvusUrl.parse(str(site.url))
    client = MilvusClient(url.address, user=url.user, password=url.password, dedicated=True)
    yield client
    client.close()


def collection(index: BaseIndex) -> str:
    assert isinstance(index, MilvusIndex)
    return index.collection


def names(client: MilvusClient, release_id: str) -> list[str]:
    return [name for name in client.list_collections() if name.startswith(f"notes_{release_id}_")]


def test_others_read_the_notes_of_the_release_that_answers(milvus: EngineSite) -> None:
    index, _ = milvus.base("main")
    milvus.engine.serve([index])
    with reader(milvus) as client:
        found = client.get(ALIAS, [1, 250], output_fields=["note_id", "vector"])
        notes = {note["note_id"]: note["vector"] for note in found}
    assert notes.keys() == {"猫 🐈", "n250"}
    np.testing.assert_allclose(notes["n250"], notes_of("main")["n250"])


def test_the_alias_follows_a_switch_and_the_way_back(milvus: EngineSite) -> None:
    main, one = milvus.base("main")[0], milvus.base("one")[0]
    with reader(milvus) as client:
        for first, second in ((main, one), (one, main), (main, one)):
            milvus.engine.serve([first, second])
            assert client.describe_alias(ALIAS)["collection_name"] == collection(first)


def test_a_base_that_is_there_is_not_sent_again(milvus: EngineSite, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collection(milvus.base("main")[0])
    monkeypatch.delattr(MilvusEngine, "_fill")
    notes = notes_of("main")
    index, _ = milvus.engine.open(write_base(milvus.lake, "main", [*notes], np.stack([*notes.values()])))
    assert collection(index) == expected


def test_other_notes_under_the_name_of_a_release_are_another_collection(milvus: EngineSite) -> None:
    index, _ = milvus.base("one")
    files = write_base(milvus.lake, "one", ["another"], QUERIES[:1], mark="0123456789abcdef")
    assert module._collection(files) != collection(index) and module._collection(files).startswith("notes_one_0123")


def test_a_half_filled_collection_is_filled_again(milvus: EngineSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is killed after the first batch; the half is never searched. Then somebody deletes notes of it."""
    files = write_base(milvus.lake, "halves", [f"h{n}" for n in range(60)], unit_vectors(5, 60))
    with reader(milvus) as client:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_BATCH_BYTES", 4 * 8 * 25)
            patch.setattr(MilvusClient, "flush", _killed)
            with pytest.raises(KeyboardInterrupt):
                milvus.engine.open(files)
        (draft,) = names(client, "halves")
        assert "_draft_" in draft
        index, _ = milvus.engine.open(files)
        assert names(client, "halves") == [collection(index)]
        assert index.search_rows(unit_vectors(5, 60)[[59]], 60)[0].min() == 0
        client.delete(collection(index), ids=[3, 4])
        again, _ = milvus.engine.open(files)
        (counted,) = client.query(collection(again), output_fields=["count(*)"], consistency_level="Strong")
        assert counted["count(*)"] == 60
        assert (np.sort(again.search_rows(QUERIES[:1], 60)[0]) == np.arange(60)).all()


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_vectors_with_nan_are_not_sent(milvus: EngineSite) -> None:
    """Milvus-lite would take them."""
    files = write_base(milvus.lake, "broken", ["a", "b"], unit_vectors(6, 2))
    vectors = np.load(files.table / "vectors.npy")
    vectors[1, 3] = np.nan
    np.save(files.table / "vectors.npy", vectors)
    with pytest.raises(ValueError, match="that of note 'b' holds NaN or infinity"):
        milvus.engine.open(files)


def test_a_collection_with_other_vectors_than_its_table_is_refused(milvus: EngineSite) -> None:
    notes = notes_of("one")
    files = write_base(milvus.lake, "one", [*notes], np.stack([*notes.values()]))
    milvus.engine.open(files)
    np.save(files.table / "vectors.npy", QUERIES[:1])
    with pytest.raises(ValueError, match="holds other vectors than its table"):
        milvus.engine.open(files)
    write_base(milvus.lake, "one", [*notes], np.stack([*notes.values()]))


def test_collections_that_nobody_needs_are_dropped(milvus: EngineSite) -> None:
    """Of a release that is in memory, the last two bases stay; of others, none. What is not ours stays."""
    with reader(milvus) as client:
        schema = client.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=8)
        for name in ("notes_gone_release_01234567", "notes_gone_release_01234567_draft_89abcdef", "notes_of_a_user"):
            client.create_collection(name, schema=schema)
        main, one = milvus.base("main")[0], milvus.base("one")[0]
        milvus.engine.serve([main, one])
        assert names(client, "gone") == [] and client.has_collection("notes_of_a_user")
        assert client.has_collection(collection(main)) and client.has_collection(collection(one))
        client.drop_collection("notes_of_a_user")


def test_a_graph_finds_nearly_all(milvus: EngineSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many notes on, Milvus builds one. It is measured, and searched as broadly as it needs."""
    vectors = unit_vectors(8, 3000)
    files = write_base(milvus.lake, "graph", [f"g{n}" for n in range(3000)], vectors)
    monkeypatch.setattr(milvus.engine, "_exact_notes", 1000)
    index, _ = milvus.engine.open(files)
    assert isinstance(index, MilvusIndex) and index.candidates in milvus_index._CANDIDATES
    queries = unit_vectors(9, 50)
    rows, scores = index.search_rows(queries, 100)
    exact = queries @ vectors.T
    kth = -np.partition(-exact, 99, axis=1)[:, 99:100]
    assert (scores >= kth - 1e-5).mean() >= 0.95
    np.testing.assert_allclose(np.take_along_axis(exact, rows, axis=1), scores, atol=1e-5)
    with reader(milvus) as client:
        (of_vector,) = client.list_indexes(index.collection, field_name="vector")
        assert client.describe_index(index.collection, of_vector)["index_type"] == "HNSW"


def test_a_graph_that_finds_too_little_is_refused(milvus: EngineSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_index, "_TARGET_RECALL", 1.01)
    with pytest.raises(ValueError, match="finds only 100% of the nearest notes"):
        milvus.engine.open(write_base(milvus.lake, "one", ["only"], np.stack([*notes_of("one").values()])))


def test_more_neighbours_than_milvus_gives(milvus: EngineSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are compared, in the process."""
    search = MilvusClient.search

    def limited(client: MilvusClient, *arguments: object, limit: int, **options: object) -> object:
        assert limit <= 20
        return search(client, *arguments, limit=limit, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(milvus_index, "_MOST", 20)
    monkeypatch.setattr(MilvusClient, "search", limited)
    live, notes = milvus.live()
    gone = [note_id for note_id, _ in nearest(notes, QUERIES[0])[:100]]
    live.apply(dict.fromkeys(gone), 1)
    hits = live.similar(QUERIES[0], 15).hits
    assert [hit.note_id for hit in hits] == [note_id for note_id, _ in nearest(notes, QUERIES[0], gone)[:15]]


@pytest.mark.slow
def test_a_password_is_asked_for_and_not_told(server: MilvusServer, tmp_path: Path) -> None:
    for login in ("root:very-secret", "nobody:very-secret"):
        with pytest.raises(EngineDown, match="cannot be used now") as refused:
            open_engine(f"milvus://{login}@127.0.0.1:{server.port}", Lake(tmp_path))
        assert "very-secret" not in str(refused.value) + repr(refused.value.__cause__)


@pytest.mark.slow
def test_a_password_of_the_environment(server: MilvusServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_PASSWORD", "Milvus")
    open_engine(f"milvus://root@127.0.0.1:{server.port}", Lake(tmp_path)).close()


@pytest.mark.slow
def test_a_database_of_the_server(sites: Callable[[str], EngineSite], tmp_path: Path) -> None:
    site = sites("milvus")
    with reader(site) as client:
        client.create_database("lake_2")
    lake = Lake(tmp_path)
    engine = open_engine(f"{site.url}/lake_2", lake)
    index, _ = engine.open(write_base(lake, "one", ["only"], QUERIES[:1]))
    engine.serve([index])
    assert index.search_rows(QUERIES[:1], 1)[1] == pytest.approx(1, abs=1e-5)
    with reader(site) as client:  # in the other database
        assert not client.has_collection(collection(index))
    engine.close()
    with pytest.raises(EngineDown, match="database not found"):
        open_engine(f"{site.url}/lake_3", lake).open(write_base(lake, "one", ["only"], QUERIES[:1]))


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(EngineDown, match=r"the Milvus 127\.0\.0\.1:1 cannot be used now"):
        open_engine("milvus://127.0.0.1:1", Lake(tmp_path))


def test_a_search_that_fails_holds_up_no_others(sites: Callable[[str], EngineSite]) -> None:
    """While the engine is down, what the table knows is answered. Of searches, one a second waits for the engine."""
    site = sites("milvus")
    engine = open_engine(site.url, site.lake)
    notes = notes_of("main")
    live = LiveIndex(*engine.open(write_base(site.lake, "main", [*notes], np.stack([*notes.values()]))))
    live.apply({"new": QUERIES[0]}, 1)
    engine.close()
    assert len(live.similar_to("n60", 5).hits) == 5
    answer = live.recall({"n60": 1.0, "new": 1.0}, 5)
    assert answer.is_partial and {hit.because for hit in answer.hits} == {("n60",)}
    with pytest.raises(EngineDown, match="did not answer a moment ago"):
        live.recall({"new": 1.0}, 5)
    time.sleep(milvus_index._PAUSE_SECONDS)
    with pytest.raises(EngineDown, match="cannot be used now"):
        live.similar(QUERIES[0], 5)


def test_an_alias_that_cannot_be_moved_is_a_warning(
    sites: Callable[[str], EngineSite], caplog: pytest.LogCaptureFixture
) -> None:
    site = sites("milvus")
    engine = open_engine(site.url, site.lake)
    engine.close()
    engine.serve([site.base("one")[0]])
    assert "the alias notes_current is not moved yet: the Milvus 127.0.0.1" in caplog.text
