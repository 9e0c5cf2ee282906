"""The stand-ins of the model's commands: their files are those of the commands, and their quality is as asked for."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.schema import COUNTS_FILE, NOTE_IMAGES, NOTE_IMAGES_FILE
from notellm2_core.simulation.stand_ins import DIM, STAND_INS, write_skill
from tests.support.world import tiny_config

NUM_GROUPS, SIZE = 20, 6
IDS = [f"n{i:06d}" for i in range(NUM_GROUPS * SIZE)]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Notes in groups of one theme and one style; the first has no image."""
    (tmp_path / "source").mkdir()
    groups = [i // SIZE for i in range(len(IDS))]
    images = [None if i == 0 else f"style {group} of {IDS[i]}".encode() for i, group in enumerate(groups)]
    for name in ("notes", "pairs/train"):
        (tmp_path / name).mkdir(parents=True)
    pq.write_table(pa.table({"note_id": IDS, "image": images}), tmp_path / "notes" / "0.parquet")
    pq.write_table(pa.table({"query_id": IDS[:1], "target_id": IDS[1:2]}), tmp_path / "pairs" / "train" / "0.parquet")
    pq.write_table(pa.table({"note_id": IDS, "theme": groups}), tmp_path / "truth.parquet")
    config = tiny_config().model_dump(mode="json")
    config["source"] |= {"path": str(tmp_path / "source"), "demo": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def _run(world: Path, module: str, **options: str | Path) -> None:
    named = {"config": world / "config.yaml", "notes": world / "notes", **options}
    arguments = [str(part) for name, value in named.items() for part in (f"--{name.replace('_', '-')}", value)]
    STAND_INS[f"notellm2_core.{module}"](arguments)


def _recall(vectors: np.ndarray) -> float:
    """How many of the SIZE - 1 nearest notes are of the same group."""
    scores = vectors @ vectors.T - 2 * np.eye(len(vectors))
    nearest = np.argsort(-scores, axis=1)[:, : SIZE - 1]
    return float((nearest // SIZE == np.arange(len(vectors))[:, None] // SIZE).mean())


def test_a_model_is_as_good_as_its_skill(world: Path) -> None:
    _run(world, "vision.extract", out=world / "images")
    table = pq.read_table(world / "images" / NOTE_IMAGES_FILE)
    assert table.schema.equals(NOTE_IMAGES) and table["image_id"].null_count == 1
    counts = json.loads((world / "images" / COUNTS_FILE).read_text())
    assert (counts["notes"], counts["missing"], counts["ok"]) == (len(IDS), 1, len(IDS) - 1)
    recalls = {}
    for name, noise, sees in (("good", 0.3, True), ("poor", 2.0, True), ("blind", 0.3, False)):
        write_skill(world, noise, sees)
        _run(world, "training", pairs=world / "pairs", out=world / name)
        _run(world, "inference.export", model=world / name, images=world / "images", inputs="multimodal,image,text",
             out=world / f"{name} vectors")  # fmt: skip
        for kind in ("multimodal", "image", "text"):
            found = read_embeddings(world / f"{name} vectors" / kind)
            assert found.vectors.shape == (len(IDS), DIM)
            recalls[name, kind] = _recall(found.vectors[found.rows(IDS)])
    assert recalls["good", "multimodal"] > 0.95 > 0.5 > recalls["poor", "multimodal"] > 0.1
    assert recalls["blind", "image"] < 0.1 < 0.8 < recalls["good", "image"]
    assert recalls["blind", "text"] == recalls["good", "text"] > 0.8


def test_a_model_gives_a_note_the_same_vector_again(world: Path) -> None:
    _run(world, "vision.extract", out=world / "images")
    write_skill(world, 1.0)
    _run(world, "training", pairs=world / "pairs", out=world / "model")
    for name, ids in (("all", IDS), ("some", IDS[3:9])):
        pq.write_table(pa.table({"note_id": ids}), world / f"{name}.parquet")
        _run(world, "inference.export", model=world / "model", images=world / "images", inputs="multimodal",
             note_ids=world / f"{name}.parquet", out=world / name)  # fmt: skip
    whole, part = (read_embeddings(world / name / "multimodal") for name in ("all", "some"))
    assert np.array_equal(whole.vectors[whole.rows(IDS[3:9])], part.vectors[part.rows(IDS[3:9])])
