"""Packing: the tokens of all notes in one row without padding, in which each attends to its own note alone.

Every matrix product then sees real tokens only. (On a CPU in 16 bits the row ends in up to 63 empty positions, so that
rows have few different lengths.) Attention runs in flash attention's variable-length kernel (a GPU in 16 bits), or in
torch's attention on groups of notes of similar length (everywhere else).

The prefix that all prompts share can be in the row once, because no token depends on later ones. Only attention, the
smallest part of the work on short notes, sees it before every note.

Shapes: N notes, T tokens of the longest, S tokens of all of them, R tokens in the row (without empty positions),
H heads of width d_h.
"""

import inspect
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
_PROBE = "packing_probe"
_KINDS = {"full_attention", "sliding_attention"}
_SHORT = 160  # tokens, up to which _matrix_attention is the fastest
_MAX_PADDING, _MAX_RATIO = 8, 1.25  # tokens, or times, by which the longest note of a group may exceed the shortest
_STEP = 64  # tokens; row lengths are its multiples: oneDNN prepares, and caches, its kernels per shape


@dataclass(frozen=True)
class Group:
    """Consecutive notes of the row, of similar length."""

    first: int  # the first of their tokens in the row
    last: int  # the token after their last one
    padded_index: Tensor  # [last - first] of each token in these notes, padded at their ends: note * T + position
    num_notes: int
    max_length: int  # T, of the longest of them

    def padded(self, row: Tensor) -> Tensor:
        """The whole row [S, ...] -> these notes [num_notes, T, ...], zeros after their ends."""
        empty = row.new_zeros(self.num_notes * self.max_length, *row.shape[1:])
        filled = empty.index_copy(0, self.padded_index, row[self.first : self.last])
        return filled.unflatten(0, (self.num_notes, self.max_length))

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse for these notes: [num_notes, T, ...] -> [last - first, ...]."""
        return padded.flatten(0, 1).index_select(0, self.padded_index)


@dataclass(frozen=True)
class Packing:
    """The positions of the tokens of N notes in their one row. The shortest note comes first."""

    index: Tensor  # [R] of each token in the padded notes: note * T + position
    positions: Tensor  # [R] of each token in its note
    ends: Tensor  # [N + 1] int32: 0, and where each note ends among the S tokens
    groups: tuple[Group, ...]
    spread: Tensor | None  # [S] where each token of all notes is in the row; None: the row has every token
    first_copies: Tensor | None  # [R] where each token of the row is first among the tokens of all notes
    num_empty: int = 0  # positions after the R, of no note

    @classmethod
    def of(cls, attention_mask: Tensor, num_shared: int = 0) -> "Packing":
        """The packing of notes with this `attention_mask` [N, T]: 0 on padding, which may be on either side.

        `num_shared`: length of the prefix that all notes share.
        """
        num_notes, width = attention_mask.shape
        lengths, order = attention_mask.sum(1).sort(stable=True)  # [N]
        real = attention_mask[order].bool()
        positions = (attention_mask[order].cumsum(1) - 1)[real]
        index = (order[:, None] * width + torch.arange(width, device=real.device))[real]
        ends = functional.pad(lengths.cumsum(0), (1, 0))
        groups = _groups(lengths.tolist(), positions)
        assert num_notes == sum(group.num_notes for group in groups)
        if not num_shared:
            return cls(index, positions, ends.to(torch.int32), groups, None, None)
        own = positions >= num_shared
        own[: lengths[0]] = True  # the first note has the prefix for all
        spread = torch.where(own, own.cumsum(0) - 1, positions)
        first_copies = own.nonzero()[:, 0]
        return cls(index[first_copies], positions[first_copies], ends.to(torch.int32), groups, spread, first_copies)

    def with_empty(self, row: Tensor) -> Tensor:
        """[R, ...] -> [R + num_empty, ...], zeros in the empty positions."""
        return torch.cat([row, row.new_zeros(self.num_empty, *row.shape[1:])]) if self.num_empty else row

    def rows(self, positions: Tensor, width: int) -> Tensor:
        """[N n] positions in the row of the tokens at `positions` [N, n] of the padded notes, `width` tokens each."""
        row = self.index.new_zeros(len(positions) * width)
        row[self.index] = torch.arange(len(self.index), device=row.device)
        first = torch.arange(len(positions), device=row.device)[:, None] * width
        return row[(first + positions).flatten()]


@contextmanager
def _last_mlp_on(llm: PreTrainedModel, rows: Tensor | None, num_rows: int) -> Iterator[None]:
    """Inside, the last layer's MLP runs on `rows` alone, out of `num_rows`, because its other outputs are unused.

    The MLP is most of a layer's work. Does nothing for None, and for decoders with other module names.
    """
    layers = getattr(llm, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
    if rows is None or mlp is None:
        yield
        return

    def before(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].index_select(1, rows), *inputs[1:]

    def after(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)  # such as a mixture's router logits
        states = states.new_zeros(1, num_rows, states.shape[-1]).index_copy(1, rows, states)
        return (states, *others) if isinstance(output, tuple) else states

    hooks = [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _groups(lengths: Sequence[int], positions: Tensor) -> tuple[Group, ...]:
    """Notes, sorted by length, cut into groups in which none is padded by much."""
    groups = []
    start = first = 0
    while start < len(lengths):
        longest = max(lengths[start] + _MAX_PADDING, int(lengths[start] * _MAX_RATIO))
        end = bisect_right(lengths, longest, start)
        last = first + sum(lengths[start:end])
        notes = torch.tensor(lengths[start:end], device=positions.device)
        note = torch.arange(end - start, device=positions.device).repeat_interleave(notes)
        padded_index = note * lengths[end - 1] + positions[first:last]
        groups.append(Group(first, last, padded_index, end - start, lengths[end - 1]))
        start, first = end, last
    return tuple(groups)


def can_be_packed(llm: PreTrainedModel) -> bool:
    """Whether the notes of a batch can share a row in `llm`.

    They can if tokens see each other by attention alone (no recurrence, no convolution), see earlier tokens alone
    (causal), and use torch's sdpa, which `PACKED_SDPA` can replace; and if the layers pass the packing on to it.
    """
    layers = set(getattr(llm.config, "layer_types", None) or ())
    parameters = inspect.signature(llm.forward).parameters
    return (
        llm.config._attn_implementation == "sdpa"
        and llm._supports_attention_backend
        and layers <= _KINDS
        and {"position_ids", "kwargs"} <= set(parameters)
        and all(getattr(module, "is_causal", True) for module in llm.modules())
        and _passes_packing_on(llm)
    )


class _FirstAttention(Exception):
    """Ends the probe's forward."""

    def __init__(self, has_packing: bool) -> None:
        self.has_packing = has_packing


def _passes_packing_on(llm: PreTrainedModel) -> bool:
    """Whether the forward passes its argument `packing` on to the attention function. `llm` has sdpa.

    A probe sends one token through the decoder, up to its first attention, with zeros that take no memory in place of
    the weights. It costs about as much as one layer, on the CPU, also for a decoder without weights (on the meta
    device).
    """
    llm.set_attn_implementation(_PROBE)
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws random numbers
            tensors = chain(llm.named_parameters(), llm.named_buffers())
            zeros = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors}
            token = torch.zeros(1, 1, dtype=torch.int64)
            packing = Packing.of(torch.ones_like(token))
            functional_call(llm, zeros, kwargs={"input_ids": token, "use_cache": False, "packing": packing})
    except _FirstAttention as reached:
        return reached.has_packing
    finally:
        llm.set_attn_implementation("sdpa")
    return False


def _probe(*_: Any, packing: Packing | None = None, **options: Any) -> NoReturn:
    """The attention function during the probe."""
    raise _FirstAttention(packing is not None)


def packed_states(
    llm: PreTrainedModel,
    words: Tensor,
    attention_mask: Tensor,
    num_shared: int = 0,
    needed_positions: Tensor | None = None,
) -> Tensor:
    """The last hidden states [N, T, h_t] of the word embeddings `words` [N, T, h_t].

    Zero on padding and, for every note but the shortest, on the shared prefix.

    Args:
        llm: a decoder that can be packed (`can_be_packed`), with the attention `PACKED_SDPA`.
        attention_mask: [N, T], 0 on padding.
        num_shared: length of the prefix that all notes share.
        needed_positions: [N, n] positions whose states are needed; without a gradient the others are undefined.
            None: all.
    """
    assert llm.config._attn_implementation == PACKED_SDPA, "without it, notes would attend to each other"
    packing = Packing.of(attention_mask, num_shared)
    if _uses_onednn(words):
        packing = replace(packing, num_empty=-len(packing.index) % _STEP)
    row = packing.with_empty(words.flatten(0, 1).index_select(0, packing.index))
    positions = packing.with_empty(packing.positions)[None]
    rows = None
    if needed_positions is not None and not torch.is_grad_enabled():
        rows = packing.rows(needed_positions, words.shape[1])
    with _last_mlp_on(llm, rows, len(row)):
        states = llm(inputs_embeds=row[None], position_ids=positions, use_cache=False, packing=packing)
    last = states.last_hidden_state[0, : len(packing.index)]  # [R, h_t]
    padded = last.new_zeros(words.shape[0] * words.shape[1], last.shape[1])
    return padded.index_copy(0, packing.index, last).unflatten(0, words.shape[:2])


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


def _uses_onednn(x: Tensor) -> bool:
    """Whether oneDNN computes the matrix products of `x`: on a CPU, in 16 bits."""
    in_16_bits = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and in_16_bits


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
AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
