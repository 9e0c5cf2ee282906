"""Hard negatives: computed by hand, equal to a loop over all notes, and read back for training."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from notellm2_core import schema
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.retrieval import hard_negatives
from notellm2_core.retrieval.hard_negatives import main, mine, read_hard_negatives

Pair = tuple[str, str]


def write_world(
    root: Path, vectors: Mapping[str, Any], train: Sequence[Pair], validation: Sequence[Pair] = (),
    groups: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write root/embeddings, root/pairs and, with `groups`, root/split."""
    write_shard(root / "embeddings" / "part-00000.parquet", list(vectors), np.stack(list(vectors.values())), {})
    for name, pairs in (("train", train), ("validation", validation)):
        (root / "pairs" / name).mkdir(parents=True)
        rows = [{"query_id": q, "target_id": t, "score": 1.0, "num_users": 1, "rank": 1} for q, t in pairs]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.RELATED_PAIRS), root / "pairs" / name / "0.parquet")
    if groups is not None:
        (root / "split").mkdir()
        splits = [{"note_id": n, "side": "train", "group_id": g, "in_train_days": True} for n, g in groups.items()]
        pq.write_table(pa.Table.from_pylist(splits, schema=schema.NOTE_SPLIT), root / "split" / "0.parquet")


def rows_of(out: Path) -> list[tuple[str, str, int]]:
    table = pq.read_table(out / "part-00000.parquet")
    assert table.schema.equals(schema.HARD_NEGATIVES)
    return [(row["note_id"], row["negative_id"], row["rank"]) for row in table.to_pylist()]


DEGREES = {"e": 70, "a": 0, "b": 10, "pool": 5, "c": 25, "v": 26, "d": 45, "f": 100}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    vectors = {n: (np.cos(np.radians(x)), np.sin(np.radians(x))) for n, x in DEGREES.items()}
    train, validation = [("a", "b"), ("c", "d"), ("e", "f")], [("d", "e"), ("v", "e")]
    write_world(tmp_path, vectors, train, validation, {n: {"c": "a"}.get(n, n) for n in DEGREES})
    return tmp_path


def test_by_hand(world: Path) -> None:
    """The notes are at 0 (a), 10 (b), 25 (c), 45 (d), 70 (e) and 100 (f) degrees. v of a validation pair and the pool's
    note are no candidates. The notes at ranks 2 to 4: a: c d e, b: c d e, c: d a e, d: e b a, e: f c b, f: d c b.

    The known positives are a b, c d, d e (of validation) and e f, in both directions. In the window are d of c, e of d,
    f of e. a and c are near-duplicates, so c is related to b as a is, and a to d as c is. This excludes c and d of a, c
    of b, a of c, a of d.
    """
    counts = mine(world / "embeddings", world / "pairs", world / "out", world / "split", 2, 4, "Flat")
    assert rows_of(world / "out") == [
        ("a", "e", 4),
        ("b", "d", 3), ("b", "e", 4),
        ("c", "e", 4),
        ("d", "b", 3),
        ("e", "c", 3), ("e", "b", 4),
        ("f", "d", 2), ("f", "c", 3), ("f", "b", 4),
    ]  # fmt: skip
    cosine_2, cosine_4 = (np.cos(np.radians(x)).mean() for x in ([25, 15, 20, 25, 30, 55], [70, 60, 45, 45, 60, 90]))
    assert counts == {
        "notes": 6,
        "negatives": 10,
        "negatives_per_note": pytest.approx(10 / 6),
        "notes_without_negatives": 0,
        "excluded_known_positives": 3,
        "excluded_near_duplicates": 5,
        "first_rank": 2,
        "last_rank": 4,
        "mean_cosine_at_first_rank": pytest.approx(cosine_2, abs=1e-6),
        "mean_cosine_at_last_rank": pytest.approx(cosine_4, abs=1e-6),
        "index_recall": 100,
    }
    assert json.loads((world / "out" / "counts.json").read_text()) == counts
    assert sorted(p.name for p in (world / "out").iterdir()) == ["counts.json", "part-00000.parquet"]


def test_without_a_note_split_only_pairs_are_excluded(world: Path) -> None:
    """a's neighbours from rank 2 are negatives: only b, at rank 1, is related. The last rank is 5: a has 5 others."""
    counts = mine(world / "embeddings", world / "pairs", world / "out", None, 2, 1000, "Flat")
    assert [row for row in rows_of(world / "out") if row[0] == "a"] == [("a", n, i + 2) for i, n in enumerate("cdef")]
    assert (counts["last_rank"], counts["excluded_near_duplicates"]) == (5, 0)


def test_equal_cosines_rank_by_note_id(tmp_path: Path) -> None:
    """a is nearest to itself, then e (not in the window), then the three at 90 degrees to it, in any order."""
    across = dict.fromkeys("dbc", (0.0, 1.0))
    write_world(tmp_path, across | {"a": (1.0, 0.0), "e": (0.6, 0.8)}, [("a", "e"), ("b", "c"), ("d", "e")])
    mine(tmp_path / "embeddings", tmp_path / "pairs", tmp_path / "out", None, 2, 3, "Flat")
    assert rows_of(tmp_path / "out")[:2] == [("a", "b", 2), ("a", "c", 3)]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, Any], list[Pair], list[Pair], dict[str, str], int, int]:
    """The vectors have few directions, so that cosines tie. Pairs share notes, and some notes are in no pair."""
    names = draw(st.permutations([f"n{i}" for i in range(draw(st.integers(4, 14)))]))
    directions = [np.array([x, y]) / np.hypot(x, y) for x in range(-2, 3) for y in range(-2, 3) if x or y]
    vectors = {n: draw(st.sampled_from(directions)) for n in names}
    pair = st.tuples(st.sampled_from(names), st.sampled_from(names)).filter(lambda p: p[0] != p[1])
    train, validation = draw(st.lists(pair, min_size=1, max_size=12)), draw(st.lists(pair, max_size=4))
    groups = {n: f"g{draw(st.integers(0, len(names)))}" for n in names}
    first = draw(st.integers(1, len({n for p in train for n in p}) - 1))
    return vectors, train, validation, groups, first, first + draw(st.integers(0, 14))


@settings(max_examples=60)
@given(worlds(), st.booleans(), st.sampled_from([1, 3, 4096]))
def test_equals_a_loop_over_all_notes(
    world: tuple[dict[str, Any], list[Pair], list[Pair], dict[str, str], int, int], grouped: bool, block: int
) -> None:
    vectors, train, validation, groups, first, last = world
    group = groups if grouped else {n: n for n in vectors}
    related = {pair for a, b in train + validation for pair in ((group[a], group[b]), (group[b], group[a]))}
    unit = {n: np.float32(v).astype(float) for n, v in vectors.items()}
    candidates = sorted({n for pair in train for n in pair})
    window_end = min(last, len(candidates) - 1)
    num_searched = min(2 * (window_end + 1), len(candidates))
    expected = []
    for query in candidates:
        cosine = {n: np.float32(unit[query][0] * unit[n][0] + unit[query][1] * unit[n][1]) for n in candidates}
        others = sorted((n for n in candidates if n != query), key=lambda n: (-cosine[n], n))
        at_end = cosine[others[window_end - 1]] - 1e-6
        assume(sum(c >= at_end for c in cosine.values()) <= num_searched)  # else the index chooses among equals
        for rank, other in enumerate(others, start=1):
            same = group[query] == group[other] or (group[query], group[other]) in related
            if first <= rank <= last and not same:
                expected.append((query, other, rank))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(hard_negatives, "BLOCK_QUERIES", block):
        root = Path(folder)
        write_world(root, vectors, train, validation, groups)
        counts = mine(root / "embeddings", root / "pairs", root / "out", root / "split" if grouped else None, first,
                      last, "Flat")  # fmt: skip
        assert rows_of(root / "out") == expected
        window = len(candidates) * (min(last, len(candidates) - 1) - first + 1)
        excluded = counts["excluded_known_positives"] + counts["excluded_near_duplicates"]
        assert (counts["negatives"], excluded) == (len(expected), window - len(expected))
        note_ids = sorted(vectors, reverse=True)
        if expected:
            rows = read_hard_negatives(root / "out", note_ids)
            actual = [[note_ids[i] for i in row] for row in rows]
            assert actual == [[other for query, other, _ in expected if query == n] for n in note_ids]


@pytest.mark.parametrize("factory", ["HNSW32", "IVF8,Flat", "PCA8,SQ8"])
def test_every_run_writes_the_same_bytes(tmp_path: Path, factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1500, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"n{i}" for i in rng.permutation(1500)]
    write_world(tmp_path, dict(zip(names, vectors, strict=True)), list(pairwise(names)))
    outs = [tmp_path / "one", tmp_path / "two"]
    counts = [mine(tmp_path / "embeddings", tmp_path / "pairs", out, None, 5, 20, factory) for out in outs]
    assert counts[0] == counts[1]
    assert counts[0]["notes"] == 1500
    assert counts[0]["index_recall"] > {"HNSW32": 98, "IVF8,Flat": 20, "PCA8,SQ8": 20}[factory]
    files = [(out / "part-00000.parquet").read_bytes() for out in outs]
    assert files[0] == files[1]


def test_a_failed_run_leaves_the_previous_result(world: Path) -> None:
    arguments = (world / "embeddings", world / "pairs", world / "out", None)
    mine(*arguments, 2, 4, "Flat")
    before = (world / "out" / "part-00000.parquet").read_bytes()
    with mock.patch.object(hard_negatives, "nearest_first", side_effect=OSError("gone")), pytest.raises(OSError):
        mine(*arguments, 1, 2, "Flat")
    assert (world / "out" / "part-00000.parquet").read_bytes() == before
    assert sorted(p.name for p in (world / "out").iterdir()) == ["counts.json", "part-00000.parquet"]


def test_errors(world: Path) -> None:
    embeddings, pairs, out = world / "embeddings", world / "pairs", world / "out"
    for first, last in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match=rf"the ranks {first} to {last} are no window"):
            mine(embeddings, pairs, out, None, first, last, "Flat")
    with pytest.raises(ValueError, match=r"first_rank = 6, but a note has 5 others in .*train"):
        mine(embeddings, pairs, out, None, 6, 100, "Flat")
    with pytest.raises(ValueError, match=r"index.factory = 'IVF4096,Flat' cannot be built from 6 distinct vectors"):
        mine(embeddings, pairs, out, None, 1, 3, "IVF4096,Flat")
    write_shard(embeddings / "part-00000.parquet", ["a", "b"], np.eye(2), {})
    with pytest.raises(ValueError, match=r"4 of 6 notes have no embedding \(the first is 'c'\)"):
        mine(embeddings, pairs, out, None, 1, 3, "Flat")
    assert not out.exists()


def test_reading_refuses_the_negatives_of_other_notes(world: Path) -> None:
    with pytest.raises(ValueError, match=r"out holds no hard negatives"):
        read_hard_negatives(world / "out", ["a"])
    mine(world / "embeddings", world / "pairs", world / "out", None, 2, 4, "Flat")
    rows = read_hard_negatives(world / "out", ["v", *"fedcba"])
    assert [row.tolist() for row in rows[:2]] == [[], [3, 4, 5]]  # v is held out; f: d, c, b
    assert {row.dtype for row in rows} == {np.dtype(np.int64)}
    with pytest.raises(ValueError, match=r"names 2 notes that the training pairs lack \(the first is 'b'\)"):
        read_hard_negatives(world / "out", list("acdf"))
    pq.write_table(schema.HARD_NEGATIVES.empty_table(), world / "out" / "part-00000.parquet")
    with pytest.raises(ValueError, match=r"out holds no hard negatives"):
        read_hard_negatives(world / "out", ["a"])


def test_the_command_needs_no_torch_and_warns_once(world: Path) -> None:
    arguments = ["--embeddings", world / "embeddings", "--pairs", world / "pairs", "--out", world / "out",
                 "--first-rank", "2"]  # fmt: skip
    code = ("import sys; from notellm2_core.retrieval.hard_negatives import main, read_hard_negatives as read; "
            "assert 'faiss' not in sys.modules; main(sys.argv[1:]); assert 'torch' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("near-duplicates are unknown without --note-split") == 1
    assert rows_of(world / "out")[0] == ("a", "c", 2)


def test_the_command_ends_with_one_sentence(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--embeddings", world / "embeddings", "--pairs", world / "none", "--note-split", world / "split"]
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--out", str(world / "out")])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {world / 'none' / 'train'} holds no training pairs.\n"
