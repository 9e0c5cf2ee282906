"""Attention over packed notes: each token attends to its own note alone.

It runs in flash attention's variable-length kernel (a GPU in 16 bits), or in torch's attention on groups of notes of
similar length (everywhere else). Only attention, the smallest part of the work on short notes, sees the shared prefix
before every note. Importing this module registers it with transformers as `PACKED_SDPA`.

Shapes: T tokens of the longest note, S tokens of all notes, R tokens in the row, H heads of width d_h.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from notellm2_core.model.packing import Packing

PACKED_SDPA = "packed_sdpa"
_SHORT = 160  # tokens, up to which _matrix_attention is the fastest


def _packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [1, H, R, d_h], fewer heads of key and value -> [1, R, H, d_h].

    Without a packing, it is torch's own on padded rows, masked by `attention_mask`. `options`: transformers' dropout,
    scaling, sliding_window and others.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [R, H, d_h] each
    if packing.spread is not None:
        q, k, v = (x.index_select(0, packing.spread) for x in (q, k, v))  # [S, H, d_h] each
    attended = _attended(module, q, k, v, packing, options)  # [S, H, d_h]
    if packing.first_copies is not None:
        attended = attended.index_select(0, packing.first_copies)
    return packing.with_empty(attended)[None], None


def _attended(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: dict[str, Any]
) -> Tensor:
    """Attention [S, H, d_h] of the tokens of all notes. Each sees the tokens of its own note, at most the last
    `sliding_window` of them.
    """
    dropout, scaling, window = (options.get(name) for name in ("dropout", "scaling", "sliding_window"))
    if not dropout and _has_kernel(q, v):
        # Causal, and no further back than the window.
        size, longest = ((window or 0) - 1, 0), packing.groups[-1].max_length
        out = varlen_attn(
            q, k, v, packing.ends, packing.ends, longest, longest, scale=scaling, window_size=size, enable_gqa=True
        )
        assert isinstance(out, Tensor)
        return out
    outputs = []
    for group in packing.groups:
        qs, ks, vs = (group.padded(x).transpose(1, 2) for x in (q, k, v))  # [n, H, T, d_h] each; padding comes last
        band = _band(group.max_length, window, q.device)
        if q.dtype == torch.bfloat16 and group.max_length <= _SHORT and not dropout:
            padded = _matrix_attention(qs, ks, vs, band, scaling)
        else:
            padded, _ = sdpa_attention_forward(module, qs, ks, vs, band, **options)
        outputs.append(group.packed(padded))
    return torch.cat(outputs)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention's variable-length kernel supports these heads on this device."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
    )


def _matrix_attention(query: Tensor, key: Tensor, value: Tensor, band: Tensor | None, scaling: float | None) -> Tensor:
    """Attention [n, T, H, d_h] of short notes by plain matrix products, with all scores in memory.

    On a CPU in bf16, torch's flash attention takes three times as long, forward and backward, for 100 tokens, and the
    same time for 200 (16 notes of 9 heads, two cores).
    """
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if band is None:
        band = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[3] ** -0.5)
    weights = scores.masked_fill(~band, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, T, T] of a window that is shorter than the notes; None: torch's own causal mask."""
    if window is None or window >= length:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return ((distance >= 0) & (distance < window))[None, None]


def _mask(attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask of padded rows; packed notes, which come without an `attention_mask`, need none."""
    packed = attention_mask is None and not options["allow_is_causal_skip"]  # transformers infers it from the positions
    return None if packed else sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
