"""A verdict from datasets on disk: what each gate sees, and which pairs count."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from notellm2_core import schema
from notellm2_core.config.settings import Config, EvaluationSettings
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.release.judge import Candidate, effective_rank, image_gate, judge

NUM_GROUPS = 200  # of four notes; each note is paired with the two after it in its group
IDS = [f"n{n:03d}" for n in range(4 * NUM_GROUPS)]
GOOD: dict[str, dict[str, Any]] = {
    "checkpoint": {},
    "note_embeddings": {"mean_cosine": {"multimodal": 0.1}},
    "faiss_index": {"recall": {"10": 99.0}, "search_k": 10, "target_recall": 0.95},
    "pair_datasets": {"leakage": {"notes": 0, "pairs": 0}},
    "canary": {"queries": 20, "failed": None},
    "weekly_activity": {"weeks": []},
    "data_profile": {
        "notes": {"num_notes": 800, "text_length": 3.0, "characters": {"a": 1.0}, "wrongly_decoded": 0.0,
                  "image_share": 0.0, "repeated_images": 0.0},
        "related_texts": {"train": {"num_pairs": 1, "similarity": 0.0, "error": 0.0},
                          "test": {"num_pairs": 1600, "similarity": 0.0, "error": 0.0}},
    },
}  # fmt: skip


def _table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _embeddings(folder: Path, noise: float, seed: int) -> Path:
    """Vectors around the centre of each group: the more noise, the lower the recall."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(NUM_GROUPS, 16))
    vectors = np.repeat(centres, 4, axis=0) + noise * generator.normal(size=(len(IDS), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder.mkdir(parents=True)
    write_shard(folder / "part-00000.parquet", IDS, vectors.astype(np.float32), {})
    return folder


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lake")
    notes = [
        {"note_id": i, "title": "a b", "topics": [], "content": "c", "image_path": None, "image": None} for i in IDS
    ]
    _table(root / "notes" / "0.parquet", pa.Table.from_pylist(notes, schema=schema.NOTES))
    pairs = [
        {"query_id": i, "target_id": IDS[n - n % 4 + (n + step) % 4], "score": 1.0, "num_users": 1, "rank": step}
        for n, i in enumerate(IDS)
        for step in (1, 2)
    ]
    _table(root / "pairs" / "test" / "0.parquet", pa.Table.from_pylist(pairs, schema=schema.RELATED_PAIRS))
    trained = [{**pairs[0], "query_id": "t1", "target_id": "t2"}]
    _table(root / "pairs" / "train" / "0.parquet", pa.Table.from_pylist(trained, schema=schema.RELATED_PAIRS))
    _table(root / "pairs" / "pool" / "0.parquet", pa.table({"note_id": IDS, "in_train_days": [True] * len(IDS)}))
    for name, noise in {"champion": 1.0, "alike": 1.0, "better": 0.5, "worse": 2.0, "random": 99.0}.items():
        _embeddings(root / name / "multimodal", noise, seed=len(name) + 100 * (name == "alike"))
        _embeddings(root / name / "image", 99.0 if name == "random" else 1.5, seed=1 + len(name))
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "tokenizer.json"))
    rows = [
        {"method": "bm25", "slice": "all", "recall": {"5": 12.5}},
        {"method": "x", "slice": "all", "recall": {"5": 90}},
    ]
    (root / "recall.json").write_text(json.dumps({"rows": rows}))
    return root


@pytest.fixture
def config() -> Config:
    return Config(
        name="t",
        model={"llm": {"name": "tiny"}},
        evaluation=EvaluationSettings(ks=(5,)),  # type: ignore[arg-type]
    )


def _candidate(lake: Path, model: str, **changes: Any) -> Candidate:
    candidate = Candidate(
        source=lake,
        notes=lake / "notes",
        pairs=lake / "pairs",
        model=lake,
        embeddings=lake / model,
        report=lake,
        rivals={"champion": lake / "champion"},
        trained=frozenset(),
        past_lifts=(),
        past_notes=(),
        metrics=GOOD,
    )
    return replace(candidate, **changes)


def _outcomes(out: Path) -> Mapping[str, str]:
    return {gate["name"]: gate["outcome"] for gate in json.loads((out / "verdict.json").read_text())["gates"]}


@pytest.mark.parametrize(
    ("model", "outcome"), [("alike", "passed"), ("better", "passed"), ("worse", "refused"), ("random", "refused")]
)
def test_a_model_is_judged_beside_the_champion(
    lake: Path, config: Config, tmp_path: Path, model: str, outcome: str
) -> None:
    found = judge(_candidate(lake, model), config, tmp_path)
    assert found["outcome"] == outcome and (found["num_pairs"], found["num_left_out"]) == (1600, 0)
    assert _outcomes(tmp_path)["recall_of_champion"] == outcome and "recall_of_chance" not in _outcomes(tmp_path)
    assert found["recalls"]["best baseline"] == 12.5
    assert (found["recalls"]["challenger"] < found["recalls"]["champion"] - 5) == (outcome == "refused")
    assert "| recall_of_champion |" in (tmp_path / "verdict.md").read_text()
    assert (tmp_path / "verdict.png").read_bytes().startswith(b"\x89PNG")
    sheets = [(tmp_path / f"neighbours_{name}.jpg").read_bytes() for name in ("before", "after")]
    assert all(sheet.startswith(b"\xff\xd8") for sheet in sheets) and sheets[0] != sheets[1]


def test_pairs_that_a_lineage_has_trained_on_do_not_count(lake: Path, config: Config, tmp_path: Path) -> None:
    """The notes of the first 40 groups: 40 * 8 pairs."""
    found = judge(_candidate(lake, "alike", trained=frozenset(IDS[:160])), config, tmp_path)
    assert (found["num_pairs"], found["num_left_out"]) == (1280, 320)
    assert "320 test pairs do not count" in (tmp_path / "verdict.md").read_text()


def test_too_few_pairs_leave_it_undecided(lake: Path, config: Config, tmp_path: Path) -> None:
    found = judge(_candidate(lake, "better", trained=frozenset(IDS[:-100])), config, tmp_path)
    assert found["outcome"] == "undecided" and "200 pairs of 100 queries are too few" in found["why"]


def test_a_first_release_has_to_be_better_than_chance(lake: Path, config: Config, tmp_path: Path) -> None:
    for model, outcome in (("worse", "passed"), ("random", "refused")):
        (tmp_path / model).mkdir()
        found = judge(_candidate(lake, model, rivals={}), config, tmp_path / model)
        assert found["outcome"] == outcome == _outcomes(tmp_path / model)["recall_of_chance"]
        assert not (tmp_path / model / "verdict.png").exists()


def test_a_model_that_lost_to_the_anchor_is_refused_although_the_champion_is_no_better(
    lake: Path, config: Config, tmp_path: Path
) -> None:
    rivals = {"champion": lake / "alike", "anchor": lake / "better"}
    found = judge(_candidate(lake, "champion", rivals=rivals), config, tmp_path)
    assert _outcomes(tmp_path)["recall_of_champion"] == "passed"
    assert _outcomes(tmp_path)["recall_of_anchor"] == "refused" == found["outcome"]


@pytest.mark.parametrize(
    ("name", "metrics", "why"),
    [
        ("has_learned", {"checkpoint": {"warning": "After 60 steps the loss is that of chance."}}, "After 60 steps"),
        ("not_collapsed", {"note_embeddings": {"mean_cosine": {"multimodal": 0.96}}}, "is 0.960 (the limit is 0.95"),
        ("index_recall", {"faiss_index": {**GOOD["faiss_index"], "recall": {"10": 94.9}}}, "finds 94.9 %"),
        ("no_leakage", {"pair_datasets": {"leakage": {"notes": 0, "pairs": 1}}}, "{'pairs': 1}"),
        ("canary", {"canary": {"queries": 20, "failed": "The release cannot be used: damaged"}}, "cannot be used"),
    ],
)
def test_every_other_gate_refuses_by_itself(
    lake: Path, config: Config, tmp_path: Path, name: str, metrics: dict[str, Any], why: str
) -> None:
    found = judge(_candidate(lake, "alike", metrics=GOOD | metrics), config, tmp_path)
    assert found["outcome"] == "refused" and why in found["why"]
    assert [gate for gate, outcome in _outcomes(tmp_path).items() if outcome == "refused"] == [name]


def test_the_image_is_neglected(lake: Path, config: Config, tmp_path: Path) -> None:
    """With the image alone the model finds what chance finds, and the champions found much."""
    blind = tmp_path / "blind"
    blind.mkdir()
    (blind / "multimodal").symlink_to(lake / "alike" / "multimodal")
    (blind / "image").symlink_to(lake / "random" / "image")
    found = judge(_candidate(lake, "alike", embeddings=blind, past_lifts=(20.0, 30.0)), config, tmp_path)
    assert found["outcome"] == "refused" and found["image_lift"] < 3
    assert "the model neglects the image, or images are wrong" in found["why"]


def test_the_image_counts_only_where_it_helps() -> None:
    assert image_gate(1.0, [1.5, 1.2]).outcome == "passed"  # images say little on this data
    assert image_gate(1.0, []).outcome == image_gate(None, [1.0]).outcome == "passed"
    assert image_gate(None, [9.0]).outcome == "undecided"  # a model without images, where they helped
    assert image_gate(4.9, [10.0, 9.0, 30.0]).outcome == "refused"
    assert image_gate(5.0, [10.0, 9.0, 30.0]).outcome == "passed"


def test_the_effective_rank_is_the_number_of_directions() -> None:
    """A cross in three of eight dimensions, and one point."""
    cross = np.concatenate([np.eye(8)[:3], -np.eye(8)[:3]]).astype(np.float32)
    assert effective_rank(cross) == pytest.approx(3)
    assert effective_rank(np.ones((5, 4), np.float32) / 2) == 1
