from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from notellm2_core.config.methods import get_method
from notellm2_core.model.build import build_model
from notellm2_core.training.data.micro_batches import share_out
from notellm2_core.training.engine import throughput as module
from notellm2_core.training.engine.deepspeed import set_up_processes
from notellm2_core.training.engine.throughput import Throughput
from tests.support.world import World, pair_dataset, tiny_config


def test_operations_of_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny LLM has 2 layers of 64 x 64 (query, output), 2 of 32 x 64 (key, value), 3 of 128 x 64, 2 norms, and a
    final norm. It takes 6 operations per weight and token, and 12 x 2 layers x 64 per pair of tokens of a note: half of
    the squares of ten notes of 100 tokens.
    """
    model, _ = build_model(tiny_config(), tmp_path)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64
    throughput = Throughput(model, torch.device("cpu"), 1)
    squares = 10 * 100**2
    metrics = throughput.metrics(num_tokens=1000, num_squares=squares, seconds=2)
    assert metrics["tokens_per_s"] == 500
    assert metrics["tflops"] == pytest.approx(1000 * (6 * weights + 6 * 2 * 64 * 100) / 2 / 1e12)
    model.llm.requires_grad_(False)  # 4 of the 6 operations remain
    frozen = Throughput(model, torch.device("cpu"), 1).metrics(num_tokens=1000, num_squares=squares, seconds=2)[
        "tflops"
    ]
    assert frozen == pytest.approx(1000 * (4 * weights + 6 * 2 * 64 * 100) / 2 / 1e12)
    assert model.connector is not None
    model.connector.requires_grad_(False)  # no backward through the LLM: 2 remain
    forward = Throughput(model, torch.device("cpu"), 1).metrics(num_tokens=1000, num_squares=squares, seconds=2)[
        "tflops"
    ]
    assert forward == pytest.approx(1000 * (2 * weights + 2 * 2 * 64 * 100) / 2 / 1e12)
    model.requires_grad_(True)
    assert "mfu" not in metrics and metrics["memory_gb"] > 0.1
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(module.torch.cuda, "max_memory_allocated", lambda device: 7e9)
    on_gpu = Throughput(model, torch.device("cuda", 0), 2).metrics(num_tokens=1000, num_squares=squares, seconds=2)
    assert on_gpu["mfu"] == pytest.approx(metrics["tflops"] / (2 * 312)) and on_gpu["memory_gb"] == 7


def test_heads_wider_than_the_model(tmp_path: Path) -> None:
    """Attention's operations count the width of its heads, as in Qwen3: here 4 heads of 32 in a model of width 64."""
    model, _ = build_model(tiny_config(), tmp_path)
    assert model.llm.config.num_attention_heads == 4
    flops = []
    for width in (16, 32):
        model.llm.config.head_dim = width
        throughput = Throughput(model, torch.device("cpu"), 1)
        flops.append(1e12 * throughput.metrics(num_tokens=0, num_squares=1000, seconds=1)["tflops"])
    assert flops == pytest.approx([1000 * 6 * 2 * 4 * 16, 1000 * 6 * 2 * 4 * 32])


@pytest.mark.parametrize("method", ["notellm2", "omni_retrieval"])
def test_padding(method: Literal["notellm2", "omni_retrieval"], world: World, tmp_path: Path, one_rank: None) -> None:
    """`padding` is 0 for packed notes, and else the share of padded positions. Omni-Retrieval reads a note three times,
    as three rows that do not attend to each other.
    """
    device, inputs = set_up_processes(), get_method(method).inputs
    for attention in ("sdpa", "eager"):
        llm = {"name": "tiny", "attention": attention}
        model, processor = build_model(tiny_config(llm=llm, method=method), tmp_path)
        data = pair_dataset(world, processor, tmp_path)
        share = share_out(data, np.arange(8), inputs, 200 * len(inputs), device)
        batches = list(share.micro_batches())
        lengths = torch.cat([batch.attention_mask.sum(dim=1) for batch in batches])
        assert len(lengths) == 8 * len(inputs) and share.num_squares == lengths.square().sum()
        assert len(batches) == len(share.micro_batch_notes) > 1
        real = sum(int(batch.attention_mask.sum()) for batch in batches)
        padded_share = 1 - real / sum(batch.attention_mask.numel() for batch in batches)
        assert share.num_tokens == real and 0 < padded_share < 1
        expected = 0 if attention == "sdpa" else padded_share
        assert Throughput(model, device, 1).padding(share) == pytest.approx(expected)
