"""The summary of a training run, for training.json and the model card."""

from typing import Any

import torch.distributed as dist

from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.training.learning import learned_nothing
from notellm2_core.training.loop import Run
from notellm2_core.training.state.metrics import RECALL
from notellm2_core.training.validation import validation_sample


def training_summary(run: Run) -> dict[str, Any]:
    """The main metrics of the run; {} for one that has reported no step.

    Losses by name, tau, the gate and the validation are those of the step whose weights are saved.
    """
    progress, training = run.progress, run.config.training
    losses, notes_per_s, steps = progress.series("loss"), progress.series("notes_per_s"), progress.last_step
    if not losses:
        return {}
    chosen = run.selection.chosen_step(steps)
    summary: dict[str, Any] = {
        "steps": steps,
        "chosen_step": chosen,  # whose weights are saved
        "seconds": round(progress.seconds, 1),
        "notes_per_s": round(sum(notes_per_s) / len(notes_per_s), 2),
        "precision": run.precision,
        "num_ranks": dist.get_world_size(),
        "zero_stage": training.zero_stage,
        "settings": fingerprint(run.settings),
        "num_train_pairs": len(run.data.train_pairs),
        "num_train_notes": len(run.data.train_notes),
        "num_validation_pairs": len(run.data.validation_pairs),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    for key in ("loss_m", "loss_v", "loss_cross", "tau", "gate_mean", "validation_loss", RECALL):
        if series := progress.series(key, last=chosen):
            summary[key] = series[-1]
    if (start := run.paths.start) is not None:
        summary["start"] = {"release": start.release, "weeks": list(start.weeks)}
    num_pairs = len(validation_sample(run.data, run.config.seed))
    if warning := learned_nothing(progress, training, len(run.batches), steps, num_pairs):
        summary["warning"] = warning
    return summary
