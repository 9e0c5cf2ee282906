"""No work on padding: the tokens of all notes in one row, in which each attends to its own note alone.

Every matrix product then sees real tokens only. Attention, a small part of the work at the length of notes, runs in
flash-attention's kernels for rows of notes (a GPU in 16 bits), or in torch's on padded heads (everywhere else).

Shapes: N notes, T tokens of the longest, S tokens of all of them, H heads of width d_h.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
_PACKED = {"sdpa": PACKED_SDPA, "flash_attention_2": "flash_attention_2"}  # attention -> its name for packed notes
_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Packing:
    """Where the tokens of N notes are in their one row."""

    lengths: Tensor  # [N]
    positions: Tensor  # [S] of each token in its note
    places: Tensor  # [S] in the notes padded at their end: note * T + position
    max_length: int  # T

    @classmethod
    def of(cls, attention_mask: Tensor) -> "Packing":
        """`attention_mask`: [N, T], 0 on padding, which may be on either side."""
        num_notes, max_length = attention_mask.shape
        real = attention_mask.bool()
        positions = (attention_mask.cumsum(1) - 1)[real]
        first = torch.arange(num_notes, device=real.device)[:, None] * max_length  # [N, 1]
        places = positions + first.expand(-1, max_length)[real]
        return cls(attention_mask.sum(1), positions, places, max_length)

    def ends(self) -> Tensor:
        """[N + 1] int32: 0, and where each note ends in the row."""
        return functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    def padded(self, packed: Tensor) -> Tensor:
        """[S, ...] -> [N, T, ...], zeros after the end of a note."""
        num_notes = len(self.lengths)
        rows = packed.new_zeros(num_notes * self.max_length, *packed.shape[1:])
        return rows.index_copy(0, self.places, packed).unflatten(0, (num_notes, self.max_length))

    def packed(self, padded: Tensor) -> Tensor:
        """[N, T, ...] -> [S, ...], the inverse."""
        return padded.flatten(0, 1).index_select(0, self.places)


def packed_attention(llm: PreTrainedModel, attention: str) -> str | None:
    """What this attention of `llm` is called where notes are packed; None: it has to be given padded notes.

    A decoder can be packed where nothing but attention passes from token to token (no recurrence, no convolution), and
    attention is an interchangeable function of it.
    """
    layers = set(getattr(llm.config, "layer_types", None) or ())
    takes = inspect.signature(llm.forward).parameters
    packs = llm._supports_attention_backend and layers <= _KINDS and "position_ids" in takes and "kwargs" in takes
    return _PACKED.get(attention) if packs else None


def packed_states(llm: PreTrainedModel, words: Tensor, attention_mask: Tensor) -> Tensor:
    """The last hidden states [N, T, h_t] of word embeddings [N, T, h_t]; zeros on padding."""
    packing = Packing.of(attention_mask)
    if llm.config._attn_implementation == PACKED_SDPA:
        how: dict[str, Any] = {"packing": packing}
    else:  # as transformers' flash attention takes it
        ends, longest = packing.ends(), packing.max_length
        how = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    real = attention_mask.bool()
    packed = llm(inputs_embeds=words[real][None], position_ids=packing.positions[None], use_cache=False, **how)
    states = packed.last_hidden_state[0]  # [S, h_t]
    return states.new_zeros(*real.shape, states.shape[-1]).masked_scatter(real[:, :, None], states)


def _packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [1, H, S, d_h], fewer heads of key and value -> [1, S, H, d_h].

    Without a packing, it is torch's own for rows of one length, padded where `attention_mask` says so.
    """
    options |= {"dropout": dropout, "scaling": scaling}
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, d_h] each
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        # Causal, and of the own note no more than the window.
        window = ((sliding_window or 0) - 1, 0)
        ends, longest = packing.ends(), packing.max_length
        out = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=True
        )  # [S, H, d_h]
        assert isinstance(out, Tensor)
        return out[None], None
    places = torch.arange(packing.max_length, device=query.device)
    band = None  # torch's own causal mask
    if sliding_window is not None and sliding_window < packing.max_length:
        distance = places[:, None] - places
        band = ((distance >= 0) & (distance < sliding_window))[None, None]  # [1, 1, T, T]
    q, k, v = (packing.padded(x).transpose(1, 2) for x in (q, k, v))  # [N, H, T, d_h] each; padding comes last
    out, _ = sdpa_attention_forward(module, q, k, v, band, **options)
    return packing.packed(out)[None], None  # [1, S, H, d_h]


def _mask(attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """That of padded rows; packed notes, which come without an `attention_mask`, need none."""
    packed = attention_mask is None and not options["allow_is_causal_skip"]  # what their positions have told
    return None if packed else sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
