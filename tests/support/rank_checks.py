"""The code of each rank in the tests with several processes (see ranks.py).

`check_stages`: for every ZeRO stage, two steps on the same global batches. Loss, full gradients, gradient norm and
updated weights of the first step, with and without merged adapters, are written to OUT/ranks-<R>-stage-<S>.pt. Then a
checkpoint after the first step is loaded into a fresh engine, whose second step must give the same weights, bit by bit.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.config.training import PARTS, TrainingSettings
from notellm2_core.model.build import build_model
from notellm2_core.model.lora import is_adapter
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.model.trainable import set_trained
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset
from notellm2_core.training.data.sampler import batch_schedule
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.engine.deepspeed import deepspeed_config
from notellm2_core.training.run import run
from notellm2_core.training.state.checkpoints import Checkpoints
from notellm2_core.training.state.reshard import load_resharded
from notellm2_core.training.state.save import full_weights, plain_weights
from notellm2_core.training.step import batch_gradient, idle_step, prepare
from notellm2_core.vision.encoder import VisionEncoder
from tests.support.world import World, tiny_config

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of training, of the model
    "notellm2": ({}, {}),
    "gradcache": ({"micro_batch_tokens": 250}, {}),
    "omni_gradcache": ({"micro_batch_tokens": 500}, {"method": "omni_retrieval"}),
    "negatives_gradcache": (
        {"micro_batch_tokens": 350, "known_positives": "count", "hard_negatives": {"num": 1}},
        {},
    ),
    "omni_retrieval": ({}, {"method": "omni_retrieval", "matryoshka_dims": (4,)}),
    "only_late_fusion": ({}, {"method": "only_late_fusion"}),
    "adapters": (
        {"trainable": ["llm", "connector", "temperature"]},
        {"lora": {"rank": 4}},
    ),  # words, fusion, projector stay
    "vision": ({"trainable": [*PARTS, "vision"]}, {}),
    "vision_gradcache": ({"trainable": [*PARTS, "vision"], "micro_batch_tokens": 500}, {"method": "omni_retrieval"}),
}


def settings(stage: int, variant: str) -> Config:
    """A batch of 8 pairs over notes with and without images or text, and all learning rates different."""
    rates = {"learning_rate": 1e-3, "new_module_learning_rate": 3e-3, "temperature_learning_rate": 1e-2}
    training = {"zero_stage": stage, "batch_pairs": 8, "weight_decay": 0.01, **rates}
    training_settings, model_settings = VARIANTS[variant]
    return tiny_config(training | training_settings, **model_settings)


def build(config: Config, world: World) -> tuple[MLRMModel, PairDataset, VisionEncoder | None]:
    """The model before its first step, its data, and its encoder where that is trained.

    The adapters' B is not 0: otherwise A would have no gradient to compare.
    """
    with engines.first_on_machine() if dist.is_initialized() else nullcontext():
        model, processor = build_model(config, world.path("models"))
        encoder = VisionEncoder.from_pretrained(world.inputs.vision) if config.trains_vision else None
        reader = InputReader(processor, world.with_image_folders, encoder)
        data = load_pair_dataset(reader, world.path("pairs"), world.path("cache"))
    set_trained(model, config, encoder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.05)
    return model.train(), data, encoder


def named_parameters(model: MLRMModel, encoder: VisionEncoder | None) -> dict[str, nn.Parameter]:
    encoder_parameters = {} if encoder is None else {f"encoder.{name}": p for name, p in encoder.named_parameters()}
    return dict(model.named_parameters()) | encoder_parameters


def with_negatives(data: PairDataset, rows: np.ndarray, config: Config, index: int) -> np.ndarray:
    """The batch with its hard negatives, where the variant has any: the three notes after each note."""
    num_notes = len(data.note_ids)
    data.hard_negatives = [(note + np.arange(1, 4)) % num_notes for note in range(num_notes)]
    return data.with_hard_negatives(rows, config.training.hard_negatives.num, (0, index))


def step(engine: Any, data: PairDataset, rows: np.ndarray, config: Config, index: int, grads: bool) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    share, labels = prepare(data, with_negatives(data, rows, config, index), config, torch.device("cpu"))
    assert (len(share.micro_batch_notes) > 1) == (config.training.micro_batch_tokens is not None)
    losses = batch_gradient(engine, share, labels, config, (0, index)).losses
    model, encoder = engine.module.model, engine.module.encoder
    named = named_parameters(model, encoder)
    gradients = {n: safe_get_full_grad(p).clone() for n, p in named.items() if p.requires_grad and grads}
    engines.set_learning_rate(engine.optimizer, 1.0 if index == 0 else 0.5)
    norm = engines.optimizer_step(engine)
    weights, encoder_weights = full_weights(model), {} if encoder is None else full_weights(encoder)
    if weights is not None and encoder_weights is not None:
        weights |= {f"encoder.{name}": weight for name, weight in encoder_weights.items()}
    losses_and_weights = {"loss": losses.total.item(), "weights": weights, "plain": plain_weights(model)}
    return {"norm": norm, "grads": gradients, **losses_and_weights}


def check_stages(
    root: Path, out: Path, stages: tuple[int, ...], variant: str, precision: engines.Precision = "fp32"
) -> None:
    """See the top of this file. In bf16, the weights are in bf16 too, as on GPUs."""
    engines.set_up_processes()
    name = f"ranks-{dist.get_world_size()}"
    world = World(root)
    for stage in stages:
        config = settings(stage, variant)
        engine, data = _fresh(world, config, precision)
        batches = batch_schedule(data.train_pairs, 8, 2, config.seed)
        first, second = (data.train_pairs[b].reshape(-1) for b in batches)
        result = step(engine, data, first, config, 0, grads=True)
        if dist.get_rank() == 0:
            torch.save(result, out / f"{name}-stage-{stage}.pt")
        if dist.get_world_size() > 2:
            continue  # a resume with two ranks is enough
        checkpoints = Checkpoints(out / f"{name}-checkpoints-{stage}")
        checkpoints.save(engine, 1)
        checkpoints.close()
        straight = step(engine, data, second, config, 1, grads=False)["weights"]
        engine, data = _fresh(world, config, precision)
        checkpoints.load(engine, 1)
        resumed = step(engine, data, second, config, 1, grads=False)["weights"]
        if dist.get_rank() == 0:
            assert all(torch.equal(straight[n], resumed[n]) for n in straight), f"stage {stage}: a resume differs"
            assert any(not torch.equal(straight[n], result["weights"][n]) for n in straight)


def check_resharded(root: Path, out: Path, stages: tuple[int, ...], variant: str, saving: bool) -> None:
    """If `saving`: a step, a checkpoint and a second step; else the second step from it, on another number of ranks."""
    engines.set_up_processes()
    for stage in stages:
        config = settings(stage, variant)
        checkpoints = Checkpoints(out / f"checkpoints-{stage}")
        engine, data = _fresh(World(root), config)
        batches = batch_schedule(data.train_pairs, 8, 2, config.seed)
        first, second = (data.train_pairs[b].reshape(-1) for b in batches)
        if saving:
            step(engine, data, first, config, 0, grads=False)
            checkpoints.save(engine, 1)
            checkpoints.close()
        else:
            assert checkpoints.last_step() == 1 and checkpoints.num_ranks(1) != dist.get_world_size()
            if stage:
                load_resharded(
                    engine, checkpoints.folder, 1, partial(idle_step, engine, data, first, config, torch.device("cpu"))
                )
            else:
                checkpoints.load(engine, 1)
        weights = step(engine, data, second, config, 1, grads=False)["weights"]
        if dist.get_rank() == 0:
            torch.save(weights, out / f"{'saved' if saving else 'resharded'}-{stage}.pt")


def _fresh(world: World, config: Config, precision: engines.Precision = "fp32") -> tuple[Any, PairDataset]:
    model, data, encoder = build(config, world)
    engines.deepspeed_config = _as_on_gpus
    engine = engines.make_engine(model, config, precision, encoder)
    assert not getattr(engine.optimizer, "persistent_parameters", [])  # an attribute of ZeRO-3's optimiser
    if precision == "bf16":
        assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
        assert engine.optimizer.gradient_accumulation_dtype == torch.float32
    return engine, data


def _as_on_gpus(
    training: TrainingSettings, precision: engines.Precision, num_ranks: int, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration for GPUs, with the small buffers of CPUs.

    ZeRO-3 does not partition small weights, and the tiny models have no others: here it partitions all.
    """
    gpu_config = deepspeed_config(training, precision, num_ranks, on_gpu=True)
    cpu_zero = deepspeed_config(training, precision, num_ranks, on_gpu)["zero_optimization"]
    zero = cpu_zero | {"stage": gpu_config["zero_optimization"]["stage"], "stage3_param_persistence_threshold": 0}
    return gpu_config | {"zero_optimization": zero}


def train_partitioned(config_file: Path, root: Path, folder: Path) -> None:
    """`train`, where ZeRO-3 partitions every weight."""
    engines.deepspeed_config = _as_on_gpus
    train(config_file, root, folder)


def train(config_file: Path, root: Path, folder: Path) -> None:
    """Train as the command does, with work/ and out/ below `folder`."""
    run(load_config(config_file), World(root).paths(folder))
