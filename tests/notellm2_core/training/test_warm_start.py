"""A run that starts from a trained model in place of the pretrained one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from notellm2_core.config.training import PARTS
from notellm2_core.model.build import load_model
from notellm2_core.training.launch import Start
from notellm2_core.training.run import run
from notellm2_core.vision.encoder import VisionEncoder
from tests.support.world import World, tiny_config, train

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.slow]
INIT = {"pca_projector": True, "fusion_scale": 0.3, "gate_bias": -1.0}


def _trained_on(world: World, folder: Path, start: Path, settings: dict[str, object], **model: object) -> Path:
    paths = replace(world.paths(folder), start=Start(start, "r1", ("2025-01-05", "2025-01-12")))
    run(tiny_config(settings, **model), paths)
    return paths.out


def test_it_starts_with_the_weights_of_the_trained_model(world: World, tmp_path: Path) -> None:
    """A learning rate that is too small to show leaves them as they were, and `model.init` does not touch them."""
    start = train(world, tiny_config({"num_steps": 3, "learning_rate": 3e-3}, init=INIT), tmp_path / "first")
    out = _trained_on(world, tmp_path / "second", start, {"num_steps": 1, "learning_rate": 1e-12}, init=INIT)
    before, after = (load_model(folder)[0].state_dict() for folder in (start, out))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-9)
    summary = json.loads((out / "training.json").read_text())
    assert summary["start"] == {"release": "r1", "weeks": ["2025-01-05", "2025-01-12"]}
    assert (
        "Trained on from release r1, whose lineage trained on the weeks 2025-01-05, 2025-01-12."
        in (out / "README.md").read_text()
    )


def test_a_trained_encoder_is_taken_over(world: World, tmp_path: Path) -> None:
    settings = {"trainable": [*PARTS, "vision"], "num_steps": 2, "learning_rate": 3e-3}
    start = train(world, tiny_config(settings), tmp_path / "first")
    out = _trained_on(world, tmp_path / "second", start, settings | {"num_steps": 1, "learning_rate": 1e-12})
    before, after = (VisionEncoder.from_pretrained(folder / "vision").state_dict() for folder in (start, out))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="the model was trained with vision encoder"):  # a frozen one would be another
        _trained_on(world, tmp_path / "third", start, {"num_steps": 1})


def test_a_model_of_other_sizes_is_refused(world: World, tmp_path: Path) -> None:
    start = train(world, tiny_config({"num_steps": 1}), tmp_path / "first")
    with pytest.raises(ValueError, match="training.start_from = champion: the model in .* has other parts or sizes"):
        _trained_on(world, tmp_path / "second", start, {"num_steps": 1}, projection_dim=4)
