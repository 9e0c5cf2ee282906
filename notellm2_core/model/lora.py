"""LoRA (Hu et al. 2021): a linear layer computes W x + (alpha / rank) B A x, and only A and B are trained.

peft makes and merges the adapters. They exist during training only: a saved model has the sum as its W.
"""

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers, which peft imports

# isort: split
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from notellm2_core.config.model import LoRASettings

_ADAPTER = "default"  # peft can hold several under different names


def add_adapters(llm: nn.Module, lora: LoRASettings, seed: int) -> None:
    """Add adapters to linear layers of `llm`, in place: A is random, the same for the same seed, and B = 0.

    The output is therefore unchanged before the first step. Raises ValueError if `target_modules` names no linear layer
    of the LLM.
    """
    names = {name.rpartition(".")[2] for name, layer in llm.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    targets = names if lora.target_modules == "all-linear" else {*lora.target_modules}
    if unknown := targets - names:
        raise ValueError(
            f"model.lora.target_modules names {min(unknown)!r}, which is no linear layer of this LLM; "
            f"choose among {', '.join(sorted(names))}, or all-linear."
        )
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=sorted(targets), bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, llm, _ADAPTER)


def is_adapter(name: str) -> bool:
    """Whether `name` is that of an adapter's parameter."""
    return ".lora_" in name


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers of `model` that have an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


def merge(weights: dict[str, Tensor], name: str, layer: AdaptedLinear) -> None:
    """Replace the weights of the adapted `layer` called `name` by the one matrix W + (alpha / rank) B A.

    `weights`: the model's parameters by name, changed in place. `layer` must be complete (ZeRO-3 partitions weights).
    B A is computed in the adapters' precision, the sum in fp32; the result has the precision of W.

    Worked example (rank 1, alpha 2): W = [[1, 0], [0, 1]], B = [[1], [3]], A = [[1, 2]] make [[3, 4], [6, 13]].
    """
    delta = layer.get_delta_weight(_ADAPTER).detach().cpu()
    for old in [n for n in weights if n.startswith(f"{name}.")]:
        value = weights.pop(old)
        if old == f"{name}.base_layer.weight":
            weights[f"{name}.weight"] = (value.float() + delta.float()).to(value.dtype)
        elif not is_adapter(old):
            weights[f"{name}.{old.rpartition('.')[2]}"] = value
