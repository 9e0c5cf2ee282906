"""Trial runs that choose the learning rates: successive halving on the validation recall. Imports no torch.

Every candidate trains for a quarter of the steps, the best two of eight for half of them, and the better one to the
end; its run is the model. A trial is the beginning of the whole run, with the same batches and the same schedule of
rates, so no step of the best one is lost. Eight candidates take three times as long as one run.

A quarter is needed: in its first steps a model forgets what it knew before it learns, so that rates at which nothing
happens would look best.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from notellm2_core.config.settings import Config
from notellm2_core.config.training import TrainingSettings
from notellm2_core.runtime.files import write_atomically
from notellm2_core.training.state.metrics import RECALL, read_metrics
from notellm2_core.training.state.run_folder import NAN_BATCH

LLM_RATES = (5e-4, 1.5e-4, 5e-5, 5e-6)
NEW_MODULE_RATES = (2e-4, 3e-5)
SHARES = (1 / 4, 1 / 2)  # of the steps, after which trials end
KEPT = 4  # one of so many continues
_RESULTS = "trials.json"
Train = Callable[[Config, Path, float], None]  # trains a configuration in a run folder up to this share of its steps
Log = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A pair of peak learning rates."""

    learning_rate: float
    new_module_learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.learning_rate:g}-{self.new_module_learning_rate:g}"

    def settings(self, config: Config) -> Config:
        """`config` with these rates."""
        return config.model_copy(update={"training": config.training.model_copy(update=asdict(self))})


def candidates(training: TrainingSettings) -> list[Trial]:
    """The trials: all rates of the LLM, each with those of the new modules, or with the one that is set."""
    fixed = training.new_module_learning_rate
    return [Trial(*rates) for rates in product(LLM_RATES, NEW_MODULE_RATES if fixed is None else (fixed,))]


def choose_rates(config: Config, folder: Path, train: Train, log: Log) -> tuple[Config, Path, list[dict[str, Any]]]:
    """The configuration with the best rates, the folder of its run so far, and the recall of every trial.

    `folder` holds the runs, and after a kill what they have found. Recalls: `[{learning_rate,
    new_module_learning_rate, recalls}]`, best first, with the validation recall after each share of SHARES that the
    trial reached; -1 where it diverged. Raises ValueError if all did.
    """
    trials = candidates(config.training)
    found = json.loads((folder / _RESULTS).read_text()) if (folder / _RESULTS).exists() else {}
    recalls: dict[Trial, list[float]] = {trial: found.get(trial.name, []) for trial in trials}
    alive = trials
    for rung, share in enumerate(SHARES):
        if len(alive) == 1:
            break
        for number, trial in enumerate(alive, start=1):
            if len(recalls[trial]) <= rung:
                train(trial.settings(config), folder / trial.name, share)
                recalls[trial].append(_recall(folder / trial.name))
                write_atomically(folder / _RESULTS, json.dumps({t.name: r for t, r in recalls.items()}))
                log(f"trial {number} of {len(alive)}, {share:.0%} of the steps, {_description(trial, recalls[trial])}")
        if all(recalls[trial][rung] < 0 for trial in alive):
            raise ValueError(
                "training.learning_rate = auto: every trial diverged (a loss or a gradient was not finite); set it, or "
                "check the weights that training starts from, and the image features"
            )
        ranked = sorted(alive, key=lambda trial: -recalls[trial][rung])  # stable: the first of equals
        alive = ranked[: max(1, len(alive) // KEPT)]
        for trial in ranked[len(alive) :]:
            shutil.rmtree(folder / trial.name, ignore_errors=True)
    best = alive[0]
    log(f"the best learning rates: {_description(best, recalls[best])}")
    order = sorted(trials, key=lambda trial: (-len(recalls[trial]), -recalls[trial][-1]))
    return best.settings(config), folder / best.name, [{**asdict(t), "recalls": recalls[t]} for t in order]


def has_diverged(run_dir: Path) -> bool:
    """Whether the run of this folder ended because a loss or a gradient was not finite."""
    return (run_dir / NAN_BATCH).exists()


def _recall(run_dir: Path) -> float:
    """The recall of the last validation; -1 for a run that has diverged."""
    if has_diverged(run_dir):
        return -1.0
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if RECALL in line]
    return float(lines[-1][RECALL])


def _description(trial: Trial, recalls: list[float]) -> str:
    last = f"validation recall {recalls[-1]:.3f}" if recalls[-1] >= 0 else "diverged"
    return f"LLM {trial.learning_rate:g}, new modules {trial.new_module_learning_rate:g}: {last}"
