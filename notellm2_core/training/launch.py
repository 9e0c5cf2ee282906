"""The arguments of the training command, and how it is launched. Imports no torch."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from notellm2_core.config.training import TrainingSettings
from notellm2_core.notes.inputs import NoteInputs

TRAIN_DAYS_HELP = "first day and (exclusive) end of the log behind the pairs; for the model card alone"
SHARE_HELP = "stop after this share of the steps, validated and without a model; a larger share continues; default: 1"


@dataclass(frozen=True)
class Start:
    """A trained model that a run starts from, in place of the pretrained one (warm start)."""

    model: Path
    release: str  # its id
    weeks: tuple[str, ...]  # that it and its predecessors have trained on; first days

    def arguments(self) -> list[str]:
        """As options of the command."""
        return [
            "--start-model",
            str(self.model),
            "--start-release",
            self.release,
            "--start-weeks",
            ",".join(self.weeks),
        ]


@dataclass(frozen=True)
class Paths:
    """The folders of one training run."""

    inputs: NoteInputs
    pairs: Path  # with train/ and validation/
    run_dir: Path  # checkpoints and curves; the same again to resume
    out: Path  # empty; for the trained model
    hard_negatives: Path | None = None  # needed if training.hard_negatives.num is above 0
    start: Start | None = None  # None: the pretrained model

    def arguments(self) -> list[str]:
        """These paths as options of the command."""
        options = ["--pairs", str(self.pairs), "--run-dir", str(self.run_dir), "--out", str(self.out)]
        if self.hard_negatives is not None:
            options += ["--hard-negatives", str(self.hard_negatives)]
        if self.start is not None:
            options += self.start.arguments()
        return [*self.inputs.arguments(), *options]


@dataclass(frozen=True)
class Reports:
    """Where the metrics go besides the terminal and metrics.jsonl."""

    log: Callable[[str], None] | None = None  # Dagster Pipes; the command finds it through its environment
    mlflow_uri: str | None = None
    mlflow_run_id: str | None = None

    def arguments(self) -> list[str]:
        """These reports as options of the command."""
        if not self.mlflow_uri or not self.mlflow_run_id:
            return []
        return ["--mlflow-uri", self.mlflow_uri, "--mlflow-run-id", self.mlflow_run_id]


NO_REPORTS = Reports()


def launch_command(
    config_file: Path,
    training: TrainingSettings,
    paths: Paths,
    reports: Reports = NO_REPORTS,
    train_days: tuple[str, str] | None = None,
) -> list[str]:
    """The training command, ready for `subprocess` or a shell.

    One rank is started directly. Several are started by torchrun, on each node; or, with a hostfile, by DeepSpeed's
    launcher, which reaches the nodes by ssh.
    """
    module, num_ranks = "notellm2_core.training", training.num_ranks
    if training.hostfile is not None:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(training.hostfile)]
        command += ["--num_nodes", str(training.num_nodes), "--num_gpus", str(num_ranks)]
        command += ["--no_local_rank", "--module", module]  # the rank comes in the environment, as torchrun gives it
        command = _with_threads(command, num_ranks)
    elif training.rendezvous is not None:
        rendezvous = ["--nnodes", str(training.num_nodes), "--rdzv-backend", "c10d", "--rdzv-id", paths.run_dir.name]
        command = torchrun(module, num_ranks, [*rendezvous, "--rdzv-endpoint", training.rendezvous])
    else:
        command = torchrun(module, num_ranks)
    command += ["--config", str(config_file), *paths.arguments()]
    if train_days:
        command += ["--train-days", *train_days]
    return command + reports.arguments()


def torchrun(module: str, num_ranks: int, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
    """The beginning of a command that runs `module` in `num_ranks` processes on this machine; one needs no launcher.

    The ranks divide the cores among them unless OMP_NUM_THREADS is set (torchrun would give each rank one thread).
    """
    if num_ranks == 1 and tuple(rendezvous) == ("--standalone",):
        return [sys.executable, "-m", module]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        "--nproc-per-node",
        str(num_ranks),
        "-m",
        module,
    ]
    return _with_threads(command, num_ranks)


def _with_threads(command: list[str], num_ranks: int) -> list[str]:
    return (
        command if "OMP_NUM_THREADS" in os.environ else ["env", f"OMP_NUM_THREADS={num_threads(num_ranks)}", *command]
    )


def num_threads(num_ranks: int) -> int:
    """Threads per rank: the cores of this machine, divided among its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)
