"""What only GPUs do, with the tiny models: bf16 weights with fused AdamW under ZeRO, and export in bf16 and fp32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from notellm2_core.config.training import TrainingSettings
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.training.launch import launch_command
from tests.support.world import World, tiny_config, write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def export(world: World, config: Path, model: Path, out: Path, **env: str) -> np.ndarray:
    command = [sys.executable, "-m", "notellm2_core.inference.export", "--config", str(config), "--model", str(model)]
    subprocess.run(
        [*command, *world.inputs.arguments(), "--out", str(out)], check=True, timeout=200, env={**os.environ, **env}
    )
    return read_embeddings(out / "multimodal").vectors


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_training_in_bf16_learns_and_exports_agree_with_a_cpu(zero_stage: int, world: World, tmp_path: Path) -> None:
    """The loss falls. The vectors in fp32 on both devices agree to 1e-4, those in bf16 to its 8 bits."""
    init = {"pca_projector": True, "fusion_scale": 0.3, "gate_bias": -1.0}
    settings = {"num_steps": 60, "precision": "bf16", "zero_stage": zero_stage, "learning_rate": 3e-3}
    config = write_config(tmp_path / "bf16.yaml", tiny_config(settings, init=init))
    out = tmp_path / "out"
    subprocess.run(launch_command(config, TrainingSettings(), world.paths(tmp_path)), check=True, timeout=300)
    summary = json.loads((out / "training.json").read_text())
    assert summary["precision"] == "bf16" and summary["loss_last"] < 0.8 * summary["loss_first"]

    full = write_config(tmp_path / "fp32.yaml", tiny_config({**settings, "precision": "fp32"}, init=init))
    on_cpu = export(world, full, out, tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    np.testing.assert_allclose(export(world, full, out, tmp_path / "gpu"), on_cpu, atol=1e-4)
    in_bf16 = export(world, config, out, tmp_path / "half")
    assert (in_bf16 * on_cpu).sum(axis=1).min() > 0.99
