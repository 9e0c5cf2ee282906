"""The folder of a training run: which process uses it, and with which settings it was started.

    RUN_DIR/run.json            settings of the run and the precision it chose
    RUN_DIR/metrics.jsonl       the curves
    RUN_DIR/checkpoints/        to resume a killed run from (checkpoints.py)
    RUN_DIR/nan_batch.json      the batch of a loss or a gradient that was not finite, which ended the run

All ranks see the same RUN_DIR (across machines: a shared disk).
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

NAN_BATCH = "nan_batch.json"


@contextmanager
def locked(run_dir: Path, patience_seconds: float = 120) -> Iterator[None]:
    """Lock the folder for this run while the block runs; a kill releases the lock. Only the first rank takes it.

    A run that was just killed may keep the lock for some seconds, until its memory is freed. Raises ValueError if
    another process still has it after `patience_seconds`: each would delete the drafts of the other.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        if not _try_lock(lock):
            print(f"another training run uses {run_dir}: waiting up to {patience_seconds:g} s", file=sys.stderr)
            end = time.monotonic() + patience_seconds
            while not _try_lock(lock):
                if time.monotonic() >= end:
                    raise ValueError(f"another training run uses {run_dir}: wait for it, or stop it")
                time.sleep(0.2)
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_run(run_dir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run.json of this run folder; {} for a new one.

    Raises ValueError, naming the first difference, if the folder holds a run with other settings. Its checkpoints
    cannot be resumed with these, and only a person can decide to throw hours of work away.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        saved = dict(run["settings"])
        run["precision"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}): give --run-dir a new folder") from e
    for key in sorted({*settings, *saved}):
        if saved.get(key) != settings.get(key):
            raise ValueError(
                f"{run_dir} holds a training run with {key} = {saved.get(key)}, not {settings.get(key)}: "
                "give --run-dir a new folder, or resume with the same settings"
            )
    return run
