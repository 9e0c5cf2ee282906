"""Training of single parts: frozen parts keep all bits, and adapters are merged into plain weights."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from notellm2_core.config.settings import Config
from notellm2_core.config.training import PARTS
from notellm2_core.model.build import build_model, load_model
from notellm2_core.model.lora import adapted_layers, is_adapter
from notellm2_core.model.trainable import parts_of, set_trained
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.state.checkpoints import Checkpoints
from notellm2_core.training.state.save import full_weights, plain_weights, save_model
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.feature_store import encoder_id
from tests.support.world import World, pair_dataset, tiny_config, train

pytestmark = pytest.mark.usefixtures("one_rank")
# Large rates and a large decay, so that a frozen weight that takes part in either would change.
RATES = {"learning_rate": 1e-2, "weight_decay": 0.1, "temperature_learning_rate": 1e-2}


def settings(lora: dict[str, Any] | None = None, **training: Any) -> Config:
    return tiny_config({"num_steps": 3, "batch_pairs": 4, "zero_stage": 2, **RATES, **training}, lora=lora)


def initial_weights(config: Config, cache: Path) -> dict[str, Tensor]:
    return build_model(config, cache)[0].state_dict()


@pytest.mark.parametrize("frozen", PARTS)
def test_a_frozen_part_stays_and_the_others_move(frozen: str, world: World, tmp_path: Path) -> None:
    """After three steps only the frozen part is unchanged. The saved vision encoder is that of the stored features."""
    config = settings(trainable=[part for part in PARTS if part != frozen])
    out = train(world, config, tmp_path)
    before, (model, _) = initial_weights(config, tmp_path), load_model(out)
    for part, parameters in parts_of(model).items():
        assert parameters
        for name, parameter in parameters:
            assert torch.equal(parameter, before[name]) == (part == frozen), name
    encoder = VisionEncoder.from_pretrained(out / "vision")  # computes its checksum again
    assert encoder.encoder_id == encoder_id(out) == encoder_id(world.path("images"))


def test_the_temperature_alone(world: World, tmp_path: Path) -> None:
    """Only tau changes, although no embedding has a gradient; the precision is measured first."""
    config = settings(trainable=["temperature"], precision="auto", zero_stage=3)
    before, (after, _) = initial_weights(config, tmp_path), load_model(train(world, config, tmp_path))
    assert [n for n, w in after.state_dict().items() if not torch.equal(w, before[n])] == ["tau"]


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_lora_is_saved_as_a_plain_model(zero_stage: int, precision: str, world: World, tmp_path: Path) -> None:
    """With gradient checkpointing, exactly the adapted layers of the LLM have changed. The folder has the tensor names
    of a model without adapters.
    """
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config = settings(lora, zero_stage=zero_stage, precision=precision, gradient_checkpointing=True)
    before, (after, _) = initial_weights(config, tmp_path), load_model(train(world, config, tmp_path))
    assert after.state_dict().keys() == before.keys()
    changed = {n for n, w in after.state_dict().items() if n.startswith("llm.") and not torch.equal(w, before[n])}
    adapted = ("self_attn.q_proj", "mlp.down_proj")
    assert changed == {f"llm.layers.{i}.{name}.weight" for i in range(2) for name in adapted}


def test_merged_and_adapted_models_embed_alike(world: World, tmp_path: Path) -> None:
    config = settings({"rank": 4})
    model, processor = build_model(config, tmp_path)
    set_trained(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)
    save_model(model, processor, world.inputs.vision, tmp_path / "out", config)
    data = pair_dataset(world, processor, tmp_path)
    batch = data.note_batch(data.train_notes[:8])
    with torch.no_grad():
        adapted, merged = model(batch), load_model(tmp_path / "out")[0](batch)
        for layer in adapted_layers(model).values():
            layer.enable_adapters(False)
        without = model(batch)
    for actual, expected, plain in zip(merged[:2], adapted[:2], without[:2], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        assert (expected - plain).abs().max() > 1e-2


def test_a_stopped_lora_run_resumes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped in its sixth step resumes from the checkpoint of the fourth, and ends with the same weights."""
    config = settings({"rank": 4, "dropout": 0.1}, num_steps=6, checkpoint_every_steps=2)
    straight = train(world, config, tmp_path / "straight")
    steps, step = [], engines.optimizer_step

    def until_the_sixth(engine: Any) -> float:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(engines, "optimizer_step", until_the_sixth)
    monkeypatch.setattr(Checkpoints, "settle", partialmethod(Checkpoints.settle, wait=True))
    with pytest.raises(KeyboardInterrupt):
        train(world, config, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "work" / "checkpoints" / "step-4").exists()
    resumed = train(world, config, tmp_path / "stopped")
    assert len(steps) == 8
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_run_with_other_parts_is_refused(world: World, tmp_path: Path) -> None:
    train(world, settings({"rank": 4}, num_steps=1), tmp_path)
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(ValueError, match="holds a training run with model.lora.rank = 4, not 2"):
        train(world, settings({"rank": 2}, num_steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"training.trainable = None, not \['llm', 'projector'\]"):
        train(world, settings({"rank": 4}, num_steps=1, trainable=["projector", "llm"]), tmp_path)


def test_plain_weights_of_a_plain_model_are_its_weights(tmp_path: Path) -> None:
    model, _ = build_model(settings(), tmp_path)
    plain, full = plain_weights(model), full_weights(model)
    assert plain is not None and full is not None and plain.keys() == full.keys()
