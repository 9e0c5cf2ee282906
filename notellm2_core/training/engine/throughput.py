"""How much of the device a training uses: what it computes, against what the device could (Chowdhery et al. 2022, MFU).

Only what the method needs is counted: the LLM's forward and backward on real tokens. Padding, activations computed
again (gradient checkpointing, GradCache) and everything around the LLM take time and count nothing.
"""

import re
import resource

import torch

from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.training.data.micro_batches import Share

# Dense 16-bit operations per second, from the makers' data sheets (SXM), by a word of the name that CUDA tells.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
               "L40S": 362e12, "L4": 121e12, "A10": 125e12, "V100": 125e12}  # fmt: skip


class Throughput:
    """Figures of the steps on one kind of device."""

    def __init__(self, model: MLRMModel, device: torch.device, num_ranks: int) -> None:
        """To be called before the weights are partitioned (ZeRO-3)."""
        layers = model.llm.config
        self._model, self._device = model, device
        words = model.get_input_embeddings()
        used = [p for p in model.llm.parameters() if not any(p is word for word in words.parameters())]
        below = [*model.llm.parameters(), *(model.connector.parameters() if model.connector is not None else ())]
        back = any(p.requires_grad for p in below)  # else nothing is sent back through the LLM
        # Of each token: 2 operations per weight forward, 2 back to what came before, 2 for a gradient of its own. Twice
        # that many (query times key, weight times value) of two tokens of a note, where one sees the other: of half.
        self._per_token = sum(p.numel() * (2 + 2 * back + 2 * p.requires_grad) for p in used)
        heads = getattr(layers, "num_attention_heads", 0)  # a Mamba has none
        width = getattr(layers, "head_dim", None) or layers.hidden_size // max(heads, 1)
        self._per_square = (12 if back else 4) * layers.num_hidden_layers * heads * width // 2
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((flops for word in re.split(r"[ -]", name) if (flops := _PEAK_FLOPS.get(word))), None)
        self._peak = None if peak is None else peak * num_ranks

    def figures(self, num_tokens: float, num_squares: float, seconds: float) -> dict[str, float]:
        """`tokens_per_s`, `tflops`, `mfu` where the device's peak is known, and this rank's largest `memory_gb`.

        `num_squares`: the sum of the squared lengths of the notes that these tokens are of (micro_batches.py).
        """
        flops = (num_tokens * self._per_token + num_squares * self._per_square) / seconds
        figures = {"tokens_per_s": num_tokens / seconds, "tflops": flops / 1e12}
        if self._peak is not None:
            figures["mfu"] = flops / self._peak
        return figures | {"memory_gb": self._memory() / 1e9}

    def padding(self, share: Share) -> float:
        """The share of the positions that the LLM computes for nothing."""
        return 0.0 if self._model.packs_notes else share.padding

    def _memory(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
