"""The training loop.

One step (all ranks):  notes of the batch -> micro-batches             (data/dataset, data/micro_batches)
  embed, no graph -> gather -> loss -> gradient at the embeddings      (objective/gradcache 1, 2)
  embed again, with graph -> backward                                  (objective/gradcache 3)
  clip, AdamW                                                          (engine/deepspeed)
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from notellm2_core.config.settings import Config
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.runtime.files import write_atomically
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.data.micro_batches import Share
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.engine.deepspeed import Precision
from notellm2_core.training.engine.throughput import Throughput
from notellm2_core.training.launch import Paths
from notellm2_core.training.objective.gradcache import Step
from notellm2_core.training.objective.losses import BatchLabels
from notellm2_core.training.state.checkpoints import Checkpoints
from notellm2_core.training.state.metrics import Progress
from notellm2_core.training.step import batch_gradient, prepare
from notellm2_core.training.validation import validate, validation_sample
from notellm2_core.vision.encoder import VisionEncoder


class TrainingError(ValueError):
    """The run cannot continue; the message is one line for the person who started it."""


@dataclass(frozen=True)
class Run:
    """What the phases of a training run share, on one rank."""

    config: Config
    paths: Paths
    settings: dict[str, Any]  # that change the weights, by dotted names
    device: torch.device
    processor: MLRMProcessor
    model: MLRMModel
    encoder: VisionEncoder | None  # where it is trained with the model
    data: PairDataset
    batches: np.ndarray  # [steps, B] rows of `data.train_pairs`: the pairs that each step sees
    precision: Precision
    engine: Any  # DeepSpeed's, around the TrainingStep of model and encoder
    first_step: int  # steps that the checkpoint has behind it
    checkpoints: Checkpoints
    progress: Progress
    speed: Throughput


def train(run: Run) -> None:
    """Every step from `run.first_step` to the last, with reports, validation and checkpoints in between.

    Raises TrainingError on every rank where a loss or a gradient is not finite.
    """
    config, training, data, engine, progress = run.config, run.config.training, run.data, run.engine, run.progress
    validation_pairs = validation_sample(data, config.seed)
    rows_of_steps = data.train_pairs[run.batches].reshape(len(run.batches), -1)  # [steps, 2B], pair k: 2k and 2k + 1

    def batch_of(step: int) -> tuple[Share, BatchLabels]:
        rows = data.with_hard_negatives(rows_of_steps[step], training.hard_negatives.num, (config.seed, step))
        return prepare(data, rows, config, run.device)

    steps = range(run.first_step, training.num_steps)
    batches = Prefetcher(map(batch_of, steps))  # the CPU makes the next one while the device is busy
    for step, (share, labels) in zip(steps, batches, strict=True):
        # ---------------------------------------------------------------------------------------------------------
        # evaluate the gradient
        # Random numbers depend on the seed, the step and the rank alone, so a resume restores none.
        gradient = batch_gradient(engine, share, labels, config, seed=(config.seed, step))
        _require_finite(run, step, share.rows, "loss", gradient.losses.total.item())  # .item() waits for the GPU

        # ---------------------------------------------------------------------------------------------------------
        # step the optimizer
        factor = engines.learning_rate_factor(step, training.num_steps, training.warmup_ratio)
        engines.set_learning_rate(engine.optimizer, factor)
        grad_norm = engines.optimizer_step(engine)
        _require_finite(run, step, share.rows, "gradient norm", grad_norm)

        # ---------------------------------------------------------------------------------------------------------
        # report
        done, last = step + 1, step + 1 == training.num_steps
        metrics = _metrics(gradient, training.learning_rate * factor, grad_norm) | {"padding": run.speed.padding(share)}
        seconds_waited = batches.seconds_waited + share.seconds_waited
        progress.add(len(share.rows), share.num_tokens, share.num_squares, metrics, seconds_waited)
        if done == 1 or done % training.log_every_steps == 0 or last:
            progress.report_steps(done)

        # ---------------------------------------------------------------------------------------------------------
        # validate
        if len(validation_pairs) and (done % training.validate_every_steps == 0 or last):
            progress.report_steps(done)
            scores = validate(engine, data, validation_pairs, config, run.device)
            # Nothing else sees what the last step's update has made of the weights.
            _require_finite(run, step, share.rows, "validation loss", scores["validation_loss"])
            progress.report(done, scores)
            progress.restart_clock()

        # ---------------------------------------------------------------------------------------------------------
        # save a checkpoint
        run.checkpoints.settle()
        if last or run.checkpoints.due(done):
            progress.report_steps(done)
            run.checkpoints.save(engine, done)
            progress.restart_clock()
    run.checkpoints.close()


def _metrics(gradient: Step, learning_rate: float, grad_norm: float) -> dict[str, float]:
    losses = gradient.losses
    metrics = {"loss": losses.total.item(), "loss_m": losses.multimodal.item()}
    if losses.visual is not None:
        metrics["loss_v"] = losses.visual.item()
    if losses.cross is not None:
        metrics["loss_cross"] = losses.cross.item()
    metrics["tau"] = gradient.tau.item()
    if gradient.gate_mean is not None:
        metrics["gate_mean"] = gradient.gate_mean.item()
    return metrics | {"lr": learning_rate, "grad_norm": grad_norm}


def _require_finite(run: Run, step: int, rows: np.ndarray, what: str, value: float) -> None:
    """Raises TrainingError on every rank at once, before anything spoiled can reach a checkpoint.

    `rows`: the notes of the batch, those of its pairs first.
    """
    if math.isfinite(value) and value >= 0:  # DeepSpeed's answer to a gradient that is not finite is a norm of -1
        return
    file = run.paths.work / "nan_batch.json"
    if dist.get_rank() == 0:
        ids = [run.data.note_ids[row] for row in rows]
        num_paired = 2 * run.config.training.batch_pairs
        pairs = [ids[i : i + 2] for i in range(0, num_paired, 2)]
        report = {"step": step + 1, "what": what, "value": repr(value), "pairs": pairs}
        write_atomically(file, json.dumps(report | {"hard_negatives": ids[num_paired:]}))
    raise TrainingError(
        f"the {what} of step {step + 1} is {value}: lower the learning rates or use precision: fp32 (pairs in {file})"
    )
