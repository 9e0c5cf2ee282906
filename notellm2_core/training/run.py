"""A training run: prepare -> resume -> train (loop.py) -> finish."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.lake.lineage import stage_settings
from notellm2_core.model.build import build_model, load_encoder, load_model, require_its_encoder
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.model.trainable import set_trained
from notellm2_core.model.weights import weight_files, weights_id
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.runtime.files import write_atomically
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.nested import flatten
from notellm2_core.schema import VISION_FOLDER
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset, model_cache
from notellm2_core.training.data.sampler import batch_schedule, planned_steps
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.engine.deepspeed import Precision
from notellm2_core.training.engine.precision import choose_precision
from notellm2_core.training.engine.throughput import Throughput
from notellm2_core.training.initialise import initialise, notes_to_measure
from notellm2_core.training.launch import NO_REPORTS, Paths, Reports
from notellm2_core.training.loop import Run, TrainingError, train
from notellm2_core.training.state.checkpoints import Checkpoints
from notellm2_core.training.state.metrics import MlflowCurves, Progress
from notellm2_core.training.state.reshard import load_resharded
from notellm2_core.training.state.run_folder import locked, open_run
from notellm2_core.training.state.save import DONE, save_model
from notellm2_core.training.state.selection import Selection
from notellm2_core.training.step import idle_step
from notellm2_core.training.summary import training_summary
from notellm2_core.training.validation import centre_projector
from notellm2_core.vision.encoder import VisionEncoder, saved_encoder_id


def run(
    config: Config,
    paths: Paths,
    reports: Reports = NO_REPORTS,
    train_days: Sequence[str] | None = None,
    share: float = 1.0,
) -> None:
    """Train the model of `config` and save it into `paths.out`. Called on every rank; it starts the process group.

    Resumes from the last checkpoint in `paths.run_dir`. The weights are those of an uninterrupted run:
    - same machine, on a CPU: identical bits;
    - on a GPU: up to summation order;
    - other machine, number of ranks or size of micro-batches: up to rounding and dropout draws.

    Does nothing if `paths.out` holds this run's model already.

    Args:
        train_days: first day and (exclusive) end of the log behind the pairs, for the model card.
        share: share of the steps, (0, 1], after which the run stops with a validation and a checkpoint. Below 1, no
            model is saved; the same run with a larger share continues from there.

    Raises ValueError for inputs and settings that do not fit, TrainingError if a loss or a gradient is not finite,
    OSError if the model or the best weights cannot be written.
    """
    device = engines.set_up_processes()
    with locked(paths.run_dir):
        prepared = prepare(config, paths, reports, share)
        if prepared is None:
            return
        this_run = resume(config, paths, reports, prepared, device, share)
        try:
            train(this_run)
            if this_run.end_step == len(this_run.batches):
                finish(this_run, train_days)
        except TrainingError:  # on every rank at once, so they can still finish the checkpoint that is being written
            this_run.checkpoints.close()
            raise
        finally:
            this_run.checkpoints.stop()
            this_run.progress.close()


@dataclass(frozen=True)
class Prepared:
    """What a run reads before it touches its run folder."""

    processor: MLRMProcessor
    model: MLRMModel
    encoder: VisionEncoder | None  # if it is trained
    data: PairDataset
    settings: dict[str, Any]
    saved_run: dict[str, Any]  # run.json of the run folder; {} for a new run


def prepare(config: Config, paths: Paths, reports: Reports, share: float) -> Prepared | None:
    """Load model and data, and check that the folders are this run's. None if its model is saved already."""
    training = config.training
    with engines.first_on_machine():
        model, processor = build_model(config, model_cache(config))
        encoder = VisionEncoder.from_pretrained(paths.inputs.vision) if config.trains_vision else None
        reader = InputReader(processor, paths.inputs, encoder, config.source.max_image_pixels)
        hard_negatives = paths.hard_negatives if training.hard_negatives.num else None
        data = load_pair_dataset(reader, paths.pairs, paths.run_dir, hard_negatives)
        start_id = None if paths.start is None else take_over(paths.start.model, model, encoder, paths.inputs.vision)
    if (training.selects or share < 1) and not len(data.validation_pairs):
        cause = f"training.select = {training.select} with training.patience = {training.patience}"
        raise ValueError(
            f"{cause if training.selects else 'training.learning_rate = auto'} needs validation pairs, and "
            f"{paths.pairs} has none: raise split.validation_share"
        )
    if encoder is not None:
        _say(reports, "the vision encoder is trained: every step encodes its images and reads no stored features")
    if get_method(config.model.method).visual_prompt and not data.has_image(data.train_notes).any():
        _say(reports, "no training note has an image: set model.method = only_late_fusion, whose prompt is text alone")
    settings = run_settings(config, data) | ({} if start_id is None else {"start": start_id})
    saved_run = open_run(paths.run_dir, settings)
    if _is_finished(paths.out, settings, saved_run):
        if dist.get_rank() == 0:
            print(f"{paths.out} holds the model of this training run already", file=sys.stderr)
        return None
    dist.barrier()  # all ranks have looked before rank 0 writes
    return Prepared(processor, model, encoder, data, settings, saved_run)


def take_over(start: Path, model: MLRMModel, encoder: VisionEncoder | None, vision: Path) -> str:
    """Give `model`, and the trained `encoder`, the weights of the trained model in `start`. Returns the weights' id.

    Raises ValueError if it has another architecture, or, with a frozen encoder, another encoder than `vision`.
    """
    trained, _ = load_model(start)
    shapes = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (trained, model))
    if len({fingerprint(sorted((name, list(shape)) for name, shape in s.items())) for s in shapes}) > 1:
        raise ValueError(
            f"training.start_from = champion: the model in {start} has other parts or sizes than this configuration's; "
            "set training.start_from = pretrained for one week"
        )
    if encoder is None:
        require_its_encoder(trained.config, saved_encoder_id(vision))
    else:
        encoder.load_state_dict(load_encoder(start).state_dict())
    model.load_state_dict(trained.state_dict())
    return weights_id(weight_files(start), saved_encoder_id(start / VISION_FOLDER))


def _say(reports: Reports, text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr)
        if reports.log is not None:
            reports.log(text)


def _is_finished(out: Path, settings: Mapping[str, Any], saved_run: Mapping[str, Any]) -> bool:
    """Whether `out` holds this run's model. Raises ValueError if it holds anything else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out an empty folder")
    if (done := out / DONE).exists():  # perhaps this run's, killed before it could exit
        if not saved_run or json.loads(done.read_text()).get("settings") != fingerprint(settings):
            raise ValueError(f"{out} holds a trained model already: give --out an empty folder")
        return True
    if not saved_run and out.exists() and (files := sorted(out.iterdir())):
        raise ValueError(f"{out} holds {files[0].name}: give --out an empty folder")
    return False


def resume(
    config: Config, paths: Paths, reports: Reports, prepared: Prepared, device: torch.device, share: float
) -> Run:
    """The run at its last checkpoint; without one, before its first step. It stops after `share` of its steps."""
    training, rank, num_ranks = config.training, dist.get_rank(), dist.get_world_size()
    model, encoder, data = prepared.model, prepared.encoder, prepared.data
    checkpoints = Checkpoints(
        paths.run_dir / "checkpoints",
        training.checkpoint_every_steps,
        training.checkpoint_every_minutes,
        training.num_checkpoints,
    )
    first_step = checkpoints.last_step()
    other_ranks = first_step > 0 and checkpoints.num_ranks(first_step) != num_ranks
    set_trained(model, config, encoder)
    if paths.start is None and (first_step == 0 or other_ranks):
        initialise(model, data, config, encoder)
    model.train()
    engines.broadcast_new_modules(model, device)
    num_steps = planned_steps(training, len(data.train_pairs))
    batches = batch_schedule(data.content_ids(data.train_pairs), training.batch_pairs, num_steps, config.seed)
    precision = _precision(config, paths, prepared, batches[0], device)
    throughput = Throughput(model, device, num_ranks)
    engine = engines.make_engine(model, config, precision, encoder)
    if other_ranks and engine.zero_optimization_stage():
        notes = data.train_pairs[batches[0]].reshape(-1)
        load_resharded(engine, checkpoints.folder, first_step, partial(idle_step, engine, data, notes, config, device))
    elif first_step:
        checkpoints.load(engine, first_step)
    progress = Progress(
        paths.run_dir / "metrics.jsonl",
        first_step,
        num_steps,
        enabled=rank == 0,
        log=reports.log,
        curves=_curves(config, reports),
        throughput=throughput.metrics,
    )
    return Run(
        config=config,
        paths=paths,
        settings=prepared.settings,
        device=device,
        processor=prepared.processor,
        model=model,
        encoder=encoder,
        data=data,
        batches=batches,
        precision=precision,
        engine=engine,
        first_step=first_step,
        end_step=math.ceil(share * num_steps),
        checkpoints=checkpoints,
        selection=Selection(paths.run_dir / "best", training, first_step),
        progress=progress,
        throughput=throughput,
    )


def _precision(
    config: Config, paths: Paths, prepared: Prepared, first_pairs: np.ndarray, device: torch.device
) -> Precision:
    """The precision in run.json. A new run chooses one and writes run.json."""
    if prepared.saved_run:
        return prepared.saved_run["precision"]
    precision = choose_precision(prepared.model, prepared.data, first_pairs, config, device, prepared.encoder)
    if dist.get_rank() == 0:
        run_json = {"settings": prepared.settings, "precision": precision}
        write_atomically(paths.run_dir / "run.json", json.dumps(run_json, indent=1))
    return precision


def finish(run: Run, train_days: Sequence[str] | None) -> None:
    """Save the trained model, its card and training.json."""
    run.selection.restore(run.engine.module)
    if run.config.training.centre_embeddings:
        notes = notes_to_measure(run.data, run.config)
        centre_projector(run.engine, run.data, notes, run.config, run.device)
    vision = run.paths.inputs.vision if run.encoder is None else run.encoder
    save_model(run.model, run.processor, vision, run.paths.out, run.config, train_days, training_summary(run))


def run_settings(config: Config, data: PairDataset) -> dict[str, Any]:
    """Everything that changes the weights by more than rounding: settings by their dotted names, and the pairs."""
    settings = stage_settings("checkpoint", config)
    fingerprints = {"training pairs": fingerprint([data.train_pairs.tolist(), data.note_ids])}
    if config.training.selects:
        fingerprints["validation pairs"] = fingerprint(data.validation_pairs.tolist())
    if data.hard_negatives is not None:
        fingerprints["hard negatives"] = fingerprint([negatives.tolist() for negatives in data.hard_negatives])
    return {**flatten(settings), **fingerprints}


def _curves(config: Config, reports: Reports) -> MlflowCurves | None:
    if dist.get_rank() or not reports.mlflow_uri or not reports.mlflow_run_id:
        return None
    return MlflowCurves(reports.mlflow_uri, reports.mlflow_run_id, config.tracking.timeout_seconds)
