"""The work folder of a training: whose it is, and what it was begun with.

    WORK/run.json               settings of the run and the precision it chose
    WORK/metrics.jsonl          the curves
    WORK/checkpoints/           from which a killed run goes on (checkpoints.py)

All ranks see the same WORK (across machines: a shared disk).
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


@contextmanager
def held(work: Path, patience_seconds: float = 120) -> Iterator[None]:
    """Keep this folder for the first rank while the block runs; a kill releases it. Does nothing on other ranks.

    A training that was just killed may hold it for some seconds more, until its memory is given back. Raises
    ValueError where one still does after `patience_seconds`: each would delete what the other has begun to write.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as lock:
        if not _locked(lock):
            print(f"another training is at work in {work}: waiting {patience_seconds:g} s for its end", file=sys.stderr)
            end = time.monotonic() + patience_seconds
            while not _locked(lock):
                if time.monotonic() >= end:
                    raise ValueError(f"another training is at work in {work}: wait for it, or stop it")
                time.sleep(0.2)
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_run(work: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run.json of this work folder; {} for a new one.

    Raises ValueError, naming the first difference, where the folder holds a training with other settings: its
    checkpoints cannot be continued with these, and throwing hours of work away is not for a program to decide.
    """
    path = work / "run.json"
    if not path.exists():
        return {}
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        there = dict(run["settings"])
        run["precision"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}): give --work a new folder, or delete this one") from e
    for key in sorted({*settings, *there}):
        if there.get(key) != settings.get(key):
            raise ValueError(
                f"{work} holds a training with {key} = {there.get(key)}, not {settings.get(key)}: "
                "give --work a new folder, or delete this one"
            )
    return run
