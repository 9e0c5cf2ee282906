"""Checkpoint resharding: loads a checkpoint of another number of ranks if the optimiser is partitioned (ZeRO).

The checkpoint is converted to DeepSpeed's universal format, one file per weight, and each weight is set through
DeepSpeed's functions for a rank's partition. (DeepSpeed's own loader gives all groups the settings of the first, or
fails if a rank has no share of a group.)
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from notellm2_core.runtime.processes import die_with_parent


def load_resharded(engine: Any, checkpoints: Path, step: int, idle_step: Callable[[], None]) -> None:
    """Load the trained weights and the optimiser's state of `checkpoints`/step-N into `engine`; frozen weights stay.

    `idle_step`: a whole step with learning rates of 0. Called first so that the optimiser allocates its state, then to
    copy the fp32 master weights into the model. Called on all ranks. Raises RuntimeError if the conversion fails.
    """
    universal = checkpoints / f"universal-{step}"
    if dist.get_rank() == 0:
        _convert(checkpoints / f"step-{step}", universal)
    dist.barrier()
    idle_step()
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # linked too early: only the first group had state
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    _set_all(engine, universal, "fp32")
    idle_step()
    for key in ("exp_avg", "exp_avg_sq"):
        _set_all(engine, universal, key)
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.full_like(torch.as_tensor(state["step"]), step)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(universal)


def _convert(checkpoint: Path, universal: Path) -> None:
    shutil.rmtree(universal, ignore_errors=True)  # left by a killed run
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=die_with_parent)
    if result.returncode:
        raise RuntimeError(f"{checkpoint} could not be converted for another number of ranks:\n{result.stderr[-3000:]}")


def _set_all(engine: Any, universal: Path, key: str) -> None:
    """Set every trained weight (`key` "fp32"), or its optimiser state of the name `key`."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = torch.load(universal / "zero" / name / f"{key}.pt", weights_only=False)
        value = (value["param"] if isinstance(value, dict) else value).float()
        whole = not hasattr(parameter, "ds_id")
        if not whole:  # ZeRO-3: the function for whole weights fails if their numbers cannot be divided evenly
            size = -(-value.numel() // dist.get_world_size())
            padded = functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            value = padded[dist.get_rank() * size :][:size]
        if key == "fp32":
            (safe_set_full_fp32_param if whole else safe_set_local_fp32_param)(parameter, value)
        else:
            (safe_set_full_optimizer_state if whole else safe_set_local_optimizer_state)(parameter, value, key)
