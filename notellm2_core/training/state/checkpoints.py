"""Checkpoints to resume a killed run from, written in the background.

    RUN_DIR/checkpoints/step-N/            DeepSpeed's checkpoint after N steps
    RUN_DIR/checkpoints/step-N/rank-R.json sizes and checksums of the files that rank R wrote

A save copies weights and optimiser state into memory, which is quick, and a thread of each rank writes the copies. When
all ranks have written, and their files are on the disk, the folder is renamed from `draft-N`: a kill leaves at most a
draft. The last `num_checkpoints` stay. A checkpoint whose files do not match their checksums is skipped for the one
before. All ranks see the same folder. DeepSpeed's checkpoints are pickles, so only those of this run's own RUN_DIR are
ever loaded.
"""

import json
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from notellm2_core.runtime.files import sha256_of, sync, write_atomically


class Checkpoints:
    """DeepSpeed checkpoints in `folder`. Every method is called on all ranks."""

    def __init__(
        self, folder: Path, every_steps: int = 1, every_minutes: float | None = None, num_checkpoints: int = 2
    ) -> None:
        self.folder = folder
        self._every_steps, self._every_minutes, self._num_checkpoints = every_steps, every_minutes, num_checkpoints
        self._last_save = time.monotonic()
        self._step: int | None = None  # of the save that is being written
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def last_step(self) -> int:
        """The steps of the last checkpoint whose files all match their checksums; 0 without one."""
        for step in reversed(self._steps()):
            if self._is_whole(self.folder / f"step-{step}"):
                return step
            _warn(f"the checkpoint {self.folder / f'step-{step}'} is damaged: using the one before")
        return 0

    def num_ranks(self, step: int) -> int:
        """How many ranks saved the checkpoint of `step`."""
        return len(list((self.folder / f"step-{step}").glob("rank-*.json")))

    def load(self, engine: Any, step: int) -> None:
        """Load weights and optimiser after `step` steps into `engine`. The number of ranks is that of the save."""
        path, _ = engine.load_checkpoint(str(self.folder), tag=f"step-{step}", load_lr_scheduler_states=False)
        assert path is not None, f"DeepSpeed did not load step-{step} of {self.folder}"

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due, by the number of steps or by the clock of the first rank."""
        if step % self._every_steps == 0 or self._every_minutes is None:
            return step % self._every_steps == 0
        late = dist.get_rank() == 0 and time.monotonic() - self._last_save >= 60 * self._every_minutes
        return bool(summed(torch.tensor([int(late)]))[0])

    def save(self, engine: Any, step: int) -> None:
        """Start to save the state of `engine` after `step` steps, once the previous save is complete."""
        self.settle(wait=True)
        self._last_save = time.monotonic()
        draft = self.folder / f"draft-{step}"
        error = self._prepare(draft, step) if dist.get_rank() == 0 else None
        if summed(torch.tensor([int(error is not None)]))[0]:
            _warn(f"no checkpoint after step {step} ({error or 'see the first rank'}); training continues")
            return
        copies = _Copies()
        usual, engine.checkpoint_engine = engine.checkpoint_engine, copies
        engine._copy_recovery_script = lambda folder: None  # DeepSpeed would write scripts beside, on one rank alone
        try:
            engine.save_checkpoint(str(self.folder), tag=draft.name, save_latest=False)
        finally:
            engine.checkpoint_engine = usual
            del engine._copy_recovery_script
        self._step, self._writing = (
            step,
            self._writer.submit(_write, copies.files, draft, dist.get_rank(), dist.get_world_size()),
        )

    def _prepare(self, draft: Path, step: int) -> OSError | None:
        """Make an empty folder for the draft. Remove what killed runs have left, and checkpoints that were skipped."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            skipped = [self.folder / f"step-{other}" for other in self._steps() if other >= step]
            for folder in (*self.folder.glob("draft-*"), *self.folder.glob("universal-*"), *skipped):
                shutil.rmtree(folder, ignore_errors=True)
            draft.mkdir()
        except OSError as e:
            return e
        return None

    def settle(self, wait: bool = False) -> None:
        """Publish the current save if all ranks have written their files. With `wait`, wait for this rank's.

        If the disk of a rank is full, the previous checkpoints stay and training continues. Raises RuntimeError on
        every rank if one has failed for another reason.
        """
        if self._step is None or self._writing is None:
            return
        if wait:
            self._writing.exception()
        busy = not self._writing.done()
        error = None if busy else self._writing.exception()
        is_disk_error = isinstance(error, OSError)
        states = torch.tensor([busy, is_disk_error, error is not None and not is_disk_error], dtype=torch.int64)
        num_busy, num_without_disk, num_broken = summed(states).tolist()
        if num_busy:
            return
        step, self._step, self._writing = self._step, None, None
        if num_broken:
            raise RuntimeError(
                f"the checkpoint after step {step} could not be made ({error or 'see the other ranks'})"
            ) from error
        if is_disk_error:
            _warn(f"the checkpoint after step {step} could not be written ({error}); training continues")
        if dist.get_rank() == 0:
            if not num_without_disk:
                self._publish(step)
            shutil.rmtree(self.folder / f"draft-{step}", ignore_errors=True)  # if it was not published
        dist.barrier()

    def _publish(self, step: int) -> None:
        """Rename the draft of `step`, then remove the oldest checkpoints."""
        draft, name = self.folder / f"draft-{step}", self.folder / f"step-{step}"
        try:
            sync(draft)
            os.rename(draft, name)
            sync(self.folder)
            for old in self._steps()[: -self._num_checkpoints]:
                shutil.rmtree(self.folder / f"step-{old}")
        except OSError as e:
            if name.exists():
                _warn(f"checkpoints before step {step} could not be removed ({e})")
            else:
                _warn(f"the checkpoint after step {step} could not be saved ({e}); training continues")

    def close(self) -> None:
        """Complete the current save, then stop."""
        self.settle(wait=True)
        self.stop()

    def stop(self) -> None:
        """Wait for this rank's writer: nothing is written after the run has ended."""
        self._writer.shutdown()

    def resumable_steps(self) -> set[int]:
        """The steps of the checkpoints that are whole, and of the one that is being written."""
        return {*self._steps(), *([] if self._step is None else [self._step])}

    def _steps(self) -> list[int]:
        names = (p.name.removeprefix("step-") for p in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def _is_whole(self, checkpoint: Path) -> bool:
        """Whether all files match their checksums. Each rank reads its share of them; the answer is the same on all."""
        listed: dict[str, list[Any]] = {}
        ranks = sorted(checkpoint.glob("rank-*.json"))
        try:
            for file in ranks:
                written = json.loads(file.read_text())
                listed |= written["files"] if written["num_ranks"] == len(ranks) else {"missing": [1]}
        except (OSError, ValueError, KeyError, TypeError):  # the last: JSON of another form
            listed = {}
        mine = sorted(listed)[dist.get_rank() :: dist.get_world_size()]
        wrong = not listed or any(_checksum(checkpoint / name) != listed[name] for name in mine)
        return not summed(torch.tensor([int(wrong)]))[0]


class _Copies:
    """Replaces DeepSpeed's checkpoint engine during a save: keeps copies in memory, writes nothing."""

    def __init__(self) -> None:
        self.files: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = _copied(state_dict)

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False  # a copy of a view holds the view's numbers alone


def _copied(value: Any) -> Any:
    """`value` with copies of its tensors in main memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copied(item) for item in value)
    return value


def _write(files: dict[Path, Any], draft: Path, rank: int, num_ranks: int) -> None:
    checksums = {}
    for path, state in files.items():
        with path.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as e:
                if isinstance(e.__context__, OSError):  # torch replaces the disk's error by one of its own
                    raise e.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        checksums[path.name] = _checksum(path)
    write_atomically(draft / f"rank-{rank}.json", json.dumps({"num_ranks": num_ranks, "files": checksums}))


def _checksum(path: Path) -> list[Any]:
    """[size, SHA-256] of a file; [] if it cannot be read."""
    try:
        return [path.stat().st_size, sha256_of(path)]
    except OSError:
        return []


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, on the CPU."""
    on_device = values.cuda() if dist.get_backend() == "nccl" else values
    dist.all_reduce(on_device)
    return on_device.cpu()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
