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
from notellm2_core.training.learning import learned_nothing
from notellm2_core.training.objective.gradcache import Step
from notellm2_core.training.objective.losses import BatchLabels, chance_loss
from notellm2_core.training.state.checkpoints import Checkpoints
from notellm2_core.training.state.metrics import RECALL, Progress
from notellm2_core.training.state.run_folder import NAN_BATCH
from notellm2_core.training.state.selection import Selection
from notellm2_core.training.step import batch_gradient, prepare
from notellm2_core.training.validation import validate, validation_sample
from notellm2_core.vision.encoder import VisionEncoder


class TrainingError(ValueError):
    """The run cannot continue; the message is one line for the person who started it."""


@dataclass(frozen=True)
class Run:
    """The state that the phases of a training run share, on one rank."""

    config: Config
    paths: Paths
    settings: dict[str, Any]  # those that change the weights, by dotted names
    device: torch.device
    processor: MLRMProcessor
    model: MLRMModel
    encoder: VisionEncoder | None  # if it is trained with the model
    data: PairDataset
    batches: np.ndarray  # [steps, B] rows of `data.train_pairs`: the pairs that each step sees
    precision: Precision
    engine: Any  # DeepSpeed's, around the TrainingStep of model and encoder
    first_step: int  # how many steps were done when the run resumed
    end_step: int  # after which the run stops; fewer than len(batches) in a trial
    checkpoints: Checkpoints
    selection: Selection
    progress: Progress
    throughput: Throughput


def train(run: Run) -> None:
    """Every step from `run.first_step` to `run.end_step`, with reports, validation and checkpoints in between.

    Raises, on every rank, TrainingError if a value is not finite, OSError if the best weights cannot be written.
    """
    config, training, data, engine, progress = run.config, run.config.training, run.data, run.engine, run.progress
    num_steps, validation_pairs = len(run.batches), validation_sample(data, config.seed)
    notes_of_steps = data.train_pairs[run.batches].reshape(len(run.batches), -1)  # [steps, 2B], pair k: 2k and 2k + 1

    def batch_of(step: int) -> tuple[Share, BatchLabels]:
        notes = data.with_hard_negatives(notes_of_steps[step], training.hard_negatives.num, (config.seed, step))
        return prepare(data, notes, config, run.device)

    if run.first_step == 0 and len(validation_pairs):
        progress.report(0, validate(engine, data, validation_pairs, config, run.device), always=True)
        progress.restart_clock()
    steps = range(run.first_step, run.first_step if run.selection.stops(run.first_step) else run.end_step)
    batches = Prefetcher(map(batch_of, steps))  # the CPU makes the next one while the device is busy
    for step, (share, labels) in zip(steps, batches, strict=True):
        # ---------------------------------------------------------------------------------------------------------
        # evaluate the gradient
        # Random numbers depend on the seed, the step and the rank alone, so a resume restores none.
        gradient = batch_gradient(engine, share, labels, config, seed=(config.seed, step))
        _require_finite(run, step, share.notes, "loss", gradient.losses.total.item())  # .item() waits for the GPU

        # ---------------------------------------------------------------------------------------------------------
        # step the optimizer
        factor = engines.learning_rate_factor(step, num_steps, training.warmup_ratio)
        engines.set_learning_rate(engine.optimizer, factor)
        grad_norm = engines.optimizer_step(engine)
        _require_finite(run, step, share.notes, "gradient norm", grad_norm)

        # ---------------------------------------------------------------------------------------------------------
        # report
        done, last = step + 1, step + 1 == run.end_step
        metrics = _metrics(gradient, labels, training.rates.llm * factor, grad_norm)
        metrics["padding"] = run.throughput.padding(share)
        seconds_waited = batches.seconds_waited + share.seconds_waited
        progress.add(len(share.notes), share.num_tokens, share.num_squares, metrics, seconds_waited)
        if done == 1 or done % training.log_every_steps == 0 or last:
            progress.report_steps(done)

        # ---------------------------------------------------------------------------------------------------------
        # validate
        if len(validation_pairs) and (done % training.validate_every_steps == 0 or last):
            progress.report_steps(done)
            _validate(run, done, validation_pairs, share.notes)
            last = last or run.selection.stops(done)
            progress.restart_clock()

        # ---------------------------------------------------------------------------------------------------------
        # save a checkpoint
        run.checkpoints.settle()
        if last or run.checkpoints.due(done):
            progress.report_steps(done)
            run.checkpoints.save(engine, done)
            progress.restart_clock()
        if last:
            break
    run.checkpoints.close()


def _validate(run: Run, done: int, pairs: np.ndarray, notes: np.ndarray) -> None:
    """Validate on `pairs` [V, 2] after `done` steps, the last one on `notes`. Keep the weights if they are the best so
    far; report a run that learns nothing or ends early.
    """
    scores = validate(run.engine, run.data, pairs, run.config, run.device)
    # No other check sees the weights after the last update.
    _require_finite(run, done - 1, notes, "validation loss", scores["validation_loss"])
    run.progress.report(done, scores, always=True)
    run.selection.add(done, scores[RECALL], run.engine.module, run.checkpoints.resumable_steps())
    if warning := learned_nothing(run.progress, run.config.training, len(run.batches), done, len(pairs)):
        run.progress.say(f"warning: {warning}")
    if run.selection.stops(done) and done < len(run.batches):
        run.progress.say(
            f"training ends after step {done} of {len(run.batches)} (training.patience): the best validation recall is "
            f"that of step {run.selection.best_step}"
        )


def _metrics(gradient: Step, labels: BatchLabels, learning_rate: float, grad_norm: float) -> dict[str, float]:
    losses, chance = gradient.losses, chance_loss(labels).item()
    metrics = {"loss": losses.total.item(), "loss_m": losses.multimodal.item()}
    metrics["loss_vs_chance"] = metrics["loss_m"] / chance if chance else 1.0  # 0: no note has a negative
    if losses.visual is not None:
        metrics["loss_v"] = losses.visual.item()
    if losses.cross is not None:
        metrics["loss_cross"] = losses.cross.item()
    metrics["tau"] = gradient.tau.item()
    if gradient.gate_mean is not None:
        metrics["gate_mean"] = gradient.gate_mean.item()
    return metrics | {"lr": learning_rate, "grad_norm": grad_norm}


def _require_finite(run: Run, step: int, notes: np.ndarray, quantity: str, value: float) -> None:
    """Raises TrainingError if `value`, the same on every rank, is not finite: before a broken weight can reach a
    checkpoint.

    `notes`: those of the batch, the notes of its pairs first.
    """
    if math.isfinite(value) and value >= 0:  # -1 is DeepSpeed's norm of a gradient that is not finite
        return
    file = run.paths.run_dir / NAN_BATCH
    if dist.get_rank() == 0:
        ids = [run.data.note_ids[note] for note in notes]
        num_paired = 2 * run.config.training.batch_pairs
        pairs = [ids[i : i + 2] for i in range(0, num_paired, 2)]
        report = {"step": step + 1, "what": quantity, "value": repr(value), "pairs": pairs}
        write_atomically(file, json.dumps(report | {"hard_negatives": ids[num_paired:]}))
    advice = _advice(run, step, quantity)
    raise TrainingError(f"the {quantity} of step {step + 1} is {value}: {advice} (pairs in {file})")


def _advice(run: Run, step: int, quantity: str) -> str:
    """What can help against a value that is not finite. Before the first update, no learning rate is the cause."""
    advice = "lower the learning rates, or raise training.warmup_ratio"
    if step == 0 and quantity != "validation loss":
        advice = "no weight has changed yet, so check the weights that training starts from, and the image features"
    return f"{advice}; or use training.precision = fp32" if run.precision == "bf16" else advice
