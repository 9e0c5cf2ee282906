"""How big a configuration's model is, without reading any weights."""

from typing import Any

import notellm2_core.torch_compat  # noqa: F401, before transformers

# isort: split
import torch
from torch import nn

from notellm2_core.config import Config
from notellm2_core.model.build import mlrm_config
from notellm2_core.model.llm import llm_architecture
from notellm2_core.model.methods import get_method
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.vision import vision_dims
from notellm2_core.model.vision_towers import architecture_of, build_tower


def describe(config: Config) -> dict[str, Any]:
    """Parameters of each part and the main sizes, as JSON-able values; built on the meta device.

    The vision tower is counted as it is used, without its final projection. The word embeddings of the new tokens
    are not counted: whether they need new rows depends on the tokenizer. Raises ValueError where the LLM's
    architecture is neither in `model.llm.config` nor to be had.
    """
    architecture = llm_architecture(config.model.llm)
    num_patches, vision_width = vision_dims(config.model.vision)
    with torch.device("meta"):
        tower = build_tower(architecture_of(config.model.vision))
        model = MLRMModel(mlrm_config(config, architecture, num_patches, vision_width))
    parameters = {
        "vision": count(tower),
        "connector": 0 if model.connector is None else count(model.connector),
        "llm": count(model.llm),
        "fusion": 0 if model.fusion is None else count(model.fusion),
        "projector": count(model.projector),
        "tau": model.tau.numel(),
    }
    method = get_method(config.model.method)
    qformer = None if model.connector is None else model.connector.qformer
    return {
        "method": config.model.method,
        "prompt": method.prompt,
        "losses": list(method.losses),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "shapes": {
            "L": num_patches,
            "h_v": vision_width,
            "L_c": config.model.connector.num_queries,
            "h_q": config.model.connector.hidden_size,
            "h_t": architecture.hidden_size,
            "llm_layers": architecture.num_hidden_layers,
            "embedding": config.model.projection_dim,
        },
        "qformer_parameters": 0 if qformer is None else count(qformer) - qformer.queries.numel(),  # as in Table 9
    }


def count(module: nn.Module) -> int:
    """Parameters of `module`; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())
