"""What the data foretell before a model is trained on them: one sentence each, with the settings that would help."""

from datetime import date
from math import sqrt
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.config.data import PairSettings

_SINGLE_USER_SHARE = 0.5  # of the training pairs, from which on chance outweighs what users have in common
_LONG_DAYS = 28  # twice the paper's window: a click that long after a view has little to do with it
_FEW_TRAIN_PAIRS = 1000  # an epoch of 60 steps of 16 pairs
_FEW_TEST_PAIRS = 400  # a recall of 50 % has then a standard error of 2.5 points


def data_advice(train: pa.Table, num_test: int, train_days: tuple[date, date], pairs: PairSettings) -> list[str]:
    """Sentences about data that a model learns little from, or that a recall says little of; none for good data.

    `train`: RELATED_PAIRS of training and validation, at least one. `num_test`: the number of test pairs. `train_days`:
    the first day and the day after the last one.
    """
    advice = []
    share = pc.mean(pc.equal(train["num_users"], 1)).as_py()
    if share >= _SINGLE_USER_SHARE:
        advice.append(
            f"{100 * share:.0f} % of the training pairs come from a single user each: lower pairs.max_user_notes (now "
            f"{_written(pairs.max_user_notes)}) or raise pairs.min_users (now {pairs.min_users})."
        )
    num_days = (train_days[1] - train_days[0]).days
    is_unlimited = pairs.score != "swing" and pairs.max_minutes is None and pairs.half_life_days is None
    if num_days > _LONG_DAYS and is_unlimited:
        advice.append(
            f"A click counts however long after the view, in a window of {num_days} days: set pairs.max_minutes or "
            "pairs.half_life_days, or lower window.train_days."
        )
    if train.num_rows < _FEW_TRAIN_PAIRS:
        advice.append(
            f"{train.num_rows:,} training pairs are few to fine-tune a model: raise window.train_days or pairs.top_t "
            f"(now {pairs.top_t}), or lower pairs.low (now {pairs.low:g}) or pairs.min_users (now {pairs.min_users})."
        )
    if num_test < _FEW_TEST_PAIRS:
        error = 100 * sqrt(0.25 / max(num_test, 1))
        advice.append(
            f"With {num_test:,} test pairs, a recall of 50 % has a standard error of {error:.1f} points: raise "
            "window.test_days, or use split.by: hash with a larger split.pool_share."
        )
    return advice


def _written(value: Any) -> str:
    return "null" if value is None else str(value)
