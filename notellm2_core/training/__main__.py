"""Fine-tune the model: one process per rank, started by a launcher; a single rank needs none.

    torchrun --standalone --nproc-per-node 2 -m notellm2_core.training --config pipelines/configs/demo.yaml \
        --notes DIR --images DIR --store DIR --pairs DIR --run-dir DIR --out DIR

The same command with the same --run-dir resumes a killed run.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from notellm2_core.config.load import load_config
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.processes import die_with_parent, is_torchrun_rank
from notellm2_core.training.launch import SHARE_HELP, TRAIN_DAYS_HELP, Paths, Reports, Start


def main() -> None:
    if "WORLD_SIZE" in os.environ:  # a launcher's rank; without one, the parent is a shell, which may end before us
        die_with_parent("torch" if is_torchrun_rank() else None)
    parser = argparse.ArgumentParser(prog="python -m notellm2_core.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    NoteInputs.add_arguments(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--run-dir", type=Path, required=True, help="checkpoints and curves; the same again to resume")
    parser.add_argument("--out", type=Path, required=True, help="empty folder for the trained model")
    parser.add_argument("--hard-negatives", type=Path, help="folder that notellm2_core.retrieval.hard_negatives wrote")
    parser.add_argument("--start-model", type=Path, help="trained model to start from; default: the pretrained one")
    parser.add_argument("--start-release", default="", help="id of its release; for the model card alone")
    parser.add_argument("--start-weeks", default="", help="weeks that it has seen, by commas; for the model card alone")
    parser.add_argument("--train-days", nargs=2, metavar=("START", "END"), help=TRAIN_DAYS_HELP)
    parser.add_argument("--share", type=float, default=1.0, help=SHARE_HELP)
    parser.add_argument("--mlflow-uri", help="tracking server for the curves")
    parser.add_argument("--mlflow-run-id")
    args = parser.parse_args()
    with user_errors(), _pipes_log() as log:
        config = load_config(args.config)
        from notellm2_core.training.run import run  # imports torch: only once the configuration is valid

        start = None
        if args.start_model is not None:
            weeks = tuple(week for week in args.start_weeks.split(",") if week)
            start = Start(args.start_model, args.start_release, weeks)
        paths = Paths(NoteInputs.of(args), args.pairs, args.run_dir, args.out, args.hard_negatives, start)
        if not 0 < args.share <= 1:
            raise ValueError(f"--share {args.share:g} is not above 0 and at most 1.")
        run(config, paths, Reports(log, args.mlflow_uri, args.mlflow_run_id), args.train_days, args.share)


@contextmanager
def _pipes_log() -> Iterator[Callable[[str], None] | None]:
    """Yields what writes a line into the log of the Dagster step that started this command; None without a step."""
    if "DAGSTER_PIPES_CONTEXT" not in os.environ or not _is_first_rank():
        yield None
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        yield pipes.log.info


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
