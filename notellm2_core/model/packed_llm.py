"""The LLM on packed notes: every matrix product sees real tokens only.

On a CPU in 16 bits the row ends in up to 63 empty positions, so that rows have few different lengths.

Shapes: N notes, T tokens of the longest, R tokens in the row (without empty positions).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedModel

from notellm2_core.model.packed_attention import PACKED_SDPA
from notellm2_core.model.packing import Packing

_PROBE = "packing_probe"
_KINDS = {"full_attention", "sliding_attention"}
_STEP = 64  # tokens; row lengths are its multiples: oneDNN prepares, and caches, its kernels per shape


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


def _uses_onednn(x: Tensor) -> bool:
    """Whether oneDNN computes the matrix products of `x`: on a CPU, in 16 bits."""
    in_16_bits = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and in_16_bits


AttentionInterface.register(_PROBE, _probe)
