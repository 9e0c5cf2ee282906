"""Which weights of a run become the model: those after the last step, or the best by validation recall.

    RUN_DIR/best/step-N.safetensors   the trained weights after N steps, if training.select = best
    RUN_DIR/best/step-N.json          the validation recall of these weights, and the checksum of that file

A step is here if its recall is higher than that of every validation before it; the JSON comes last. A run resumes from
a checkpoint, so the best step up to each checkpoint stays, and steps after the checkpoint are removed: they are
validated again. All ranks see the same folder.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from notellm2_core.config.training import SelectionSettings
from notellm2_core.runtime.files import sha256_of, write_atomically, written_whole
from notellm2_core.training.state.checkpoints import summed
from notellm2_core.training.state.save import load_trained, trained_weights


class Selection:
    """The best validation of a run so far. Every method is called on all ranks."""

    def __init__(self, folder: Path, settings: SelectionSettings, first_step: int) -> None:
        """`first_step`: the steps of the checkpoint that the run resumes from; 0: it begins."""
        self._folder, self._settings = folder, settings
        self.best_step, self.best_recall = 0, -1.0  # before the first validation
        if settings.selects:
            if dist.get_rank() == 0:
                self._remove({step for step in self._steps() if step > first_step})
                self.best_step = max(self._steps(), default=0)
                self.best_recall = float(self._record(self.best_step)["recall"]) if self.best_step else -1.0
            self.best_step, self.best_recall = int(_first_ranks(self.best_step)), _first_ranks(self.best_recall)

    def chosen_step(self, last_step: int) -> int:
        """The step whose weights become the model."""
        return self.best_step if self._settings.select == "best" else last_step

    def add(self, step: int, recall: float, module: nn.Module, checkpoint_steps: Collection[int]) -> None:
        """Take note of the validation after `step` steps; keep the trained weights of `module` if they are the best.

        `checkpoint_steps`: those of the checkpoints that the run may resume from. Raises OSError on every rank if the
        weights could not be written.
        """
        recall = _first_ranks(recall)
        if not self._settings.selects or recall <= self.best_recall:
            return
        weights = trained_weights(module) if self._settings.select == "best" else None
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                record: dict[str, Any] = {"step": step, "recall": recall}
                if weights is not None:
                    with written_whole(self._weights(step)) as draft:
                        save_file(weights, draft)
                    record["sha256"] = sha256_of(self._weights(step))
                write_atomically(self._folder / f"step-{step}.json", json.dumps(record))
                self._remove(self._steps() - self._needed(checkpoint_steps))
            except (OSError, SafetensorError) as e:
                error = e
        if summed(torch.tensor([int(error is not None)]))[0]:
            raise OSError(
                f"the best weights so far, those after step {step}, could not be written into {self._folder} "
                f"({error or 'see the first rank'}): make room, and run the same command again to resume"
            )
        self.best_step, self.best_recall = step, recall

    def stops(self, step: int) -> bool:
        """Whether `training.patience` ends the run after `step` steps: so many validations were no better."""
        patience = self._settings.patience
        if patience is None or not self.best_step:
            return False
        return step - self.best_step >= patience * self._settings.validate_every_steps

    def restore(self, module: nn.Module) -> None:
        """Give `module` the best weights, if these become the model. Raises ValueError if their file is damaged."""
        if self._settings.select != "best":
            return
        path, weights = self._weights(self.best_step), None
        if dist.get_rank() == 0:
            if not path.exists() or sha256_of(path) != self._record(self.best_step)["sha256"]:
                raise ValueError(f"{path} is damaged: train again with another --run-dir")
            weights = load_file(path)
        load_trained(module, weights)

    def _needed(self, checkpoint_steps: Collection[int]) -> set[int]:
        """The best step of all, and that up to each checkpoint."""
        steps = self._steps()
        return {max(steps), *(max(s for s in steps if s <= c) for c in checkpoint_steps if c >= min(steps))}

    def _steps(self) -> set[int]:
        return {int(path.stem.removeprefix("step-")) for path in self._folder.glob("step-*.json")}

    def _weights(self, step: int) -> Path:
        return self._folder / f"step-{step}.safetensors"

    def _record(self, step: int) -> dict[str, Any]:
        path = self._folder / f"step-{step}.json"
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            float(record["recall"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e!r}): train again with another --run-dir") from e
        return record

    def _remove(self, steps: Collection[int]) -> None:
        for step in steps:  # the record first: a record without weights would be damage
            (self._folder / f"step-{step}.json").unlink()
            self._weights(step).unlink(missing_ok=True)


def _first_ranks(value: float) -> float:
    """The first rank's value, on every rank."""
    return float(summed(torch.tensor([value if dist.get_rank() == 0 else 0.0], dtype=torch.float64))[0])
