"""Whether a run learns: a sentence for one that does not, which names the settings to change. It never stops a run."""

import math

from notellm2_core.config.training import TrainingSettings
from notellm2_core.training.state.metrics import Progress
from notellm2_core.training.validation import RECALL

WINDOW_STEPS = 20
_MIN_SHARE = 0.98


def learned_nothing(progress: Progress, training: TrainingSettings, num_steps: int, done: int) -> str | None:
    """What to change if the model knows no more than before the first step; None if it does, or it is too early.

    The signs, together, at a validation 20 steps or more after the warm-up:
    - over the last 20 steps, the multimodal loss is at least 98 % of that of equal embeddings (`loss_vs_chance`), which
      is ln(2B - 1) without known positives;
    - the validation recall is not above that of the model before its first step.

    One that collapses and recovers within the warm-up is not reported, nor one that learns slowly: its recall rises. On
    the demo world the ratio is below 0.9 when the warm-up ends. Where training has failed, we have seen 0.98 and more.
    """
    if done < math.ceil(training.warmup_ratio * num_steps) + WINDOW_STEPS:
        return None
    at_start, recalls = progress.series(RECALL, last=0), progress.series(RECALL, first=1, last=done)
    shares = progress.series("loss_vs_chance", first=done - WINDOW_STEPS + 1, last=done)
    if not (at_start and recalls and shares):
        return None
    share, recall = sum(shares) / len(shares), recalls[-1]
    if share < _MIN_SHARE or recall > at_start[0]:
        return None
    return (
        f"after {done} steps the model has learned nothing: the loss is {share:.3f} times that of equal embeddings, "
        f"and the validation recall is {recall:.3f}, {at_start[0]:.3f} before training. Lower training.learning_rate "
        f"(now {training.learning_rate:g}) and training.new_module_learning_rate, to a tenth for example, or raise "
        f"training.warmup_ratio (now {training.warmup_ratio:g}); if that does not help, look at the pairs in the data "
        "card"
    )
