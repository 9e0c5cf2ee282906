"""The decoder LLM_mu and its tokenizer: from the hub, a folder, pip's SmolLM2, or tiny random weights for tests.

Nothing is unpickled (safetensors only) and no remote code runs.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers
from notellm2_core.runtime.files import new_folder, sha256_of

# isort: split
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from notellm2_core.config.model import LLMSettings
from notellm2_core.notes.prompts import PROMPTS
from notellm2_core.runtime.packaged_weights import PACKAGES, package_path
from notellm2_core.runtime.pretrained import one_line, quiet, require_complete

_DECODER_MODES = (
    "a hub name, a folder with config.json, tokenizer and safetensors, a GGUF file, 'package:smollm2' or 'tiny'"
)
# The class attribute of transformers that says whether a decoder has this attention; all have eager.
_HAS_ATTENTION = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}


def load_llm(settings: LLMSettings, cache_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained decoder without LM head, cut to its first `num_layers` layers, in fp32, and its tokenizer.

    A GGUF is converted to safetensors once, below `cache_dir`. From a vision-language model, the text decoder is taken.
    Raises ValueError if the weights cannot be loaded, are incomplete, or have fewer layers than requested.
    """
    tokenizer: PreTrainedTokenizerBase
    if settings.name == "tiny":
        tokenizer = tiny_tokenizer()
        architecture = _decoder_part(_tiny_architecture(len(tokenizer)), settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            decoder = AutoModel.from_config(architecture, dtype=torch.float32, attn_implementation=settings.attention)
        return decoder, tokenizer
    gguf = _gguf(settings.name)
    source = settings.name if gguf is None else str(_converted(gguf, settings.name, cache_dir))
    with _errors_of(settings.name), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
    part = _decoder_part(whole, settings)
    with _errors_of(settings.name), quiet():
        model, report = AutoModel.from_pretrained(
            source,
            config=whole,
            dtype=torch.float32,
            attn_implementation=settings.attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed in the report
        )
    require_complete(report, settings.name)
    decoder = model if part is whole else model.get_decoder()
    if MODEL_MAPPING[type(decoder.config)] is not type(decoder):
        raise ValueError(f"the text decoder of {settings.name}, a {whole.model_type}, cannot be used without the rest.")
    return decoder, tokenizer


def llm_architecture(settings: LLMSettings) -> PreTrainedConfig:
    """The decoder's architecture, cut to `num_layers`, without reading weights; from `settings.config` if given.

    Raises ValueError if it is invalid or cannot be read.
    """
    if settings.config is not None:
        fields = dict(settings.config)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ValueError("model.llm.config has no model_type; name the architecture, for example llama.")
        with _errors_of(f"model.llm.config of type {model_type!r}", "correct model.llm.config"):
            architecture = AutoConfig.for_model(model_type, **fields)
            if unknown := [name for name in fields if not hasattr(AutoConfig.for_model(model_type), name)]:
                raise ValueError(f"a {model_type} has no setting {unknown[0]!r}")
        return _decoder_part(architecture, settings)
    if settings.name == "tiny":
        return _decoder_part(_tiny_architecture(len(tiny_tokenizer())), settings)
    gguf = _gguf(settings.name)
    with _errors_of(settings.name), quiet():
        if gguf is None:
            architecture = AutoConfig.from_pretrained(settings.name, trust_remote_code=False)
        else:
            architecture = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return _decoder_part(architecture, settings)


def load_tokenizer(settings: LLMSettings, local_only: bool = False) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, without the LLM's weights. Raises ValueError if it cannot be loaded.

    local_only: a hub name is looked up in this machine's cache only.
    """
    if settings.name == "tiny":
        return tiny_tokenizer()
    gguf = _gguf(settings.name)
    with _errors_of(settings.name), quiet():
        if gguf is not None:
            return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return AutoTokenizer.from_pretrained(settings.name, trust_remote_code=False, local_files_only=local_only)


def _gguf(name: str) -> Path | None:
    """The GGUF file `name`, or that of the package `name`; None for other names. Raises ValueError if it is missing."""
    if name.startswith("package:") and (name not in PACKAGES or not PACKAGES[name].path.endswith(".gguf")):
        raise ValueError(f"{name} is no package with an LLM; set model.llm.name to {_DECODER_MODES}.")
    path = package_path(name) if name in PACKAGES else Path(name)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ValueError(f"there is no file {path}; set model.llm.name to {_DECODER_MODES}.")
    return path


def _converted(gguf: Path, name: str, cache_dir: Path) -> Path:
    """The GGUF's weights as a Hugging Face folder, converted on the first call (about 20 s), whole or not at all."""
    target = cache_dir / f"{gguf.stem}-{sha256_of(gguf)[:16]}"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process converts, the others wait; a kill releases the lock
        if target.exists():
            return target
        with _errors_of(name), quiet():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            decoder, report = AutoModel.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
        require_complete(report, name)
        # The weights are fp32 now, but transformers refuses to save a model that was quantized.
        del decoder.config.quantization_config, decoder.hf_quantizer
        with new_folder(target) as draft:
            decoder.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    return target


def _decoder_part(whole: PreTrainedConfig, settings: LLMSettings) -> PreTrainedConfig:
    """The part of `whole` that describes the text decoder (usually all of it), cut in place to `num_layers` layers.

    Raises ValueError if it is no causal decoder, has fewer layers, or lacks the attention of `settings`.
    """
    kind = type(whole)
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_bidirectional = kind in MODEL_FOR_MASKED_LM_MAPPING  # BERT and similar ones, which transformers lists as causal
    decoder = whole.get_text_config(decoder=True)
    if whole.is_encoder_decoder or decoder.is_encoder_decoder or not generates or is_bidirectional:
        raise ValueError(
            f"model.llm.name = {settings.name!r} is a {whole.model_type}, not a decoder-only LLM; "
            "name a causal language model."
        )
    support = _HAS_ATTENTION.get(settings.attention)
    if support and not getattr(MODEL_MAPPING[type(decoder)], support):
        raise ValueError(
            f"{settings.name} is a {decoder.model_type}, which has no {settings.attention} attention; set "
            "model.llm.attention to eager."
        )
    if settings.num_layers is None:
        return decoder
    available = decoder.num_hidden_layers
    if settings.num_layers > available:
        raise ValueError(
            f"model.llm.num_layers = {settings.num_layers}, but {settings.name} has {available}; lower it."
        )
    decoder.num_hidden_layers = settings.num_layers
    kinds = getattr(decoder, "layer_types", None)
    if kinds is not None and len(kinds) > settings.num_layers:  # if it is not derived from num_hidden_layers
        decoder.layer_types = kinds[: settings.num_layers]
    return decoder


def _tiny_architecture(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the prompts alone: prompts have few tokens, and any Unicode text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    literals = [piece for prompt in PROMPTS.values() for piece in prompt if isinstance(piece, str)]
    tokenizer.train_from_iterator(literals, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@contextmanager
def _errors_of(name: str, remedy: str = f"set model.llm.name to {_DECODER_MODES}") -> Iterator[None]:
    """Turn transformers' errors about a model that cannot be loaded into a ValueError of one sentence."""
    try:
        yield
    except (OSError, ImportError, ValueError, KeyError, SafetensorError, StrictDataclassError) as e:
        missing = name.startswith(("/", ".", "~")) and not Path(name).exists()
        reason = "there is no such folder" if missing else one_line(e)
        raise ValueError(f"the LLM {name!r} cannot be loaded ({reason[:300]}); {remedy}.") from e
