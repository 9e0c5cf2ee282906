"""The decoder LLM_mu and its tokenizer: from the hub, a folder, pip's SmolLM2, or tiny random weights for tests.

Nothing is unpickled (safetensors only) and no remote code runs.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import notellm2_core.torch_compat  # noqa: F401, before transformers

# isort: split
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from notellm2_core import config
from notellm2_core.lake import sha256_of
from notellm2_core.notes.text import PROMPTS
from notellm2_core.weights import PACKAGES, package_path

_DECODER_MODES = "a hub name, a folder with config.json, tokenizer and safetensors, 'package:smollm2' or 'tiny'"


def load_llm(settings: config.LLM, cache_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained decoder without LM head, cut to its first `num_layers` layers, in fp32, and its tokenizer.

    A packaged GGUF is converted to safetensors once, below `cache_dir`. Raises ValueError where the weights cannot be
    had, are incomplete, or have fewer layers than asked for.
    """
    tokenizer: PreTrainedTokenizerBase
    if settings.name == "tiny":
        tokenizer = tiny_tokenizer()
        architecture = _cut(_tiny_architecture(len(tokenizer)), settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            decoder = AutoModel.from_config(architecture, dtype=torch.float32, attn_implementation=settings.attention)
        return decoder, tokenizer
    source = str(_converted_package(settings.name, cache_dir)) if settings.name in PACKAGES else settings.name
    with _errors_of(settings.name), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        decoder, report = AutoModel.from_pretrained(
            source,
            config=_cut(AutoConfig.from_pretrained(source, trust_remote_code=False), settings),
            dtype=torch.float32,
            attn_implementation=settings.attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    require_complete(report, settings.name)
    return decoder, tokenizer


def llm_architecture(settings: config.LLM) -> PreTrainedConfig:
    """The decoder's architecture, cut to `num_layers`, without reading weights: from `settings.config` where given.

    Raises ValueError where it is not given and cannot be read.
    """
    if settings.config is not None:
        fields = dict(settings.config)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ValueError("model.llm.config has no model_type; name the architecture, for example llama.")
        with _errors_of(f"model.llm.config of type {model_type!r}"):
            return _cut(AutoConfig.for_model(model_type, **fields), settings)
    if settings.name == "tiny":
        return _cut(_tiny_architecture(len(tiny_tokenizer())), settings)
    with _errors_of(settings.name), _quiet():
        if settings.name in PACKAGES:
            gguf = package_path(settings.name)
            found = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        else:
            found = AutoConfig.from_pretrained(settings.name, trust_remote_code=False)
        return _cut(found, settings)


def load_tokenizer(settings: config.LLM, local_only: bool = False) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, without its weights. Raises ValueError where it cannot be had.

    local_only: a hub name is looked up in the cache of this machine, no server is asked.
    """
    if settings.name == "tiny":
        return tiny_tokenizer()
    with _errors_of(settings.name), _quiet():
        if settings.name in PACKAGES:
            gguf = package_path(settings.name)
            return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return AutoTokenizer.from_pretrained(settings.name, trust_remote_code=False, local_files_only=local_only)


def require_complete(report: dict[str, Any], source: str) -> None:
    """Raises ValueError if weights were missing or of another shape, so that nothing stays random in silence."""
    for problem in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report[problem])
        if keys:
            what = "no weights for" if problem == "missing_keys" else "weights of another shape for"
            raise ValueError(f"{source} has {what} {len(keys)} tensors, among them {keys[0]}; use a complete copy.")


def _converted_package(name: str, cache_dir: Path) -> Path:
    """The package's weights as a Hugging Face folder, made on the first call (about 20 s), whole or not at all."""
    gguf = package_path(name)
    target = cache_dir / f"{name.removeprefix('package:')}-{sha256_of(gguf)[:16]}"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process converts, the others wait for it; a kill releases it
        if target.exists():
            return target
        work = cache_dir / f".{target.name}.partial"
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        with _errors_of(name), _quiet():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            decoder = AutoModel.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain fp32 now, but transformers would not save what was once quantized.
        del decoder.config.quantization_config, decoder.hf_quantizer
        decoder.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.rename(target)
    return target


def _cut(architecture: PreTrainedConfig, settings: config.LLM) -> PreTrainedConfig:
    """The architecture with its first `num_layers` layers only. Raises ValueError if it is no plain decoder."""
    available = getattr(architecture, "num_hidden_layers", None)
    if available is None or architecture.is_encoder_decoder:
        raise ValueError(
            f"model.llm.name = {settings.name!r} is a {architecture.model_type}, not a decoder-only LLM; "
            "name a causal language model."
        )
    if settings.num_layers is None:
        return architecture
    if settings.num_layers > available:
        raise ValueError(
            f"model.llm.num_layers = {settings.num_layers}, but {settings.name} has {available}; ask for fewer."
        )
    architecture.num_hidden_layers = settings.num_layers
    if getattr(architecture, "layer_types", None) is not None:
        architecture.layer_types = architecture.layer_types[: settings.num_layers]
    return architecture


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
    """A byte-level BPE learned from the prompts alone: the prompts are short, and any Unicode text has tokens."""
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
def _errors_of(name: str) -> Iterator[None]:
    """Whatever transformers says about weights that cannot be had becomes one sentence."""
    try:
        yield
    except (OSError, ImportError, ValueError, KeyError, SafetensorError) as e:
        first_line = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ValueError(
            f"the LLM {name!r} cannot be loaded ({first_line}); set model.llm.name to {_DECODER_MODES}."
        ) from e


@contextmanager
def _quiet() -> Iterator[None]:
    """No table of unread weights: the LM head and the layers that were cut are unread on purpose."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
