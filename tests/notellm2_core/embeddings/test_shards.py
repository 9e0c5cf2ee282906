"""Embedding shards are written whole, resumed after a kill, and checked when they are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core import schema
from notellm2_core.embeddings.shards import EmbeddingKey, plan_shards, write_shard, write_shards
from notellm2_core.embeddings.table import mean_cosine, read_embeddings, read_note_ids, truncate_dims


def unit(n: int, d: int = 4, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_a_shard_reads_back_bit_by_bit(tmp_path: Path) -> None:
    vectors = unit(3)
    write_shard(tmp_path / "part-00000.parquet", ["b", "a", "c"], vectors, {"fingerprint": "x"})
    assert pq.read_schema(tmp_path / "part-00000.parquet").equals(schema.embeddings(4))
    back = read_embeddings(tmp_path)
    assert back.note_ids == ("b", "a", "c")
    np.testing.assert_array_equal(back.vectors, vectors)
    np.testing.assert_array_equal(read_embeddings(tmp_path, {"c", "b"}).vectors, vectors[[0, 2]])
    np.testing.assert_array_equal(back.rows(["c", "b"]), [2, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_only_new_contents_are_embedded(tmp_path: Path) -> None:
    """5 notes in shards of 2: exported again, with a changed note, more notes, another model, and one rank of two."""
    calls: list[list[str]] = []
    texts = {n: n.upper() for n in "edcba"}

    def vector(text: str) -> np.ndarray:
        return unit(1, seed=sum(map(ord, text)))[0]

    def embed(ids: Sequence[str]) -> np.ndarray:
        calls.append(list(ids))
        return np.stack([vector(texts[i]) for i in ids])

    def run(out: str = "out", model: str = "m", **options: Any) -> int:
        calls.clear()
        key = EmbeddingKey(model, lambda ids: [texts[i] for i in ids])
        num_reused = write_shards(plan_shards(tmp_path / out, list(texts), key, 2), embed, **options)
        if not options.get("num_ranks"):
            table = read_embeddings(tmp_path / out)
            assert table.note_ids == tuple(sorted(texts))
            np.testing.assert_array_equal(table.vectors, [vector(texts[i]) for i in table.note_ids])
        return num_reused

    assert run() == 0 and calls == [["a", "b"], ["c", "d"], ["e"]]
    (tmp_path / "out" / "part-00009.parquet").write_bytes(b"of an older, larger export")
    assert run() == 5 and calls == []
    texts["d"] = "D, but longer"
    assert run() == 4 and calls == [["d"]]
    texts["aa"] = "one more, and every shard has other notes"
    assert run() == 5 and calls == [["aa"]]
    texts["f"] = "A"  # a's text; a's shard is not written again
    assert run() == 6 and calls == [["f"]]
    assert run(model="n") == 0 and len(calls) == 4
    assert run("elsewhere", model="n", reuse=[tmp_path / "out"]) == 7 and calls == []
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"damaged")
    assert run("third", model="n", reuse=[tmp_path / "out", tmp_path / "nowhere"]) == 6 and calls == [["aa"]]
    assert run("ranks", rank=1, num_ranks=2) == 0 and calls == [["b", "c"], ["f"]]


def test_a_killed_export_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Notes a and c have the same text. If a's shard exists, after a kill or by another rank, c is still embedded with
    d, because d alone would have other last bits.
    """
    key = EmbeddingKey("m", lambda ids: ["same" if i in "ac" else i for i in ids])

    def embed(ids: Sequence[str]) -> np.ndarray:
        return unit(len(ids), seed=len(ids))

    whole, killed = (plan_shards(tmp_path / name, list("abcd"), key, 2) for name in ("whole", "killed"))
    write_shards(whole, embed)
    write_shards(killed, embed, rank=0, num_ranks=2)
    write_shards(killed, embed)
    for shard in ("part-00000.parquet", "part-00001.parquet"):
        assert (tmp_path / "killed" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()


def test_reused_vectors_depend_on_no_kill_and_no_rank(tmp_path: Path) -> None:
    """A new first note moves the others to other shards: their vectors are reused in any order of writing."""
    key = EmbeddingKey("m", list)

    def embed(ids: Sequence[str]) -> np.ndarray:
        embedded.extend(ids)
        return unit(len(ids), seed=len(ids))

    def export_of(ids: str, *ranks: tuple[int, int]) -> list[str]:
        embedded.clear()
        for rank, num_ranks in ranks:
            write_shards(plan_shards(tmp_path, list(ids), key, 2), embed, rank=rank, num_ranks=num_ranks)
        return list(embedded)

    embedded: list[str] = []
    assert export_of("bcde", (0, 1)) == list("bcde")
    assert export_of("abcde", (0, 2), (1, 2)) == ["a"]  # the second rank starts after the first
    assert export_of("0abcde", (0, 3)) == ["0"]  # rank 0 of 3 alone, as after a kill
    assert (tmp_path / ".former").exists()
    assert export_of("0abcde", (0, 1)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"part-0000{n}.parquet" for n in range(3)]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 2 embeddings are not unit vectors .that of note 'b' holds NaN"):
        write_shard(tmp_path / "x.parquet", ["a", "b"], np.array([[1, 0], [np.nan, 0]]), {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="holds no embeddings"):
        read_embeddings(tmp_path)
    with pytest.raises(ValueError, match="no notes to embed"):
        plan_shards(tmp_path, [], EmbeddingKey("", list), 2)
    write_shard(tmp_path / "a.parquet", ["a"], unit(1), {})
    with pytest.raises(ValueError, match=r"^/.*: 2 of 3 notes have no embedding \(the first is 'x'\)"):
        read_embeddings(tmp_path).rows(["x", "a", "y"])
    write_shard(tmp_path / "b.parquet", ["a"], unit(1), {})
    with pytest.raises(ValueError, match="1 notes occur twice"):
        read_embeddings(tmp_path)
    write_shard(tmp_path / "b.parquet", ["b"], unit(1, 5), {})
    with pytest.raises(ValueError, match="width 5"):
        read_embeddings(tmp_path)
    pq.write_table(pa.table({"note_id": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="not an embedding table"):
        read_embeddings(tmp_path)
    pq.write_table(pa.table({"x": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no column note_id"):
        read_note_ids(tmp_path / "c.parquet")


def test_mean_cosine_of_opposite_halves() -> None:
    """Half e, half -e: two different rows agree with probability 49/99, so the mean is 49/99 - 50/99 = -1/99."""
    vectors = np.repeat(np.array([[1.0, 0], [-1, 0]], dtype=np.float32), 50, axis=0)
    assert mean_cosine(vectors, 200_000) == pytest.approx(-1 / 99, abs=0.01)
    assert mean_cosine(np.ones((7, 1), dtype=np.float32)) == 1
    with pytest.raises(ValueError, match="two embeddings"):
        mean_cosine(vectors[:1])


def test_truncated_vectors_have_unit_length_again() -> None:
    """The first two numbers of (0.6, 0.48, 0.64) have the direction of (5, 4)."""
    vectors = np.array([[0.6, 0.48, 0.64]], dtype=np.float32)
    np.testing.assert_allclose(truncate_dims(vectors, 2), np.array([[5, 4]]) / np.sqrt(41), rtol=1e-6)
    assert truncate_dims(vectors, None) is vectors
    with pytest.raises(ValueError, match="dim = 4 must be between 1 and the model's 3"):
        truncate_dims(vectors, 4)
