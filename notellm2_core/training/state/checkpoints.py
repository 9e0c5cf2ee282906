"""The checkpoints from which a killed run goes on, written while the training does.

    WORK/checkpoints/step-N/            DeepSpeed's checkpoint after N steps
    WORK/checkpoints/step-N/rank-R.json sizes and checksums of the files that rank R wrote

A save copies weights and optimiser state into memory, which is quick, and a thread of each rank writes the copies. When
all ranks have written, and their files are on the disk, the folder gets its name: a kill leaves at most a draft. The
last `num_kept` are kept, and one whose files are not what was written is passed over for the one before. All ranks see
the same folder. DeepSpeed's checkpoints are pickles, so only those of this run's own WORK are ever loaded.
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
        self, folder: Path, every_steps: int = 1, every_minutes: float | None = None, num_kept: int = 2
    ) -> None:
        self.folder = folder
        self._every_steps, self._every_minutes, self._num_kept = every_steps, every_minutes, num_kept
        self._last_save = time.monotonic()
        self._step: int | None = None  # of the save that goes on
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def last_step(self) -> int:
        """The steps of the last checkpoint whose files are all what was written; 0 without one."""
        for step in reversed(self._steps()):
            if self._is_whole(self.folder / f"step-{step}"):
                return step
            _warn(f"the checkpoint {self.folder / f'step-{step}'} is damaged: going on from the one before")
        return 0

    def num_ranks(self, step: int) -> int:
        """How many ranks saved the checkpoint of `step`."""
        return len(list((self.folder / f"step-{step}").glob("rank-*.json")))

    def load(self, engine: Any, step: int) -> None:
        """Weights and optimiser after `step` steps into `engine`, saved by as many ranks as there are now."""
        path, _ = engine.load_checkpoint(str(self.folder), tag=f"step-{step}", load_lr_scheduler_states=False)
        assert path is not None, f"DeepSpeed did not load step-{step} of {self.folder}"

    def due(self, step: int) -> bool:
        """Whether the number of steps says so, or the clock of the first rank."""
        if step % self._every_steps == 0 or self._every_minutes is None:
            return step % self._every_steps == 0
        late = dist.get_rank() == 0 and time.monotonic() - self._last_save >= 60 * self._every_minutes
        return bool(_summed(torch.tensor([int(late)]))[0])

    def save(self, engine: Any, step: int) -> None:
        """Begin to save what `engine` holds after `step` steps. A save that still goes on is waited for."""
        self.settle(wait=True)
        self._last_save = time.monotonic()
        draft = self.folder / f"draft-{step}"
        error = self._prepare(draft, step) if dist.get_rank() == 0 else None
        if _summed(torch.tensor([int(error is not None)]))[0]:
            _warn(f"no checkpoint after step {step} ({error or 'see the first rank'}); the training goes on")
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
        """An empty folder for the draft. What killed runs have left goes, and checkpoints that were passed over."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            passed = [self.folder / f"step-{other}" for other in self._steps() if other >= step]
            for left in (*self.folder.glob("draft-*"), *self.folder.glob("universal-*"), *passed):
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir()
        except OSError as e:
            return e
        return None

    def settle(self, wait: bool = False) -> None:
        """Give the save that goes on its name, if all ranks have written their parts; `wait` for them.

        Where the disk of a rank takes no more, the former checkpoints stay, and the training goes on. Raises
        RuntimeError on every rank where one has failed for another reason.
        """
        if self._step is None or self._writing is None:
            return
        if wait:
            self._writing.exception()
        busy = not self._writing.done()
        error = None if busy else self._writing.exception()
        of_disk = isinstance(error, OSError)
        states = torch.tensor([busy, of_disk, error is not None and not of_disk], dtype=torch.int64)
        num_busy, num_without_disk, num_broken = _summed(states).tolist()
        if num_busy:
            return
        step, self._step, self._writing = self._step, None, None
        if num_broken:
            raise RuntimeError(
                f"the checkpoint after step {step} could not be made ({error or 'see the other ranks'})"
            ) from error
        if of_disk:
            _warn(f"the checkpoint after step {step} could not be written ({error}); the training goes on")
        if dist.get_rank() == 0:
            if not num_without_disk:
                self._keep(step)
            shutil.rmtree(self.folder / f"draft-{step}", ignore_errors=True)  # where it has got no name
        dist.barrier()

    def _keep(self, step: int) -> None:
        """The draft of `step` gets its name, and then the oldest one goes."""
        draft, name = self.folder / f"draft-{step}", self.folder / f"step-{step}"
        try:
            sync(draft)
            os.rename(draft, name)
            sync(self.folder)
            for old in self._steps()[: -self._num_kept]:
                shutil.rmtree(self.folder / f"step-{old}")
        except OSError as e:
            what = "older ones could not be removed after that of" if name.exists() else "none could be kept after"
            _warn(f"checkpoints: {what} step {step} ({e}); the training goes on")

    def close(self) -> None:
        """Wait for what is being written."""
        self.settle(wait=True)
        self.stop()

    def stop(self) -> None:
        """Wait for this rank's writer alone: nothing is written after this training."""
        self._writer.shutdown()

    def _steps(self) -> list[int]:
        names = (p.name.removeprefix("step-") for p in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def _is_whole(self, checkpoint: Path) -> bool:
        """Each rank looks at its share of the files; the answer is the same on all."""
        listed: dict[str, list[Any]] = {}
        ranks = sorted(checkpoint.glob("rank-*.json"))
        try:
            for file in ranks:
                written = json.loads(file.read_text())
                listed |= written["files"] if written["num_ranks"] == len(ranks) else {"missing": [1]}
        except (OSError, ValueError, KeyError, TypeError):  # the last: JSON, but not what was written
            listed = {}
        mine = sorted(listed)[dist.get_rank() :: dist.get_world_size()]
        wrong = not listed or any(_facts(checkpoint / name) != listed[name] for name in mine)
        return not _summed(torch.tensor([int(wrong)]))[0]


class _Copies:
    """Takes the place of DeepSpeed's checkpoint engine during a save: keeps copies, writes nothing."""

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
        return False  # a copy holds no more than what is seen of it


def _copied(value: Any) -> Any:
    """`value` with copies of its tensors in main memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(of)) for key, of in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copied(of) for of in value)
    return value


def _write(files: dict[Path, Any], draft: Path, rank: int, num_ranks: int) -> None:
    facts = {}
    for path, state in files.items():
        with path.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as e:
                if isinstance(e.__context__, OSError):  # torch hides the disk's error behind one of its own
                    raise e.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        facts[path.name] = _facts(path)
    write_atomically(draft / f"rank-{rank}.json", json.dumps({"num_ranks": num_ranks, "files": facts}))


def _facts(path: Path) -> list[Any]:
    """Size and checksum; [] where the file cannot be read."""
    try:
        return [path.stat().st_size, sha256_of(path)]
    except OSError:
        return []


def _summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, on the CPU."""
    on_device = values.cuda() if dist.get_backend() == "nccl" else values
    dist.all_reduce(on_device)
    return on_device.cpu()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
