"""`precision: auto`: bf16 or fp32, whichever a measurement on this machine shows to be faster."""

import time

import numpy as np
import torch
import torch.distributed as dist

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.data.micro_batches import plan
from notellm2_core.training.engine.deepspeed import Precision
from notellm2_core.training.objective.views import TrainingStep
from notellm2_core.vision.encoder import VisionEncoder

_NUM_NOTES = 16
_MAX_TIME_SHARE = 0.9  # bf16 must take less than this share of fp32's time, so that a tie is fp32 in every run


def choose_precision(
    model: MLRMModel,
    data: PairDataset,
    pairs: np.ndarray,
    config: Config,
    device: torch.device,
    encoder: VisionEncoder | None = None,
) -> Precision:
    """The precision of this run, the same on every rank. `pairs` [B]: those of the first step, in `data.train_pairs`.

    On a CPU, bf16 autocast is 1.5 times faster than fp32 with avx512_bf16 and several times slower without it, so both
    are tried on up to 16 notes, forward and backward, on all ranks at once (they share the cores).
    """
    setting = config.training.precision
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    notes = data.train_pairs[pairs].reshape(-1)
    own = plan(data.num_tokens(notes), dist.get_world_size())[dist.get_rank()][0]  # the longest notes first
    method = get_method(config.model.method)
    batch = data.note_batch(notes[own[:: max(1, len(own) // _NUM_NOTES)][:_NUM_NOTES]], method.inputs).to(device)
    seconds = []
    for autocast in (False, True):
        step = TrainingStep(model, method, autocast, encoder)
        for attempt in ("warm up", "measure"):
            dist.barrier()
            start = time.perf_counter()
            loss = step(batch).rows.square().sum()
            if loss.requires_grad:  # false if the temperature alone is trained
                loss.backward()
            step.zero_grad(set_to_none=True)
            if attempt == "measure":
                seconds.append(time.perf_counter() - start)
    choice = torch.tensor([int(seconds[1] < _MAX_TIME_SHARE * seconds[0])])
    dist.broadcast(choice, src=0)
    return "bf16" if choice.item() else "fp32"
