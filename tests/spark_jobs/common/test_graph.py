import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark_jobs.common import graph as graph_module
from spark_jobs.common.graph import clusters, components, near_duplicates
from tests.spark_jobs.conftest import NOTES, Frame, rows_of

graph = st.lists(st.tuples(st.integers(10, 40), st.integers(10, 40)), max_size=25)


@settings(max_examples=1, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(graph, min_size=40, max_size=40))
def test_components_equal_union_find(frame: Frame, graphs: list[list[tuple[int, int]]]) -> None:
    """Forty graphs are solved at once; a prefix separates their nodes."""
    edges = [(f"{i}-{a}", f"{i}-{b}") for i, graph in enumerate(graphs) for a, b in graph]
    parent = {n: n for edge in edges for n in edge}

    def root(n: str) -> str:
        while parent[n] != n:
            n = parent[n]
        return n

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    table = frame("a string, b string", edges)
    for found in (components(table), graph_module._spread_components(table)):
        assert dict(rows_of(found, "node", "component")) == {n: root(n) for n in parent}


def test_a_long_chain_is_one_component(frame: Frame) -> None:
    """The chain has 24 notes, named at random, so that labels have to travel."""
    names = [f"{i:02d}" for i in range(24)]
    random.Random(0).shuffle(names)
    table = frame("a string, b string", list(itertools.pairwise(names)))
    for found in (components(table), graph_module._spread_components(table)):
        assert dict(rows_of(found, "node", "component")) == dict.fromkeys(names, "00")


def test_components_are_named_by_the_order_of_bytes(frame: Frame) -> None:
    """UTF-8: Z, z, é and then 😀, as Spark's own comparison has it. Without edges there are none."""
    chain = [("😀", "é"), ("é", "z"), ("z", "Z"), ("lonely", "lonely")]
    table = frame("a string, b string", chain)
    for found in (components(table), graph_module._spread_components(table)):
        assert dict(rows_of(found, "node", "component")) == {**dict.fromkeys("😀ézZ", "Z"), "lonely": "lonely"}
    assert rows_of(components(table.limit(0)), "node", "component") == []


def test_many_edges_stay_in_spark(frame: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a number of edges, the driver holds them; beyond it, it never does."""
    monkeypatch.setattr(graph_module, "_FEW_EDGES", 2)
    collected: list[int] = []
    local = graph_module._local_components
    monkeypatch.setattr(
        graph_module, "_local_components", lambda ends: (collected.append(ends.num_rows), local(ends))[1]
    )
    for num in (2, 3):
        edges = [(f"{n}", f"{n + 1}") for n in range(num)]
        labels = components(frame("a string, b string", edges))
        assert dict(rows_of(labels, "node", "component")) == {f"{n}": "0" for n in range(num + 1)}
    assert collected == [2]


def test_near_duplicates_share_text_or_image_also_in_a_chain(frame: Frame) -> None:
    """a and b share their text, b and c a path, c and d the bytes: one group where no images were read. f and g have
    no text, and empty texts are not equal; h and i differ in their topics.

    Where images were read, only their hashes count. d and e share the hash of the bytes, f and g the perceptual hash.
    c's path may be that of a placeholder.
    """
    rows = [
        ("e", "lonely", [], "", None, None),
        ("d", "four", [], "", None, b"1"),
        ("c", "three", [], "", "p.png", b"1"),
        ("b", "Two\n words", [], "", "p.png", None),
        ("a", "two", [], "  WORDS", None, None),
        ("f", "", [], "", "f.png", None),
        ("g", " ", [], "", "g.png", None),
        ("h", "x", ["t"], "", None, None),
        ("i", "x", ["u"], "", None, None),
    ]
    image_rows = [("d", "sha", None), ("e", "sha", None), ("f", "one", "like"), ("g", "two", "like"), ("h", None, None)]
    images = frame("note_id string, image_id string, perceptual_hash string", image_rows)
    unread = rows_of(near_duplicates(frame(NOTES, rows), None), "note_id", "group_id")
    assert dict(unread) == {**dict.fromkeys("abcd", "a"), **{n: n for n in "efghi"}}
    read = rows_of(near_duplicates(frame(NOTES, rows), images), "note_id", "group_id")
    assert dict(read) == {"a": "a", "b": "a", "d": "d", "e": "d", "f": "f", "g": "f", **{n: n for n in "chi"}}


def test_clusters_follow_the_strongest_neighbour(frame: Frame) -> None:
    """b is a's strongest neighbour (two edges), c's is d (the higher score): the weak edge b - c is cut."""
    edges = [("a", "b", 1.0), ("b", "a", 1.0), ("b", "c", 5.0), ("c", "d", 9.0)]
    labels = clusters(frame("a string, b string, score double", edges))
    assert dict(rows_of(labels, "node", "cluster")) == {"a": "a", "b": "a", "c": "c", "d": "c"}
