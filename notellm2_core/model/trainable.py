"""The trainable parts of the model: `training.trainable`, and `model.lora` for the LLM."""

from torch import nn

from notellm2_core.config.settings import Config
from notellm2_core.config.training import PARTS, Part
from notellm2_core.model.lora import add_adapters, is_adapter
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.vision.encoder import VisionEncoder


def parts_of(model: MLRMModel) -> dict[Part, list[tuple[str, nn.Parameter]]]:
    """All parameters, by part and with their names; a part that the method lacks is empty.

    "llm" is the decoder without its word embeddings, adapters included.
    """
    word_embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    parts: dict[Part, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    part_of_module: dict[str, Part] = {**{part: part for part in PARTS}, "tau": "temperature"}
    for name, parameter in model.named_parameters():
        part = "word_embeddings" if id(parameter) in word_embeddings else part_of_module[name.partition(".")[0]]
        parts[part].append((name, parameter))
    return parts


def set_trained(model: MLRMModel, config: Config, encoder: VisionEncoder | None = None) -> None:
    """Add the adapters of `model.lora`, and make the parts of `training.trainable`, and no others, require gradients.

    `encoder`: the vision encoder, if it is one of them.

    With adapters, the LLM's own weights are frozen. A frozen part keeps its initial values: the word embeddings of the
    new tokens then stay at the mean of the old ones, which marks an image or a compressed word as well as any vector.

    Raises ValueError if nothing is left to train, or the adapters name layers that the LLM lacks.
    """
    trained = config.trainable_parts
    adapted = config.model.lora is not None and "llm" in trained
    if config.model.lora is not None and adapted:
        add_adapters(model.llm, config.model.lora, config.seed)
    for part, parameters in parts_of(model).items():
        for name, parameter in parameters:
            parameter.requires_grad_(part in trained and (part != "llm" or not adapted or is_adapter(name)))
    if encoder is not None:
        encoder.requires_grad_(True)
        for weight in encoder.parameters():
            weight.data = weight.data.contiguous()  # DeepSpeed broadcasts the storage of a weight
    elif not any(p.requires_grad for p in model.parameters()):
        parts = [part for part, parameters in parts_of(model).items() if parameters]
        raise ValueError(
            f"training.trainable = {', '.join(trained)} leaves nothing to train with model.method = "
            f"{config.model.method}; name some of {', '.join(parts)}."
        )
