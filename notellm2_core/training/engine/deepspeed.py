"""The DeepSpeed engine of a configuration: its config, workarounds for a CPU, parameter groups and learning rate.

Precision. On a GPU, bf16 is DeepSpeed's: bf16 weights, fp32 master weights in the optimiser. On a CPU the weights stay
fp32 and only the forward runs under torch's bf16 autocast: the optimiser has no second copy to keep, and small updates
are not lost. On both, gradients of several micro-batches are summed in fp32: in bf16's 8 bits, the last of many terms
would hardly change the sum. (GPUs exchange gradients in bf16, which rounds them once.)
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.config.training import TrainingSettings
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.model.lora import is_adapter
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.training.launch import num_threads
from notellm2_core.training.objective.views import TrainingStep
from notellm2_core.vision.encoder import VisionEncoder

Precision = Literal["bf16", "fp32"]
_CPU_BUCKET = 10_000_000


def set_up_processes() -> torch.device:
    """Join the process group of torchrun's or DeepSpeed's environment (none: one rank). Returns this rank's device.

    On a CPU, algorithms are deterministic, and DeepSpeed's compiled extensions are off: their first start needs a C++
    compiler and two minutes. Raises ValueError if this machine has fewer GPUs than ranks.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(alone)
        os.environ.setdefault("MASTER_PORT", "0")
    elif "LOCAL_WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]  # DeepSpeed's launcher has this name for it
    on_gpu = torch.cuda.is_available()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads(int(os.environ["LOCAL_WORLD_SIZE"])))
    deepspeed = import_deepspeed()
    device = torch.device("cpu")
    if on_gpu:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ValueError(
                f"training.num_ranks = {os.environ['LOCAL_WORLD_SIZE']}, but this machine has "
                f"{torch.cuda.device_count()} GPUs: lower it"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # always written
        deepspeed.ops.__compatible_ops__ = {}  # set to none without a check, which would run the compiler
    if not dist.is_initialized():
        # Long: the other ranks wait while the first converts weights and writes the feature table.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=4))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    return device


def import_deepspeed() -> Any:
    """DeepSpeed with its log messages off. Imported late, because the import takes seconds."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Run the block on the first rank of each machine, then on the others: for files that one writes and all read."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        dist.barrier()
    yield
    if first:
        dist.barrier()


def deepspeed_config(training: TrainingSettings, precision: Precision, num_ranks: int, on_gpu: bool) -> dict[str, Any]:
    """The DeepSpeed config of our settings (Table 8).

    Raises ValueError if the ranks cannot divide the batch evenly.
    """
    if training.batch_pairs % num_ranks:
        raise ValueError(
            f"training.batch_pairs = {training.batch_pairs} cannot be divided among {num_ranks} ranks: "
            "use a multiple of their number"
        )
    in_bf16 = precision == "bf16" and on_gpu
    # With bf16 weights, DeepSpeed's ZeRO-0 takes an extra step of Adam before the first (to allocate its state), and
    # ZeRO-0 and 1 sum gradients in bf16. ZeRO-2 computes the same, in less memory.
    stage = max(2, training.zero_stage) if in_bf16 else training.zero_stage
    return {
        "train_micro_batch_size_per_gpu": training.batch_pairs // num_ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": in_bf16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if in_bf16 and training.micro_batch_tokens else {}),
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": on_gpu,
            # Numbers in the buffer of a gradient reduction; DeepSpeed's default would take 2 GB of memory.
            **({} if on_gpu else {"reduce_bucket_size": _CPU_BUCKET, "allgather_bucket_size": _CPU_BUCKET}),
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.rates.llm,
                "betas": list(training.betas),
                "eps": training.epsilon,
                "weight_decay": training.weight_decay,
                "torch_adam": True,  # DeepSpeed's own is compiled at its first use; torch's needs no compiler
                "fused": True,
            },
        },
        "steps_per_print": sys.maxsize,
    }


def optimizer_groups(
    named: dict[str, list[tuple[str, nn.Parameter]]], training: TrainingSettings
) -> list[dict[str, Any]]:
    """Parameter groups with their peak learning rates, from `MLRMModel.parameter_groups()`; without frozen ones.

    Weight decay applies to matrices: not to tau, biases, norms or the Q-Former's queries.
    """
    peaks = dict(zip(("llm", "new", "tau"), training.rates, strict=True))
    groups: list[dict[str, Any]] = []
    for part, parameters in named.items():
        for decays in (True, False):
            chosen = [p for name, p in parameters if p.requires_grad and _decays(part, name, p) == decays]
            if chosen:
                rates = {"lr": peaks[part], "peak_lr": peaks[part]}
                groups.append({"params": chosen, **rates, "weight_decay": training.weight_decay if decays else 0.0})
    return groups


def _decays(part: str, name: str, parameter: nn.Parameter) -> bool:
    return part != "tau" and parameter.ndim >= 2 and "quer" not in name.rsplit(".", 1)[-1]


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Table 8: the share of the peak learning rate at `step` (from 0): linear warm-up, then linear decay.

    Worked example, 10 steps and a ratio of 0.2: 1/2, 1, 8/8, 7/8, ... 1/8. Neither end is 0: no step is wasted.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return (num_steps - step) / (num_steps - num_warmup)


def set_learning_rate(optimizer: Any, factor: float) -> None:
    """Set the rate of every group to its peak times `factor`: a function of the step, so a resume restores nothing."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def broadcast_new_modules(model: MLRMModel, device: torch.device) -> None:
    """Broadcast rank 0's new modules, tau and adapters: initial values that were computed may differ in the last bit.

    The rest of the LLM comes from the same file on all ranks.
    """
    if dist.get_world_size() > 1:
        groups = model.parameter_groups()
        adapters = [(name, parameter) for name, parameter in groups["llm"] if is_adapter(name)]
        for _, parameter in (*groups["new"], *groups["tau"], *adapters):
            values = parameter.data.to(device)
            dist.broadcast(values, src=0)
            parameter.data.copy_(values)


def make_engine(model: MLRMModel, config: Config, precision: Precision, encoder: VisionEncoder | None = None) -> Any:
    """The DeepSpeed engine around `model`, and the vision encoder if it is trained, on this rank's device."""
    training, on_gpu = config.training, torch.cuda.is_available()
    settings = deepspeed_config(training, precision, dist.get_world_size(), on_gpu)
    fuse_kernels(model.llm, torch.device("cuda" if on_gpu else "cpu"))
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    autocast = precision == "bf16" and not settings["bf16"]["enabled"]
    step = TrainingStep(model, get_method(config.model.method), autocast, encoder)
    groups = model.parameter_groups()
    if encoder is not None:  # pretrained, like the LLM
        groups["llm"] += encoder.named_parameters()
    engine, *_ = import_deepspeed().initialize(
        model=step,
        model_parameters=optimizer_groups(groups, training),
        config=settings,
    )
    return engine


def optimizer_step(engine: Any) -> float:
    """Clip the gradient, update the weights, zero the gradient. Returns the gradient's norm before clipping."""
    norm = None
    if engine.zero_optimization_stage() == 0:  # there DeepSpeed clips in fp32 and reports no norm
        norm = torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)
