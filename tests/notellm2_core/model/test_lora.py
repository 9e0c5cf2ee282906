"""Adapters change nothing at first, get their gradients, and are merged into plain layers at the end."""

import pytest
import torch
from torch import nn

from notellm2_core.config.model import LoRASettings
from notellm2_core.model.lora import adapted_layers, add_adapters, is_adapter, merge
from notellm2_core.model.mlrm import MLRMModel
from tests.support.tiny_model import EMPTY, LONG, SHORT, batch_of, tiny_model

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a Llama


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if is_adapter(n)}


@torch.no_grad()
def fill(model: MLRMModel) -> None:
    """Fill the adapters with random numbers, as if B had been trained."""
    torch.manual_seed(1)
    for parameter in adapters(model).values():
        parameter.normal_(std=0.1)


def test_the_worked_example() -> None:
    """(alpha / rank) B A = 2 [[1], [3]] [[1, 2]] = [[2, 4], [6, 12]], and W = I, so the layer is [[3, 4], [6, 13]]."""
    llm = nn.Sequential()
    llm.add_module("layer", nn.Linear(2, 2))
    nn.init.eye_(llm.layer.weight)
    bias = llm.layer.bias.detach().clone()
    add_adapters(llm, LoRASettings(rank=1, alpha=2), 0)
    layer = adapted_layers(llm)["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[1.0], [3.0]]))
    weights = {n: p.detach() for n, p in llm.named_parameters()}
    assert {"layer.base_layer.weight", "layer.base_layer.bias"} < weights.keys()
    merge(weights, "layer", layer)
    assert weights.keys() == {"layer.weight", "layer.bias"}
    assert torch.equal(weights["layer.weight"], torch.tensor([[3.0, 4.0], [6.0, 13.0]]))
    assert torch.equal(weights["layer.bias"], bias)
    x = torch.randn(5, 2)
    torch.testing.assert_close(llm(x), x @ weights["layer.weight"].T + bias)


def test_a_sum_in_bf16_is_rounded_once() -> None:
    """In bf16 the number after W = 1 is 1 + 2^-7: a sum of 2^-9 + 2^-12 is lost, one of 2^-8 + 2^-11 is rounded up."""
    llm = nn.Sequential()
    llm.add_module("layer", nn.Linear(1, 1, bias=False))
    add_adapters(llm, LoRASettings(rank=1, alpha=1), 0)
    llm.to(torch.bfloat16)
    layer = adapted_layers(llm)["layer"]
    for delta, expected in ((2**-9 + 2**-12, 1.0), (2**-8 + 2**-11, 1 + 2**-7)):
        with torch.no_grad():
            layer.base_layer.weight.fill_(1.0)
            layer.lora_A["default"].weight.fill_(1.0)
            layer.lora_B["default"].weight.fill_(delta)
        weights = {n: p.detach() for n, p in llm.named_parameters()}
        merge(weights, "layer", layer)
        assert weights["layer.weight"].item() == expected and weights["layer.weight"].dtype == torch.bfloat16


def test_every_linear_layer_of_the_decoder_is_adapted_and_nothing_changes_yet() -> None:
    model, processor = tiny_model()
    batch = batch_of(processor, [SHORT, LONG, EMPTY])
    with torch.no_grad():
        before = model(batch).multimodal
        add_adapters(model.llm, LoRASettings(rank=3), 0)
        assert torch.equal(model(batch).multimodal, before)
        fill(model)
        assert not torch.allclose(model(batch).multimodal, before, atol=1e-3)
    names = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert names == {*LAYERS} and len(adapted_layers(model)) == 2 * len(LAYERS)
    assert all(3 in p.shape for p in adapters(model).values())


def test_the_same_seed_makes_the_same_adapters_and_draws_none_of_the_callers_numbers() -> None:
    weights = []
    for seed in (0, 0, 1):
        model, _ = tiny_model()
        state = torch.random.get_rng_state()
        add_adapters(model.llm, LoRASettings(), seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        weights.append(torch.cat([p.detach().reshape(-1) for p in adapters(model).values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_chosen_layers() -> None:
    model, _ = tiny_model()
    add_adapters(model.llm, LoRASettings(target_modules=("q_proj", "v_proj")), 0)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "v_proj"}
    model, _ = tiny_model()
    with pytest.raises(
        ValueError, match=r"names 'query', which is no linear layer .* choose among down_proj, .*v_proj"
    ):
        add_adapters(model.llm, LoRASettings(target_modules=("q_proj", "query")), 0)


def test_gradient_checkpointing_gives_adapters_the_same_gradients() -> None:
    """With frozen word embeddings the inputs of the LLM's layers need no gradients, but A and B still get theirs."""
    actual = []
    for checkpointing in (False, True):
        model, processor = tiny_model("basic")
        model.requires_grad_(False)  # the connector too
        add_adapters(model.llm, LoRASettings(), 0)
        fill(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(batch_of(processor, [SHORT, LONG])).multimodal.square().sum().backward()
        actual.append({n: p.grad for n, p in adapters(model).items()})
    assert all(g is not None and g.abs().sum() > 0 for g in actual[1].values())
    for name, gradient in actual[0].items():
        torch.testing.assert_close(actual[1][name], gradient)
