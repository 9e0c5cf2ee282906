"""Whether a run learns: a sentence for one that does not, which names the settings to change. It never stops a run."""

import math

from notellm2_core.config.training import TrainingSettings
from notellm2_core.training.state.metrics import RECALL, Progress

WINDOW_STEPS = 20
_MIN_SHARE = 0.98


def learned_nothing(
    progress: Progress, training: TrainingSettings, num_steps: int, done: int, num_pairs: int
) -> str | None:
    """What to change if the model knows no more than before the first step; None if it does, or it is too early.

    The signs, together, at a validation on `num_pairs` pairs, at least 20 steps after the warm-up:
    - over the last 20 steps, the multimodal loss is at least 98 % of that of equal embeddings (`loss_vs_chance`), which
      is ln(2B - 1) without known positives;
    - the validation recall is not above that before the first step, by more than two standard errors of the difference.

    On the demo world the ratio is 0.99 and more in steps 4 to 9, and 0.66 in steps 21 to 40. Where the embeddings have
    fallen to one point, it stays at 0.98 and more for a hundred steps.
    """
    if done < math.ceil(training.warmup_ratio * num_steps) + WINDOW_STEPS:
        return None
    at_start, recalls = progress.series(RECALL, last=0), progress.series(RECALL, first=1, last=done)
    shares = progress.series("loss_vs_chance", first=done - WINDOW_STEPS + 1, last=done)
    if not (at_start and recalls and shares):
        return None
    share, before, after = sum(shares) / len(shares), at_start[0], recalls[-1]
    mean = (before + after) / 2
    if share < _MIN_SHARE or after - before > 2 * math.sqrt(2 * mean * (1 - mean) / num_pairs):
        return None
    centre = "" if training.centre_embeddings else "set training.centre_embeddings = true, or "
    return (
        f"after {done} steps the model has learned nothing: the loss is {share:.3f} times that of equal embeddings, "
        f"and the validation recall is {after:.3f}, {before:.3f} before training. Learning rates that are too high do "
        f"this: {centre}lower training.learning_rate (now {training.rates.llm:g}) and "
        f"training.new_module_learning_rate, to a tenth for example, or raise training.warmup_ratio (now "
        f"{training.warmup_ratio:g}). If the loss has not moved since the first step, they are too low"
    )
