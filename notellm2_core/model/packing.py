"""No work on padding: the tokens of all notes in one row, in which each attends to its own note alone.

Every matrix product then sees real tokens only. (On a CPU in 16 bits the row ends in up to 63 empty places, so that
rows have few lengths.) Attention runs in flash attention's kernel for rows of notes (a GPU in 16 bits), or in torch's
on groups of notes of similar length (everywhere else).

The prefix that all prompts share can be in the row once, because no token depends on later ones. Attention alone, the
smallest part of the work on short notes, sees it in front of every note.

Shapes: N notes, T tokens of the longest, S tokens of all of them, R tokens in the row (without empty places),
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
_SHORT = 160  # tokens, up to which _by_products is the fastest
_LITTLE, _MUCH = 8, 1.25  # tokens, or times, by which a note may be shorter than the longest of its group
_STEP = 64  # tokens; rows of few lengths: oneDNN prepares its products for each anew, and keeps them in memory


@dataclass(frozen=True)
class Group:
    """Notes of similar length that follow each other in the row."""

    first: int  # of their tokens in the row
    last: int  # the one after
    places: Tensor  # [last - first] in these notes padded at their end: note * T + position
    num_notes: int
    max_length: int  # T, of the longest of them

    def padded(self, row: Tensor) -> Tensor:
        """[S, ...] of the row -> [num_notes, T, ...] of these notes, zeros after their ends."""
        empty = row.new_zeros(self.num_notes * self.max_length, *row.shape[1:])
        filled = empty.index_copy(0, self.places, row[self.first : self.last])
        return filled.unflatten(0, (self.num_notes, self.max_length))

    def packed(self, padded: Tensor) -> Tensor:
        """[num_notes, T, ...] -> [last - first, ...], the inverse."""
        return padded.flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of N notes are in their one row. The shortest note comes first."""

    index: Tensor  # [R] of each token in the padded notes: note * T + position
    positions: Tensor  # [R] of each token in its note
    ends: Tensor  # [N + 1] int32: 0, and where each note ends among the S tokens
    groups: tuple[Group, ...]
    spread: Tensor | None  # [S] where each token of all notes is in the row; None: the row has every token
    first_copies: Tensor | None  # [R] where each token of the row comes first among the tokens of all notes
    num_empty: int = 0  # places after the R, of no note

    @classmethod
    def of(cls, attention_mask: Tensor, num_shared: int = 0) -> "Packing":
        """`attention_mask`: [N, T], 0 on padding, which may be on either side. `num_shared`: length of the prefix that
        all notes share.
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
        """[R, ...] -> [R + num_empty, ...], zeros in the empty places."""
        return torch.cat([row, row.new_zeros(self.num_empty, *row.shape[1:])]) if self.num_empty else row

    def rows(self, places: Tensor, width: int) -> Tensor:
        """[N n] where in the row the tokens at `places` [N, n] of the padded notes, `width` tokens each, are."""
        row = self.index.new_zeros(len(places) * width)
        row[self.index] = torch.arange(len(self.index), device=row.device)
        first = torch.arange(len(places), device=row.device)[:, None] * width
        return row[(first + places).flatten()]


@contextmanager
def _last_mlp_on(llm: PreTrainedModel, rows: Tensor | None, num_rows: int) -> Iterator[None]:
    """Inside, the last layer's MLP is computed on these of `num_rows` rows alone, because its other outputs are unused.

    The MLP is most of a layer's work. Does nothing for None, and for decoders that name their parts otherwise.
    """
    layers = getattr(llm, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
    if rows is None or mlp is None:
        yield
        return

    def before(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].index_select(1, rows), *inputs[1:]

    def after(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)  # the tokens' experts, say
        states = states.new_zeros(1, num_rows, states.shape[-1]).index_copy(1, rows, states)
        return (states, *others) if isinstance(output, tuple) else states

    hooks = [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _groups(lengths: Sequence[int], positions: Tensor) -> tuple[Group, ...]:
    """Notes in the order of their lengths, cut so that none is padded by much."""
    groups = []
    start = first = 0
    while start < len(lengths):
        longest = max(lengths[start] + _LITTLE, int(lengths[start] * _MUCH))
        end = bisect_right(lengths, longest, start)
        last = first + sum(lengths[start:end])
        notes = torch.tensor(lengths[start:end], device=positions.device)
        note = torch.arange(end - start, device=positions.device).repeat_interleave(notes)
        places = note * lengths[end - 1] + positions[first:last]
        groups.append(Group(first, last, places, end - start, lengths[end - 1]))
        start, first = end, last
    return tuple(groups)


def can_be_packed(llm: PreTrainedModel) -> bool:
    """Whether the notes of a batch can share a row in `llm`.

    They can where only attention passes from token to token (no recurrence, no convolution), only to later tokens, and
    in torch's sdpa, which transformers exchanges for `PACKED_SDPA`; and where the layers hand the packing on to it.
    """
    layers = set(getattr(llm.config, "layer_types", None) or ())
    parameters = inspect.signature(llm.forward).parameters
    return (
        llm.config._attn_implementation == "sdpa"
        and llm._supports_attention_backend
        and layers <= _KINDS
        and {"position_ids", "kwargs"} <= set(parameters)
        and all(getattr(module, "is_causal", True) for module in llm.modules())
        and _hands_packing_on(llm)
    )


class _FirstAttention(Exception):
    """Ends the probe's forward."""

    def __init__(self, has_packing: bool) -> None:
        self.has_packing = has_packing


def _hands_packing_on(llm: PreTrainedModel) -> bool:
    """Whether the argument `packing` of the forward reaches the attention function. `llm` has sdpa.

    One token is sent through the decoder, up to its first attention. In place of the weights there are zeros that take
    no memory. So the probe costs about as much as one layer, on the CPU, also for a decoder that has no weights yet
    (on the meta device).
    """
    llm.set_attn_implementation(_PROBE)
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):  # (dropout draws)
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
    """Takes the place of the attention function."""
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
    if _multiplied_by_onednn(words):
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
    """Attention of transformers' interface: query [1, H, R, d_h], fewer heads of key and value -> [1, R, H, d_h].

    Without a packing, it is torch's own for rows of one length, padded where `attention_mask` says so.
    `options`: transformers' dropout, scaling, sliding_window and others.
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
    """[S, H, d_h] of the tokens of all notes, each of which sees its own note alone, and of it no more than a window
    of `sliding_window` tokens.
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
    parts = []
    for group in packing.groups:
        qs, ks, vs = (group.padded(x).transpose(1, 2) for x in (q, k, v))  # [n, H, T, d_h] each; padding comes last
        band = _band(group.max_length, window, q.device)
        if q.dtype == torch.bfloat16 and group.max_length <= _SHORT and not dropout:
            padded = _by_products(qs, ks, vs, band, scaling)
        else:
            padded, _ = sdpa_attention_forward(module, qs, ks, vs, band, **options)
        parts.append(group.packed(padded))
    return torch.cat(parts)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention's kernel for rows of notes does heads of this kind on this device."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
    )


def _by_products(query: Tensor, key: Tensor, value: Tensor, band: Tensor | None, scaling: float | None) -> Tensor:
    """Attention [n, T, H, d_h] of short notes, with the whole matrix of scores in memory.

    On a CPU in bf16 torch's flash attention takes three times as long, forward and backward, for 100 tokens, and as
    long for 200 (16 notes of 9 heads, two cores).
    """
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if band is None:
        band = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[3] ** -0.5)
    weights = scores.masked_fill(~band, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def _multiplied_by_onednn(x: Tensor) -> bool:
    """Where it is left to oneDNN to multiply in 16 bits."""
    in_16_bits = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and in_16_bits


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, T, T] of a window that is shorter than the notes; None: torch's own causal mask."""
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return ((distance >= 0) & (distance < window))[None, None]


def _mask(attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask of padded rows; packed notes, which come without an `attention_mask`, need none."""
    packed = attention_mask is None and not options["allow_is_causal_skip"]  # transformers sees it in the positions
    return None if packed else sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
