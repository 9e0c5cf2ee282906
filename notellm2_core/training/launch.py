"""How the training command is started. Imports no torch."""

import os
import sys
from pathlib import Path

from notellm2_core.config import Training

ERROR_FILE = "error.txt"  # in WORK: why the last run stopped, where the user can mend it
TRAIN_DAYS_HELP = "the days of the log that the pairs are of, the second exclusive; for the model card alone"


def launch_command(
    config_file: Path,
    training: Training,
    *,
    notes: Path,
    images: Path,
    store: Path,
    pairs: Path,
    work: Path,
    out: Path,
    train_days: tuple[str, str] | None = None,
    mlflow_uri: str | None = None,
    mlflow_run_id: str | None = None,
) -> list[str]:
    """The command that trains, ready for `subprocess` or a shell: torchrun, to be run on each of several nodes; or,
    with a hostfile, DeepSpeed's launcher, which reaches the nodes by ssh.

    Cores are shared out over the ranks unless OMP_NUM_THREADS is set (torchrun would give each rank one thread).
    """
    module = "notellm2_core.training"
    if training.hostfile is not None:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(training.hostfile)]
        command += ["--num_nodes", str(training.num_nodes), "--num_gpus", str(training.num_ranks), "--module", module]
    else:
        where = ["--standalone"]
        if training.rendezvous is not None:
            where = ["--nnodes", str(training.num_nodes), "--rdzv-backend", "c10d", "--rdzv-id", work.name]
            where += ["--rdzv-endpoint", training.rendezvous]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
        command = [*torchrun, "--nproc-per-node", str(training.num_ranks), "-m", module]
    if "OMP_NUM_THREADS" not in os.environ:
        command = ["env", f"OMP_NUM_THREADS={num_threads(training.num_ranks)}", *command]
    folders = {"notes": notes, "images": images, "store": store, "pairs": pairs, "work": work, "out": out}
    command += ["--config", str(config_file)]
    for name, folder in folders.items():
        command += [f"--{name}", str(folder)]
    if train_days:
        command += ["--train-days", *train_days]
    if mlflow_uri and mlflow_run_id:
        command += ["--mlflow-uri", mlflow_uri, "--mlflow-run-id", mlflow_run_id]
    return command


def num_threads(num_ranks: int) -> int:
    """Threads of each rank, so that all ranks of a machine together have as many as it has cores."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)
