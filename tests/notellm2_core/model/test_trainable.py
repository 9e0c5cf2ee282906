"""The parameters that `training.trainable` and `model.lora` make trainable."""

from pathlib import Path
from typing import Any

import pytest
import torch

from notellm2_core.config.settings import Config
from notellm2_core.config.training import PARTS
from notellm2_core.model.build import build_model, mlrm_config
from notellm2_core.model.llm import llm_architecture
from notellm2_core.model.lora import is_adapter
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.trainable import parts_of, set_trained
from tests.support.tiny_model import tiny_config


def built(parts: list[str] | None = None, lora: dict[str, Any] | None = None, method: str = "notellm2") -> MLRMModel:
    tree = tiny_config(method).model_dump()
    tree["model"]["lora"], tree["training"]["trainable"] = lora, parts
    config = Config(**tree)
    model, _ = build_model(config, Path("unused"))
    set_trained(model, config)
    return model


def trained(model: MLRMModel) -> dict[str, set[str]]:
    return {part: {n for n, p in named if p.requires_grad} for part, named in parts_of(model).items()}


def test_every_parameter_belongs_to_one_part() -> None:
    model = built()
    parts = parts_of(model)
    assert tuple(parts) == PARTS
    assert sorted(n for named in parts.values() for n, _ in named) == sorted(n for n, _ in model.named_parameters())
    assert [n for n, _ in parts["word_embeddings"]] == ["llm.embed_tokens.weight"]
    assert [n for n, _ in parts["temperature"]] == ["tau"]
    assert "llm.norm.weight" in dict(parts["llm"]) and "fusion.gate.weight" in dict(parts["fusion"])
    assert parts_of(built(method="basic"))["fusion"] == []


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone(part: str) -> None:
    model = built([part])
    names = {n for n, _ in parts_of(model)[part]}
    assert names and {n for n, p in model.named_parameters() if p.requires_grad} == names


def test_all_by_default_and_with_lora_all_except_the_llms_own_weights() -> None:
    assert all(p.requires_grad for p in built().parameters())
    model = built(lora={"rank": 2})
    actual = trained(model)
    assert actual["llm"] == {n for n, _ in model.named_parameters() if is_adapter(n)} != set()
    assert actual["word_embeddings"] == set()
    assert all(actual[part] == {n for n, _ in parts_of(model)[part]} for part in PARTS[2:])


def test_lora_and_parts_together() -> None:
    """Word embeddings are trained with adapters if both are named. Without the part llm there are no adapters."""
    actual = trained(built(["llm", "word_embeddings"], {"rank": 2}))
    assert actual["word_embeddings"] and all(is_adapter(n) for n in actual["llm"])
    model = built(["connector"], {"rank": 2})
    assert not any(is_adapter(n) for n, _ in model.named_parameters())


def test_training_nothing_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="training.trainable = fusion leaves nothing to train with model.method = basic"
    ):
        built(["fusion"], method="basic")


def test_it_works_without_weights() -> None:
    """`describe` uses the meta device. Adapters of rank 8 on 2 x 7 layers have 8 (in + out) parameters each. The tiny
    LLM has width 64, 32 key-value and 128 inner dimensions: 8 x 2 (128 + 96 + 96 + 128 + 3 x 192).
    """
    tree = tiny_config().model_dump()
    tree["model"]["lora"] = {"rank": 8}
    config = Config(**tree)
    with torch.device("meta"):
        model = MLRMModel(mlrm_config(config, llm_architecture(config.model.llm), 16, 32))
        set_trained(model, config)
    adapters = [p for _, p in parts_of(model)["llm"] if p.requires_grad]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in adapters) == 8 * 2 * (128 + 96 + 96 + 128 + 3 * 192)
