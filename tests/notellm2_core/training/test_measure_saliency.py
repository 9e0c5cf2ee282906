"""Saliency of a model on training pairs: it uses the training loss, on pairs that the seed draws."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from notellm2_core.config.methods import METHODS
from notellm2_core.config.settings import Config
from notellm2_core.model.build import build_model
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.saliency import Loss, Measurement
from notellm2_core.notes.processor import MLRMProcessor, NoteBatch
from notellm2_core.training import measure_saliency as saliency
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.data.sampler import batch_schedule
from notellm2_core.training.measure_saliency import main, measure_on_training_pairs
from notellm2_core.training.objective.losses import BatchLabels
from notellm2_core.training.objective.views import TrainingStep, batch_losses
from tests.support.world import World, pair_dataset, tiny_config, write_config


def config_with(num_pairs: int, method: str = "notellm2", **training: Any) -> Config:
    config = tiny_config(training, method=method)
    evaluation = config.evaluation.model_copy(update={"saliency_pairs": num_pairs})
    return config.model_copy(update={"evaluation": evaluation})


def make(world: World, config: Config, cache: Path) -> tuple[MLRMModel, MLRMProcessor, PairDataset]:
    model, processor = build_model(config, cache)
    return model, processor, pair_dataset(world, processor, cache)


def measured_batches(monkeypatch: pytest.MonkeyPatch, model: MLRMModel, data: PairDataset, config: Config) -> list:
    """The batches that `measure` gets, with the values of their losses."""
    measured: list[tuple[NoteBatch, float]] = []

    def spy(model: MLRMModel, batches: Iterable[tuple[NoteBatch, Loss]]) -> Measurement:
        measured.extend((batch, loss(model(batch)).item()) for batch, loss in batches)
        return Measurement((), {}, 0, 0)

    monkeypatch.setattr(saliency, "measure", spy)
    measure_on_training_pairs(model, data, config)
    return measured


@pytest.mark.parametrize(("method", "centre"), [*((method, False) for method in sorted(METHODS)), ("notellm2", True)])
def test_the_loss_is_that_of_the_training_step(
    method: str, centre: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss equals that of a training step on the same batch, with its alpha, tau and masks of known positives."""
    config = config_with(8, method, alpha=3.0, centre_embeddings=centre)
    model, _, data = make(world, config, tmp_path)
    positives = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2
    labels = BatchLabels(
        data.labels(np.arange(16)).has, dict(zip(("multimodal", "image", "text"), positives, strict=True))
    )
    monkeypatch.setattr(data, "labels", lambda rows, masked: labels)  # this world has no known positives
    with torch.no_grad():
        model.tau.fill_(6.0)  # above the cap
        ((batch, actual),) = measured_batches(monkeypatch, model, data, config)
        rows = data.train_pairs[batch_schedule(data.train_pairs, 8, 1, config.seed)[0]].reshape(-1)
        embedded = TrainingStep(model, METHODS[method])(data.note_batch(rows, METHODS[method].inputs))
        losses = batch_losses(config, embedded.rows, embedded.tau, labels)
    expected = losses.multimodal if method == "omni_retrieval" else losses.total  # omni: its multimodal term
    assert len(batch) == 16 and actual == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("num_pairs", "sizes"), [(2, [4]), (16, [32]), (17, [18, 18]), (1000, [32, 32])])
def test_equal_batches_of_at_most_16_pairs(
    num_pairs: int, sizes: list[int], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 pairs are two batches of 9. More than the 32 training pairs are all, once. Another seed draws other pairs."""
    config = config_with(num_pairs, "basic")
    model, _, data = make(world, config, tmp_path)
    with torch.no_grad():
        first = measured_batches(monkeypatch, model, data, config)
        other = measured_batches(monkeypatch, model, data, config.model_copy(update={"seed": 7}))
    assert [len(batch) for batch, _ in first] == sizes
    assert [loss for _, loss in first] != [loss for _, loss in other]


def test_one_pair_is_refused(world: World, tmp_path: Path) -> None:
    model, _, data = make(world, config_with(1), tmp_path)
    with pytest.raises(ValueError, match="at least 2 training pairs, got 1"):
        measure_on_training_pairs(model, data, config_with(1))


def test_the_command(world: World, tmp_path: Path) -> None:
    """The command writes the function's scores. Every 8th note has no image and is left out."""
    config = config_with(32)
    model, processor, data = make(world, config, tmp_path)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    folders = [*world.inputs.arguments(), "--pairs", str(world.path("pairs"))]
    options = ["--config", str(write_config(tmp_path / "c.yaml", config)), "--out", str(tmp_path / "out")]
    main([*folders, "--model", str(tmp_path / "model"), *options])
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["saliency.json"]
    record = json.loads((tmp_path / "out" / "saliency.json").read_text())
    assert (record["method"], record["num_notes"], record["num_without_image"]) == ("notellm2", 56, 8)
    expected = measure_on_training_pairs(model, data, config)
    actual, expected_scores = (
        [list(layer.values()) for layer in layers] for layers in (record["layers"], expected.layers)
    )
    np.testing.assert_allclose(np.array(actual), np.array(expected_scores), rtol=1e-4)
    assert list(record["layers"][0]) == ["visual", "text", "other"] and len(record["layers"]) == 2
