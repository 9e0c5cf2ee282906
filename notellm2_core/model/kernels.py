"""Fused kernels for the memory-bound parts of a decoder: norms, rotary positions, the gates of MLPs.

On a GPU these take more than a quarter of a forward's time when torch launches one kernel per operator (LLaMA-2's 7B in
bf16, 9,100 tokens, H200). The kernels are Liger's (Hsu et al. 2024), patched in by transformers. They need
`liger-kernel`, which the extra `gpu` installs, and a C compiler, which Triton needs to launch them. Without the two,
and on a CPU, the decoder is not changed.
"""

import logging
import os
import shutil
import sys
import warnings
from types import FunctionType
from typing import Any

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

# Of the decoders that Liger knows, those that a test compares with their own code (tests/.../test_kernels.py).
KINDS = {"llama", "mistral", "qwen2", "qwen3"}


def fuse_kernels(llm: PreTrainedModel, device: torch.device) -> bool:
    """Patch fused kernels into `llm`, which then works on `device` only. Returns whether that was possible."""
    config = llm.config
    if device.type != "cuda" or config.model_type not in KINDS or getattr(config, "hidden_act", "") != "silu":
        return False
    if lacking := _lacking():
        warnings.warn(f"without {lacking} this GPU computes more slowly than it can", stacklevel=2)
        return False
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it reports which of its kernels are for other devices
    code = vars(sys.modules[type(llm).__module__])
    before = dict(code)
    try:
        apply_liger_kernel(llm, {"fused_linear_cross_entropy": False})  # there is no head
    finally:
        # Liger also replaces names in transformers' module, for all models of the process, including those on a CPU.
        for name, old in before.items():
            if (new := code[name]) is not old:
                is_plain = isinstance(old, FunctionType) and old.__module__ != __name__
                code[name] = _by_device(new, old) if is_plain else old
    return True


def _lacking() -> str:
    if not is_liger_kernel_available():
        return "liger-kernel (pip install liger-kernel)"
    if not any(map(shutil.which, [os.environ.get("CC") or "cc", "gcc", "clang"])):
        return "a C compiler (gcc or clang)"
    return ""


def _by_device(fused: Any, plain: Any) -> Any:
    """The rotary positions of query and key: by `fused` on a GPU, by `plain` on a CPU."""

    def apply_rotary_pos_emb(query: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not query.is_cuda:
            return plain(query, *args, **options)
        with torch.cuda.device(query.device):  # else Liger launches on the current device
            return fused(query, *args, **options)

    return apply_rotary_pos_emb
