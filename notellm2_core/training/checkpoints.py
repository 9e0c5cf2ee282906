"""The work folder of a training: whose it is, and the checkpoints from which a killed run goes on.

    WORK/run.json               settings of the run and the precision it chose
    WORK/metrics.jsonl          the curves
    WORK/checkpoints/step-N     DeepSpeed's checkpoint after N steps
    WORK/checkpoints/latest     the name of the last complete one, written last

A checkpoint is written under another name, moved, and only then named in `latest`; a kill leaves at most a folder that
nothing points to. The two last complete ones are kept. All ranks see the same WORK (across machines: a shared disk).
DeepSpeed's checkpoints are pickles, so only those of this run's own WORK are ever loaded.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from notellm2_core.lake import write_atomically

_NUM_KEPT = 2
_LATEST = "latest"


class Checkpoints:
    """DeepSpeed checkpoints in `folder`. Every method is called on all ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> str | None:
        """The name of the last complete checkpoint."""
        pointer = self.folder / _LATEST
        return pointer.read_text().strip() if pointer.exists() else None

    def latest_step(self) -> int:
        """How many steps it holds; 0 without one."""
        name = self.latest()
        return int(name.removeprefix("step-")) if name else 0

    def load(self, engine: Any) -> None:
        """Weights and optimiser of the last complete checkpoint into `engine`."""
        path, _ = engine.load_checkpoint(str(self.folder), tag=self.latest(), load_lr_scheduler_states=False)
        assert path is not None, f"DeepSpeed did not load {self.latest()} of {self.folder}"

    def save(self, engine: Any, step: int) -> None:
        import torch.distributed as dist

        name, draft = f"step-{step}", f"draft-{step}"
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob("draft-*"), self.folder / name):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()
        engine.save_checkpoint(str(self.folder), tag=draft, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            _sync(self.folder / draft)
            os.rename(self.folder / draft, self.folder / name)
            write_atomically(self.folder / _LATEST, name)
            steps = sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))
            for old in steps[:-_NUM_KEPT]:
                shutil.rmtree(self.folder / f"step-{old}")
        dist.barrier()


@contextmanager
def held(work: Path) -> Iterator[None]:
    """Keep this folder for the first rank while the block runs; a kill releases it. Does nothing on other ranks.

    Raises ValueError where another training holds it: each would delete what the other has begun to write.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another training is at work in {work}: wait for it, or stop it") from None
        yield


def open_work(work: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run.json of this work folder; {} for a new one.

    Raises ValueError, naming the first difference, where the folder holds a training with other settings: its
    checkpoints cannot be continued with these, and throwing hours of work away is not for a program to decide.
    """
    path = work / "run.json"
    if not path.exists():
        return {}
    run: dict[str, Any] = json.loads(path.read_text())
    there = run["settings"]
    for key in sorted({*settings, *there}):
        if there.get(key) != settings.get(key):
            raise ValueError(
                f"{work} holds a training with {key} = {there.get(key)}, not {settings.get(key)}: "
                "give --work a new folder, or delete this one"
            )
    return run


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
