"""The evaluation on a small lake that was written by hand."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from notellm2_core import schema
from notellm2_core.baselines.hybrid import summed_rows
from notellm2_core.config.baselines import BASELINES, encoders
from notellm2_core.config.data import TextSettings
from notellm2_core.config.settings import Config, EvaluationSettings
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.evaluation.evaluate import (
    SCORES,
    evaluate,
    evaluate_embeddings,
    image_reader,
    neighbour_sheet,
)
from notellm2_core.evaluation.pairs import read_pairs

NUM_TOPICS, PER_TOPIC = 5, 6
NUM_NOTES = NUM_TOPICS * PER_TOPIC


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pool notes in 5 topics of 6; every note is paired with the next of its topic, so a topic model gets R@5 = 100.

    The title names the topic; notes 0, 6, 12, ... have no other words. Embeddings: one-hot by topic. The
    oracle's text key is the topic, its image key is null. One more note is outside the pool.
    """
    root = tmp_path_factory.mktemp("lake")
    ids = [f"n{i:02d}" for i in range(NUM_NOTES)]
    topics = [i // PER_TOPIC for i in range(NUM_NOTES)]
    for name in ("notes", "pairs/test", "pairs/pool", "source", "embeddings"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(root / "source" / "a.jpg")
    inside = (root / "source" / "a.jpg").read_bytes()
    notes = [
        {
            "note_id": i, "title": f"topic{t}", "topics": [],
            "content": "some more words here" if n % PER_TOPIC else "",
            "image_path": "a.jpg" if n == 0 else None, "image": inside if n == 1 else None,
        }
        for n, (i, t) in enumerate(zip([*ids, "x"], [*topics, 0], strict=True))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(notes, schema=schema.NOTES), root / "notes" / "part-0.parquet")
    pairs = [
        {
            "query_id": ids[n],
            "target_id": ids[t * PER_TOPIC + (n + 1) % PER_TOPIC],
            "score": 1.0,
            "num_users": 1,
            "rank": 1,
        }
        for n, t in enumerate(topics)
    ]
    pq.write_table(
        pa.Table.from_pylist(pairs[::-1], schema=schema.RELATED_PAIRS), root / "pairs" / "test" / "0.parquet"
    )
    in_train_days = [n % 10 > 0 for n in range(len(ids))]  # every tenth is cold
    pq.write_table(pa.table({"note_id": ids, "in_train_days": in_train_days}), root / "pairs" / "pool" / "0.parquet")
    write_shard(root / "embeddings" / "part-00000.parquet", [*ids, "x"], np.eye(6)[[*topics, 5]], {})
    pq.write_table(pa.table({"note_id": ["n00"], "num_users": [9]}), root / "clicks.parquet")
    oracle = {"note_id": ids, "text_key": [f"t{t}" for t in topics], "image_key": pa.nulls(NUM_NOTES, pa.string())}
    pq.write_table(pa.table(oracle), root / "oracle.parquet")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "tokenizer.json"))
    return root


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(
        name="t",
        text=TextSettings(short_tokens=2, long_tokens=4),
        model={"llm": {"name": "tiny"}},  # type: ignore[arg-type]
        evaluation=EvaluationSettings(ks=(1, 5), baselines=("random", "popularity", "bm25")),
    )


def test_report(lake: Path, config: Config) -> None:
    """With one-hots by topic 5 notes tie: R@1 = 20 %, R@5 = 100 %, for the text oracle too. The image is at chance.

    Popularity: only n00 has clicks. For the pair (n05 -> n00) it is first. For the query n00 all 29 candidates tie. The
    other 28 targets rank behind n00. So R@1 = (1 + 1/29) / 30.
    """
    report = evaluate(
        {("notellm2", "multimodal"): lake / "embeddings"},
        lake / "notes",
        lake / "pairs",
        config,
        tokenizer=lake,
        clicks=lake / "clicks.parquet",
        oracle=lake / "oracle.parquet",
    )
    assert report.recall("notellm2", k=1) == pytest.approx(20)
    assert report.recall("notellm2", k=5) == 100
    assert report.recall("oracle", "text", k=5) == 100
    assert report.recall("oracle", "image", k=5) == pytest.approx(100 * 5 / 29)
    assert report.recall("oracle", "multimodal", k=5) == 100
    assert report.recall("popularity", "", k=1) == pytest.approx(100 * (1 + 1 / 29) / 30)
    assert report.recall("bm25", "text", k=5) == pytest.approx(100)
    assert report.recall("random", "", k=1) < 20
    assert report.num_pairs == {
        "all": 30, "short_query": 5, "short_target": 5, "long_query": 25, "long_target": 25,
        "cold_query": 3, "cold_target": 3,
    }  # fmt: skip
    assert report.context["chance"] == {"1": pytest.approx(100 / 29), "5": pytest.approx(500 / 29)}
    assert -0.1 < report.context["mean_cosine"]["notellm2 multimodal"] < 0.4
    methods = list(dict.fromkeys(r.method for r in report.rows))
    assert methods == ["random", "popularity", "bm25", "notellm2", "oracle"]


def test_shorter_embeddings_are_rows_of_their_own(lake: Path, config: Config, tmp_path: Path) -> None:
    """The vectors are (1, topic one-hot) / sqrt 2: a whole vector gives the topic, the first number is always equal."""
    ids = read_embeddings(lake / "embeddings").note_ids
    topics = read_embeddings(lake / "embeddings").vectors
    vectors = np.concatenate([np.ones((len(ids), 1)), topics], axis=1) / np.sqrt(2)
    write_shard(tmp_path / "e" / "part-00000.parquet", ids, vectors, {})
    short = config.model_copy(update={"model": config.model.model_copy(update={"matryoshka_dims": (1,)})})
    embeddings = {("notellm2", "multimodal"): tmp_path / "e"}
    report = evaluate(embeddings, lake / "notes", lake / "pairs", short, lake, lake / "clicks.parquet")
    assert report.recall("notellm2", k=5) == 100
    assert report.recall("notellm2, 1 of 7 numbers", k=5) == pytest.approx(500 / 29)


def test_popularity_needs_clicks(lake: Path, config: Config) -> None:
    with pytest.raises(ValueError, match=r"evaluation.baselines names popularity"):
        evaluate({}, lake / "notes", lake / "pairs", config, tokenizer=lake)


@pytest.mark.parametrize(("pairs", "pool_notes"), [("pairs", 30), ("pairs/test", 31)])
def test_one_folder_on_its_own(lake: Path, pairs: str, pool_notes: int) -> None:
    """The candidates are the pool next to the pairs, else all 31 notes; the extra note is never nearer."""
    report = evaluate_embeddings(lake / "embeddings", lake / pairs, [1, 5])
    assert (report["num_pairs"], report["pool_notes"]) == (30, pool_notes)
    assert report["recall"] == {"1": pytest.approx(20), "5": 100}
    assert report["recall_pessimistic"] == {"1": 0, "5": 100}
    assert report["recall_optimistic"] == {"1": 100, "5": 100}
    # One target per query, at each of the ranks 1 to 5 alike.
    assert report["per_pair"] == report["per_query"]
    assert report["per_query"]["mrr"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    assert report["per_query"]["ndcg@1"] == pytest.approx(20)


def test_ids_may_be_whole_numbers(tmp_path: Path) -> None:
    """In the pairs, the pool and the embeddings, of different types. Angles: 1 and 2 are next to each other, 3 is far.

    1 -> 2 has rank 1, 1 -> 3 rank 2, 2 -> 3 rank 2. Per query, MRR is (1 + 1/2) / 2, per pair (1 + 1/2 + 1/2) / 3.
    """
    angles = np.deg2rad([0, 10, 180, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(vectors.ravel(), 2)
    (tmp_path / "pairs" / "pool").mkdir(parents=True)
    pq.write_table(pa.table({"note_id": [1, 2, 3, 4], "embedding": embedding}), tmp_path / "embeddings.parquet")
    pq.write_table(pa.table({"note_id": pa.array([1, 2, 3], pa.uint8())}), tmp_path / "pairs" / "pool" / "0.parquet")
    (tmp_path / "pairs" / "test").mkdir()
    pairs = pa.table({"query_id": pa.array([1, 1, 2], pa.int32()), "target_id": ["2", "3", "3"]})
    pq.write_table(pairs, tmp_path / "pairs" / "test" / "0.parquet")
    report = evaluate_embeddings(tmp_path / "embeddings.parquet", tmp_path / "pairs", [1])
    assert (report["num_pairs"], report["num_queries"], report["pool_notes"]) == (3, 2, 3)
    assert report["recall"] == {"1": pytest.approx(100 / 3)}
    assert (report["per_query"]["mrr"], report["per_pair"]["mrr"]) == (pytest.approx(75), pytest.approx(200 / 3))


def test_queries_that_are_no_notes(lake: Path, tmp_path: Path) -> None:
    """As in BEIR: the query "n00" is not the note n00. It has the vector of topic 1, whose six notes tie; n06 is one.

    With the query's own vectors MRR is the mean of 1 / 1 .. 1 / 6. Among the notes, n00 is of topic 0: the five others
    of it are higher, n06 has the ranks 6 to 30 alike, and the note x of no topic ties too.
    """
    write_shard(tmp_path / "queries.parquet", ["n00"], np.eye(6)[[1]], {})
    (tmp_path / "qrels").write_text("n00 0 n06 1\n")
    report = evaluate_embeddings(lake / "embeddings", tmp_path / "qrels", [1], tmp_path / "queries.parquet")
    assert report["per_query"]["mrr"] == pytest.approx(100 * sum(1 / rank for rank in range(1, 7)) / 6)
    among_notes = evaluate_embeddings(lake / "embeddings", tmp_path / "qrels", [1])
    assert among_notes["per_query"]["mrr"] == pytest.approx(100 * sum(1 / rank for rank in range(6, 31)) / 25)
    (tmp_path / "qrels").write_text("n00 0 n00 1\n")
    itself = evaluate_embeddings(lake / "embeddings", tmp_path / "qrels", [1], tmp_path / "queries.parquet")
    assert itself["per_query"]["mrr"] < 100 / 6


def test_queries_of_another_model_are_refused(lake: Path, tmp_path: Path) -> None:
    table = read_embeddings(lake / "embeddings")
    for name, weights in (("notes", "model-1"), ("queries", "model-2")):
        write_shard(tmp_path / name / "0.parquet", table.note_ids, table.vectors, {"weights": weights})
    pairs = lake / "pairs" / "test"
    assert (
        evaluate_embeddings(tmp_path / "notes", pairs, [1], lake / "embeddings")["num_pairs"] > 0
    )  # of no known model
    with pytest.raises(ValueError, match=r"queries holds vectors of model model-2, .*notes those of model model-1"):
        evaluate_embeddings(tmp_path / "notes", pairs, [1], tmp_path / "queries")


def test_no_pair_is_no_result(lake: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("n00 0 n01 0\n")
    with pytest.raises(ValueError, match="qrels holds no relevant pair"):
        evaluate_embeddings(lake / "embeddings", tmp_path / "qrels", [1])


def test_pairs_are_read_in_one_order(lake: Path) -> None:
    pairs = read_pairs(lake / "pairs").pairs
    assert pairs == read_pairs(lake / "pairs" / "test" / "0.parquet").pairs
    assert pairs.query_ids == tuple(sorted(pairs.query_ids))


def test_neighbours(lake: Path) -> None:
    """The sheet shows images from a file, from the table, and none. The seed draws its queries, so two are equal."""
    image = image_reader(lake / "notes", lake / "source", 1_000_000)
    assert image("n00").size == image("n01").size == (40, 20)  # type: ignore[union-attr]
    assert image("n02") is None
    note_ids: list[str] = []
    sheet = neighbour_sheet(
        lake / "embeddings", lake / "notes", lake / "pairs", 4, lambda i: (note_ids.append(i), image(i))[1]
    )
    assert Image.open(io.BytesIO(sheet)).width == 1500
    assert len(note_ids) == 4 * 6
    for row in range(4):  # five neighbours of one topic, without the query
        topic = {int(i[1:]) // PER_TOPIC for i in note_ids[6 * row : 6 * row + 6]}
        assert len(topic) == 1
        assert len(set(note_ids[6 * row : 6 * row + 6])) == 6
    assert sheet == neighbour_sheet(lake / "embeddings", lake / "notes", lake / "pairs", 4, image)


def test_an_oracle_without_its_columns(lake: Path, config: Config) -> None:
    with pytest.raises(ValueError, match=r"lacks the columns \['text_key', 'image_key'\]"):
        evaluate({}, lake / "notes", lake / "pairs", config, lake, lake / "clicks.parquet", lake / "clicks.parquet")


def test_every_baseline_has_scores_or_embeddings() -> None:
    """A row of BASELINES without either would be missing from the table, and nobody would notice."""
    assert {*BASELINES} == {*SCORES, *encoders(BASELINES), "zero_shot"}
    assert {*SCORES}.isdisjoint(encoders(BASELINES))


def test_the_sum_of_two_methods_counts_both_alike() -> None:
    """Worked example: (1, 2, 3) and (30, 10, 20) have the standard scores (-1, 0, 1) and (1, -1, 0) x sqrt(3/2)."""
    words, vectors = np.array([[1.0, 2, 3], [5, 5, 5]]), np.array([[30.0, 10, 20], [1, 1, 4]])
    scores = summed_rows(lambda ids: words, lambda ids: vectors)(["q", "r"])
    assert scores == pytest.approx(np.array([[0, -(1.5**0.5), 1.5**0.5], [-(0.5**0.5), -(0.5**0.5), 2**0.5]]))
    assert scores.dtype == np.float32
    none = summed_rows(lambda ids: words[1:], lambda ids: words[1:])(["r"])
    assert none.tolist() == [[0, 0, 0]]


def test_a_sum_of_baselines_is_a_row(lake: Path, config: Config) -> None:
    """Words and embeddings know the topic here, and so does their sum. The encoder has a row of its own."""
    settings = config.model_copy(update={"evaluation": EvaluationSettings(ks=(5,), baselines=("bm25_minilm",))})
    folders = {("minilm", "text"): lake / "embeddings"}
    report = evaluate(folders, lake / "notes", lake / "pairs", settings, lake, lake / "clicks.parquet")
    recalls = {row.method: row.recalls[0].expected for row in report.rows if row.slice == "all"}
    assert recalls == {"minilm": 100, "bm25_minilm": 100}


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown baseline 'tfidf'; choose from random, popularity, bm25, minilm"):
        EvaluationSettings(baselines=("random", "tfidf"))
