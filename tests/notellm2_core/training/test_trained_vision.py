"""A trained vision encoder is trained on images, saved under its new id, and used for all later embeddings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from notellm2_core.config.training import PARTS
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference.embedder import Embedder
from notellm2_core.inference.export import export
from notellm2_core.notes.processor import InputKind
from notellm2_core.training import measure_saliency as saliency
from notellm2_core.training.run import run
from notellm2_core.vision.encoder import VisionEncoder
from tests.support.world import World, tiny_config, train, write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]


def test_from_images_to_embeddings(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The saved encoder has a new id. Export, saliency and Embedder use it, and refuse features of the old one. A
    frozen encoder keeps its id.
    """
    config = tiny_config(
        {"num_steps": 3, "learning_rate": 1e-2, "trainable": [*PARTS, "vision"], "precision": "auto"},
        init={"pca_projector": True},
    )
    out = train(world, config, tmp_path)
    assert "every step encodes its images" in capfd.readouterr().err
    before, after = (VisionEncoder.from_pretrained(f) for f in (world.path("images") / "vision", out / "vision"))
    assert (
        after.encoder_id
        != before.encoder_id
        == VisionEncoder.from_pretrained(
            train(world, tiny_config({"num_steps": 1}), tmp_path / "frozen") / "vision"
        ).encoder_id
    )
    assert all(not torch.equal(w, after.state_dict()[name]) for name, w in before.state_dict().items())
    assert json.loads((out / "card.json").read_text())["vision"]["trained"]
    assert "vision encoder (trained)" in (out / "README.md").read_text()

    with pytest.raises(ValueError, match="trained with vision encoder"):
        export(config, out, world.inputs, {"image": None}, tmp_path / "embeddings")
    all_notes: dict[InputKind, None] = {"image": None, "multimodal": None}
    counts = export(config, out, world.with_image_folders, all_notes, tmp_path / "embeddings")
    assert counts["images"] == "encoded anew"
    rows = pq.read_table(world.path("notes")).to_pylist()
    notes = [{k: row[k] for k in ("title", "topics", "content", "image")} for row in rows]
    for kind in ("image", "multimodal"):
        actual = read_embeddings(tmp_path / "embeddings" / kind)
        assert actual.note_ids == tuple(row["note_id"] for row in rows)
        np.testing.assert_allclose(actual.vectors, Embedder.from_pretrained(out).embed(notes, kind), atol=1e-5)

    config_file = write_config(tmp_path / "config.yaml", config)
    arguments = ["--config", str(config_file), "--model", str(out), "--out", str(tmp_path / "saliency")]
    arguments += ["--pairs", str(world.path("pairs"))]
    with pytest.raises(SystemExit):
        saliency.main([*arguments, *world.inputs.arguments()])
    saliency.main([*arguments, *world.with_image_folders.arguments()])
    assert json.loads((tmp_path / "saliency" / "saliency.json").read_text())["num_notes"] > 0


def test_the_encoder_alone_learns(world: World, tmp_path: Path) -> None:
    """Only the encoder is trained, with only_late_fusion, where the image reaches only the fusion. The loss falls."""
    config = tiny_config({"num_steps": 40, "learning_rate": 3e-2, "trainable": ["vision"]}, method="only_late_fusion")
    out = train(world, config, tmp_path)
    summary = json.loads((out / "training.json").read_text())
    assert summary["loss_last"] < 0.9 * summary["loss_first"]


def test_training_the_encoder_needs_images(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--image-folders"):
        run(tiny_config({"trainable": ["vision"]}), replace(world.paths(tmp_path), inputs=world.inputs))
