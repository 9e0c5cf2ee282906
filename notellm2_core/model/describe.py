"""The parameters, sizes and prompt layout of a configuration's model, without reading any weights."""

from typing import Any

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import torch
from torch import nn

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.config.unused import unused_settings
from notellm2_core.model.build import mlrm_config, num_visual_words
from notellm2_core.model.llm import llm_architecture, load_tokenizer
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.trainable import set_trained
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.notes.prompts import IMAGE_TOKEN, PROMPTS, VISUAL_WORD_TOKEN, name_of
from notellm2_core.vision.encoder import vision_architecture, vision_dims
from notellm2_core.vision.towers import build_tower, dropped_projection_parameters


def describe(config: Config) -> dict[str, Any]:
    """Parameters of each part, the main sizes and the prompt, as JSON-able values; built on the meta device.

    `vision` is the tower without its final projection, which the model does not use. Table 7's totals count the
    projection, so it is listed as a part of its own. `trainable` counts adapters (`model.lora`), `total` does not,
    because a saved model has them merged. The word embeddings of the new tokens are not counted: whether they need new
    rows depends on the tokenizer.

    Raises ValueError if the LLM's architecture is not in `model.llm.config` and cannot be loaded.
    """
    architecture = llm_architecture(config.model.llm)
    num_patches, vision_width = vision_dims(config.model.vision)
    method = get_method(config.model.method)
    with torch.device("meta"):
        vision = vision_architecture(config.model.vision)
        tower = build_tower(vision)
        model = MLRMModel(mlrm_config(config, architecture, num_patches, vision_width))
    parameters = {
        "vision": count(tower),
        "vision_projection": dropped_projection_parameters(vision),
        "connector": count(model.connector),
        "llm": count(model.llm),
        "fusion": count(model.fusion),
        "projector": count(model.projector),
        "tau": model.tau.numel(),
    }
    set_trained(model, config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    qformer = None if model.connector is None else model.connector.qformer
    return {
        "method": config.model.method,
        "switches": {"prompt": method.prompt, "visual_prompt": method.visual_prompt, "late_fusion": method.late_fusion,
                     "losses": list(method.losses), "inputs": list(method.inputs)},
        "parameters": {**parameters, "total": sum(parameters.values()), "trainable": trainable},
        "qformer_parameters": 0 if qformer is None else count(qformer) - qformer.queries.numel(),  # as in Table 9
        "shapes": {
            "L": num_patches,
            "h_v": vision_width,
            "L_c": num_visual_words(config.model.connector, num_patches) if method.visual_prompt else 0,
            "h_q": config.model.connector.hidden_size if qformer is not None else None,
            "h_t": model.projector.in_features,
            "llm_layers": architecture.num_hidden_layers,
            "embedding": config.model.projection_dim,
            "matryoshka": list(config.model.matryoshka_dims),
        },
        "prompt": prompt_layout(config, num_patches, vision_width),
        "unused_settings": unused_settings(config),
    }  # fmt: skip


def prompt_layout(config: Config, num_patches: int, vision_width: int) -> dict[str, Any]:
    """The tokens of a note without text, and the positions at which its representations are read.

    With `model.llm.config` no hub is asked for the tokenizer. If it is not on this machine either, the pieces are
    listed without their tokens.
    """
    method, num_words = get_method(config.model.method), num_visual_words(config.model.connector, num_patches)
    try:
        tokenizer = load_tokenizer(config.model.llm, local_only=config.model.llm.config is not None)
    except ValueError:
        if config.model.llm.config is None:
            raise
        names = [name_of(piece) for piece in PROMPTS[method.prompt]]
        pieces = [{"piece": n, "first": None, "tokens": num_words if n == IMAGE_TOKEN else None} for n in names]
        why = f"the tokenizer of {config.model.llm.name} is not on this machine"
        return {"tokens": None, "why": why, "pieces": pieces}
    processor = MLRMProcessor(tokenizer, config.text, method.prompt, num_words, num_patches, vision_width)
    layout = processor.layout()
    positions = {name: first for name, first, _ in layout}
    length = sum(num for *_, num in layout)
    return {
        "tokens": length,
        "pieces": [{"piece": name, "first": first, "tokens": num} for name, first, num in layout],
        "image": [positions[IMAGE_TOKEN], positions[IMAGE_TOKEN] + num_words] if IMAGE_TOKEN in positions else None,
        "n_v": positions[VISUAL_WORD_TOKEN] - 1 if VISUAL_WORD_TOKEN in positions else None,
        "n_m": length - 1,
    }


def count(module: nn.Module | None) -> int:
    """The number of parameters of `module`; a shared one counts once. 0 for None."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
