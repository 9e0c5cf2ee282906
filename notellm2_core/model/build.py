"""Builds a model and its processor: new ones from a configuration, trained ones from a folder."""

from pathlib import Path

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers
from notellm2_core.schema import VISION_FOLDER

# isort: split
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from notellm2_core.config.methods import get_method
from notellm2_core.config.model import ConnectorSettings
from notellm2_core.config.settings import Config
from notellm2_core.model.llm import load_llm, load_tokenizer
from notellm2_core.model.mlrm import MLRMConfig, MLRMModel
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.vision.encoder import VisionEncoder, saved_encoder_id, vision_dims


def build_model(config: Config, cache_dir: Path) -> tuple[MLRMModel, MLRMProcessor]:
    """The pretrained LLM with new modules around it, random but the same for the same configuration and seed.

    fp32, on the CPU. `cache_dir`: folder for converted LLM weights. Raises ValueError if the LLM cannot be loaded.
    """
    decoder, tokenizer = load_llm(config.model.llm, cache_dir)
    require_its_tokenizer(decoder, tokenizer, config.model.llm.name)
    num_old_tokens = len(tokenizer)
    processor = build_processor(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        add_word_embeddings(decoder, processor.note_tokenizer.new_token_ids, num_old_tokens)
        model = MLRMModel(mlrm_config(config, decoder.config, processor.num_patches, processor.vision_width), decoder)
    return model.eval(), processor


def build_processor(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> MLRMProcessor:
    """The processor for the model of `config`. `tokenizer`: the LLM's; None: it is loaded, without the LLM's weights.

    Raises ValueError if the tokenizer cannot be loaded.
    """
    num_patches, vision_width = vision_dims(config.model.vision)
    return MLRMProcessor(
        load_tokenizer(config.model.llm) if tokenizer is None else tokenizer,
        config.text,
        get_method(config.model.method).prompt,
        num_visual_words(config.model.connector, num_patches),
        num_patches,
        vision_width,
    )


def num_visual_words(connector: ConnectorSettings, num_patches: int) -> int:
    """L_c: the Q-Former's queries; for the other connectors, the patches."""
    return connector.num_queries if connector.kind == "qformer" else num_patches


def load_model(folder: Path) -> tuple[MLRMModel, MLRMProcessor]:
    """Load the model and the processor that `save_pretrained` wrote into `folder`, in fp32, on the CPU.

    Raises ValueError if it is incomplete or damaged, or if `vision/` in it is another encoder than the model's.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no model (no config.json); give the folder of a trained model.")
    try:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind != MLRMConfig.model_type:
            raise ValueError(f"{folder} holds a {kind}, not a trained model of this project; give the folder of one.")
        model = MLRMModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, SafetensorError, TypeError, KeyError) as e:  # the last two: invalid settings
        raise ValueError(f"the model in {folder} cannot be read: {e}") from e
    if model.config.encoder_id:  # a bare save_pretrained names none
        require_its_encoder(model.config, saved_encoder_id(folder / VISION_FOLDER))
    processor = MLRMProcessor.from_pretrained(folder)
    require_its_processor(model.config, processor)
    return model.eval(), processor


def load_encoder(folder: Path) -> VisionEncoder:
    """The vision encoder of the model in `folder`.

    Raises ValueError if it is missing or damaged, or not the one that the model was trained with.
    """
    encoder = VisionEncoder.from_pretrained(folder / VISION_FOLDER)
    require_its_encoder(MLRMConfig.from_pretrained(folder), encoder.encoder_id)
    return encoder


def require_its_encoder(config: PreTrainedConfig, encoder_id: str) -> None:
    """Raises ValueError if the model was trained with another vision encoder than `encoder_id`."""
    assert isinstance(config, MLRMConfig)
    if config.encoder_id != encoder_id:
        trained = config.encoder_id or "one that its config.json does not name (encoder_id)"
        raise ValueError(
            f"the model was trained with vision encoder {trained}, and this one is {encoder_id}: use the model's own "
            "encoder, saved as vision/ in its folder, or features of it."
        )


def require_its_processor(config: PreTrainedConfig, processor: MLRMProcessor) -> None:
    """Raises ValueError if `processor` makes batches of another layout than the model reads."""
    assert isinstance(config, MLRMConfig)
    connector, vision_width = config.connector_settings()
    reads = {
        "prompt": get_method(config.method).prompt,
        "num_queries": num_visual_words(connector, config.num_patches),
        "num_patches": config.num_patches,
        "vision_width": vision_width,
    }
    for name, value in reads.items():
        if getattr(processor, name) != value:
            raise ValueError(
                f"the processor has {name} = {getattr(processor, name)!r}, the model reads {value!r}: use the one that "
                "was saved with the model."
            )


def require_its_tokenizer(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ValueError if words of the tokenizer have no embedding. Tokens that were added to it may have none."""
    num_rows = len(_word_embeddings(decoder))
    if tokenizer.vocab_size > num_rows:
        raise ValueError(
            f"the tokenizer of {name} has {tokenizer.vocab_size} words, its table of embeddings {num_rows}; use the "
            "model's own tokenizer."
        )


@torch.no_grad()
def add_word_embeddings(decoder: PreTrainedModel, token_ids: list[int], num_old_tokens: int) -> None:
    """Initialise the word embeddings of new tokens as the mean of the old ones.

    The table grows only if the ids do not fit (Qwen's has spare rows already, and keeps them), and all rows that it
    gains belong to new tokens. Tokens that the tokenizer had before (ids below `num_old_tokens`) keep their row.
    """
    new = [i for i in token_ids if i >= num_old_tokens]
    num_rows = len(_word_embeddings(decoder))
    mean = _word_embeddings(decoder)[:num_old_tokens].mean(0)
    if new and max(new) >= num_rows:
        decoder.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    _word_embeddings(decoder)[num_rows:] = mean
    _word_embeddings(decoder)[new] = mean


def _word_embeddings(decoder: PreTrainedModel) -> Tensor:
    embeddings = decoder.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.weight


def mlrm_config(config: Config, llm: PreTrainedConfig, num_patches: int, vision_width: int) -> MLRMConfig:
    """The model's config, from ours and the decoder's."""
    private = ("_name_or_path", "transformers_version")  # the source of the LLM is not part of the model
    return MLRMConfig(
        llm={key: value for key, value in llm.to_dict().items() if key not in private},
        connector=config.model.connector.model_dump() | {"vision_width": vision_width},
        num_patches=num_patches,
        method=config.model.method,
        projection_dim=config.model.projection_dim,
        matryoshka_dims=list(config.model.matryoshka_dims),
        temperature=config.model.temperature,
        attention=config.model.llm.attention,
    )
