"""Throughput and model FLOPs utilisation (MFU, Chowdhery et al. 2022): FLOPs per second, as a share of the peak.

Only the FLOPs that the method needs are counted: the LLM's forward and backward on real tokens. Padding, recomputed
activations (gradient checkpointing, GradCache) and everything around the LLM take time and are not counted.
"""

import re
import resource

import torch

from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.training.data.micro_batches import Share

# Dense 16-bit operations per second, from the vendors' data sheets (SXM), by a word of CUDA's device name.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
               "L40S": 362e12, "L4": 121e12, "A10": 125e12, "V100": 125e12}  # fmt: skip


class Throughput:
    """Computes the throughput metrics of training steps on one kind of device."""

    def __init__(self, model: MLRMModel, device: torch.device, num_ranks: int) -> None:
        """Counts parameters, so it comes before the weights are partitioned (ZeRO-3)."""
        llm = model.llm.config
        self._model, self._device = model, device
        words = model.get_input_embeddings()
        weights = [p for p in model.llm.parameters() if not any(p is word for word in words.parameters())]
        upstream = [*model.llm.parameters(), *(model.connector.parameters() if model.connector is not None else ())]
        has_backward = any(p.requires_grad for p in upstream)  # else no gradient passes through the LLM
        # Matrix products, per token and weight: 2 operations forward, 2 for the input's gradient, 2 for the weight's.
        # Attention: QK^T and AV, forward and backward, for each pair of tokens in a note; causal, so half.
        self._per_token = sum(p.numel() * (2 + 2 * has_backward + 2 * p.requires_grad) for p in weights)
        heads = getattr(llm, "num_attention_heads", 0)  # a Mamba has none
        width = getattr(llm, "head_dim", None) or llm.hidden_size // max(heads, 1)
        self._per_square = (12 if has_backward else 4) * llm.num_hidden_layers * heads * width // 2
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((flops for word in re.split(r"[ -]", name) if (flops := _PEAK_FLOPS.get(word))), None)
        self._peak = None if peak is None else peak * num_ranks

    def metrics(self, num_tokens: float, num_squares: float, seconds: float) -> dict[str, float]:
        """`tokens_per_s`, `tflops`, `mfu` if the device's peak is known, and this rank's peak `memory_gb`.

        `num_squares`: the sum of the squared lengths of the notes that have these tokens (see `Share`).
        """
        flops = (num_tokens * self._per_token + num_squares * self._per_square) / seconds
        metrics = {"tokens_per_s": num_tokens / seconds, "tflops": flops / 1e12}
        if self._peak is not None:
            metrics["mfu"] = flops / self._peak
        return metrics | {"memory_gb": self._memory() / 1e9}

    def padding(self, share: Share) -> float:
        """The share of the LLM's positions that are padding."""
        return 0.0 if self._model.packs_notes else share.padding

    def _memory(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
