"""Fine-tuning from start to saved model. `_train` is the loop; `run` is what has to be there before and after it."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notellm2_core.ahead import Prefetcher
from notellm2_core.config import Config
from notellm2_core.lake import fingerprint
from notellm2_core.model.build import build_model
from notellm2_core.model.parts import set_trained
from notellm2_core.model.vision import VisionEncoder
from notellm2_core.notes.lake_pictures import PictureFolders
from notellm2_core.recipe import STAGES, get_setting
from notellm2_core.runtime.files import write_atomically
from notellm2_core.training import engine as engines
from notellm2_core.training.checkpoints import Checkpoints
from notellm2_core.training.data import TrainingData, load_training_data, model_cache, schedule
from notellm2_core.training.gradient import batch_gradient, idle_step, prepare
from notellm2_core.training.losses import BatchLabels, Losses
from notellm2_core.training.micro_batches import Share
from notellm2_core.training.moved import load_moved
from notellm2_core.training.precision import choose_precision
from notellm2_core.training.progress import MlflowCurves, Progress
from notellm2_core.training.save import DONE, save_model
from notellm2_core.training.speed import Speed
from notellm2_core.training.start import apply_start
from notellm2_core.training.validation import validate, validation_sample
from notellm2_core.training.work import held, open_work


class TrainingError(ValueError):
    """The training cannot go on; the message is one line for the person who started it."""


@dataclass(frozen=True)
class Paths:
    """The folders of one training."""

    notes: Path
    images: Path  # what the features command wrote: NOTE_IMAGES and vision/
    store: Path  # parent of the feature stores
    pairs: Path  # with train/ and validation/
    work: Path  # checkpoints and curves; give the same again to resume
    out: Path
    hard_negatives: Path | None = None  # where training.hard_negatives.num asks for some
    pictures: PictureFolders | None = None  # where training.parts has vision


@dataclass(frozen=True)
class Reports:
    """Where the figures go besides the terminal and metrics.jsonl."""

    log: Callable[[str], None] | None = None  # Dagster Pipes
    mlflow_uri: str | None = None
    mlflow_run_id: str | None = None


def run(config: Config, paths: Paths, reports: Reports = Reports(), train_days: Sequence[str] | None = None) -> None:
    """Train as `config` says and save the model into `paths.out`. Called on every rank, after `set_up_processes`.

    Goes on from the last checkpoint of `paths.work`; the weights are then those of an uninterrupted run: on a CPU bit
    for bit, on a GPU up to the order of its sums; but for rounding, and dropout, on another machine, or with another
    number of ranks or size of micro-batches. Does nothing where `paths.out` holds this training's model. `train_days`:
    first day and (exclusive) end of the log that the pairs are of, for the model card. Raises ValueError for inputs and
    settings that do not fit.
    """
    device = engines.set_up_processes()
    with held(paths.work):
        _run(config, paths, reports, train_days, device)


def _run(
    config: Config, paths: Paths, reports: Reports, train_days: Sequence[str] | None, device: torch.device
) -> None:
    rank, num_ranks, training = dist.get_rank(), dist.get_world_size(), config.training
    with engines.first_on_machine():
        model, processor = build_model(config, model_cache(config))
        encoder = VisionEncoder.from_pretrained(paths.images / "vision") if config.trains_vision else None
        data = load_training_data(
            processor, paths.notes, paths.images, paths.store, paths.pairs, paths.work,
            paths.hard_negatives if training.hard_negatives.num else None,
            encoder, paths.pictures, config.source.max_image_pixels,
        )  # fmt: skip
    if encoder is not None and rank == 0:
        told = "the vision encoder is trained: every step encodes its pictures, and their stored features are not read"
        print(told, file=sys.stderr)
        if reports.log is not None:
            reports.log(told)
    settings = run_settings(config, data)
    known_run = open_work(paths.work, settings)
    if paths.out.exists() and not paths.out.is_dir():
        raise ValueError(f"{paths.out} is a file: give --out an empty folder")
    if (done := paths.out / DONE).exists():  # perhaps this training's, killed before it could exit
        if not known_run or json.loads(done.read_text()).get("settings") != fingerprint(settings):
            raise ValueError(f"{paths.out} holds a trained model already: give --out an empty folder")
        if rank == 0:
            print(f"{paths.out} holds the model of this training already", file=sys.stderr)
        return
    if not known_run and paths.out.exists() and (there := sorted(paths.out.iterdir())):
        raise ValueError(f"{paths.out} holds {there[0].name}: give --out an empty folder")
    dist.barrier()  # all ranks have looked before rank 0 writes
    checkpoints = Checkpoints(
        paths.work / "checkpoints",
        training.checkpoint_every_steps,
        training.checkpoint_every_minutes,
        training.num_checkpoints,
    )
    first_step = checkpoints.last_step()
    set_trained(model, config, encoder)
    moved = first_step > 0 and checkpoints.num_ranks(first_step) != num_ranks
    if first_step == 0 or moved:
        apply_start(model, data, config, encoder)
    model.train()
    engines.broadcast_new_modules(model, device)
    batches = schedule(data.contents(data.train_pairs), training.batch_pairs, training.num_steps, config.seed)
    if not known_run:
        precision = choose_precision(model, data, batches[0], config, device, encoder)
        known_run = {"settings": settings, "precision": precision}
        if rank == 0:
            write_atomically(paths.work / "run.json", json.dumps(known_run, indent=1))
    speed = Speed(model, device, num_ranks)
    engine = engines.make_engine(model, config, known_run["precision"], encoder)
    if moved and engine.zero_optimization_stage():
        rows = data.train_pairs[batches[0]].reshape(-1)
        load_moved(engine, checkpoints.folder, first_step, lambda: idle_step(engine, data, rows, config, device))
    elif first_step:
        checkpoints.load(engine, first_step)
    metrics, curves = paths.work / "metrics.jsonl", _curves(config, reports, rank)
    progress = Progress(metrics, first_step, training.num_steps, rank == 0, reports.log, curves, speed.figures)
    try:
        _train(engine, data, batches, first_step, config, device, checkpoints, progress, speed, paths.work)
        facts = _facts(progress, config, data, known_run["precision"], num_ranks)
        save_model(model, processor, paths.images / "vision", paths.out, config, train_days, facts, encoder)
    except TrainingError:  # on every rank: what is being written is not lost
        checkpoints.close()
        raise
    finally:
        checkpoints.stop()
        progress.close()


def _train(
    engine: Any,
    data: TrainingData,
    batches: np.ndarray,
    first_step: int,
    config: Config,
    device: torch.device,
    checkpoints: Checkpoints,
    progress: Progress,
    speed: Speed,
    work: Path,
) -> None:
    training = config.training
    validation_pairs = validation_sample(data, config.seed)
    rows_of_steps = data.train_pairs[batches].reshape(len(batches), -1)  # [steps, 2B], pair k in rows 2k and 2k + 1

    def batch_of(step: int) -> tuple[Share, BatchLabels]:
        rows = data.with_hard_negatives(rows_of_steps[step], training.hard_negatives.num, (config.seed, step))
        return prepare(data, rows, config, device)

    steps = range(first_step, training.num_steps)
    prefetched = Prefetcher(map(batch_of, steps))
    for step, (share, labels) in zip(steps, prefetched, strict=True):
        # Random numbers depend on the seed, the step and the rank alone, so a resume restores none.
        losses, tau, gate_mean = batch_gradient(engine, share, labels, config, seed=(config.seed, step))
        _require_finite("loss", losses.total.item(), step, data, share.rows, config, work)
        factor = engines.learning_rate_factor(step, training.num_steps, training.warmup_ratio)
        engines.set_learning_rate(engine.optimizer, factor)
        grad_norm = engines.optimizer_step(engine)
        _require_finite("gradient norm", grad_norm, step, data, share.rows, config, work)

        done, last = step + 1, step + 1 == training.num_steps
        rate = training.learning_rate * factor
        figures = _figures(losses, tau, gate_mean, rate, grad_norm) | {"padding": speed.padding(share)}
        waited = prefetched.seconds_waited + share.seconds_waited
        progress.add(len(share.rows), share.num_tokens, share.num_squares, figures, waited)
        if done == 1 or done % training.log_every_steps == 0 or last:
            progress.report_steps(done)
        if len(validation_pairs) and (done % training.validate_every_steps == 0 or last):
            progress.report_steps(done)
            found = validate(engine, data, validation_pairs, config, device)
            # The update of the last step is looked at here alone.
            _require_finite("validation loss", found["validation_loss"], step, data, share.rows, config, work)
            progress.report(done, found)
            progress.restart_clock()
        checkpoints.settle()
        if last or checkpoints.due(done):
            progress.report_steps(done)
            checkpoints.save(engine, done)
            progress.restart_clock()
    checkpoints.close()


def run_settings(config: Config, data: TrainingData) -> dict[str, Any]:
    """Whatever changes the weights that come out by more than rounding: settings by their dotted names, the pairs."""
    tree = config.model_dump(mode="json")
    settings = {key: get_setting(tree, key) for key in STAGES["checkpoint"].settings}
    of_data = {"training pairs": fingerprint([data.train_pairs.tolist(), data.note_ids])}
    if data.hard_negatives is not None:
        of_data["hard negatives"] = fingerprint([negatives.tolist() for negatives in data.hard_negatives])
    return {**_flat(settings), **of_data}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _curves(config: Config, reports: Reports, rank: int) -> MlflowCurves | None:
    if rank or not reports.mlflow_uri or not reports.mlflow_run_id:
        return None
    return MlflowCurves(reports.mlflow_uri, reports.mlflow_run_id, config.tracking.timeout_seconds)


def _figures(losses: Losses, tau: Tensor, gate_mean: Tensor | None, rate: float, grad_norm: float) -> dict[str, float]:
    figures = {"loss": losses.total.item(), "loss_m": losses.multimodal.item()}
    if losses.visual is not None:
        figures["loss_v"] = losses.visual.item()
    if losses.cross is not None:
        figures["loss_cross"] = losses.cross.item()
    figures["tau"] = tau.item()
    if gate_mean is not None:
        figures["gate_mean"] = gate_mean.item()
    return figures | {"lr": rate, "grad_norm": grad_norm}


def _require_finite(
    what: str, value: float, step: int, data: TrainingData, rows: np.ndarray, config: Config, work: Path
) -> None:
    """Raises TrainingError on every rank at once, before anything spoiled can reach a checkpoint.

    `rows`: the notes of the batch, those of its pairs first.
    """
    if math.isfinite(value) and value >= 0:  # DeepSpeed's answer to a gradient that is not finite is a norm of -1
        return
    file = work / "nan_batch.json"
    if dist.get_rank() == 0:
        ids = [data.note_ids[row] for row in rows]
        num_paired = 2 * config.training.batch_pairs
        pairs = [ids[i : i + 2] for i in range(0, num_paired, 2)]
        report = {"step": step + 1, "what": what, "value": repr(value), "pairs": pairs}
        write_atomically(file, json.dumps(report | {"hard_negatives": ids[num_paired:]}))
    raise TrainingError(
        f"the {what} of step {step + 1} is {value}: lower the learning rates or use precision: fp32 (pairs in {file})"
    )


def _facts(progress: Progress, config: Config, data: TrainingData, precision: str, num_ranks: int) -> dict[str, Any]:
    """training.json: was it good?"""
    losses, speed = progress.series("loss"), progress.series("notes_per_s")
    if not losses:
        return {}
    facts: dict[str, Any] = {
        "steps": config.training.num_steps,
        "seconds": round(progress.seconds, 1),
        "notes_per_s": round(sum(speed) / len(speed), 2),
        "precision": precision,
        "num_ranks": num_ranks,
        "zero_stage": config.training.zero_stage,
        "settings": fingerprint(run_settings(config, data)),
        "num_train_pairs": len(data.train_pairs),
        "num_train_notes": len(data.train_notes),
        "num_validation_pairs": len(data.validation_pairs),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    for key in ("loss_m", "loss_v", "loss_cross", "tau", "gate_mean", "validation_loss", "validation_recall_at_10"):
        if series := progress.series(key):
            facts[key] = series[-1]
    return facts
