"""What the data foretell: a sentence where something is wrong, and none where nothing is."""

from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pytest

from notellm2_core.config.data import PairSettings
from notellm2_core.evaluation.data_advice import data_advice


def advice(single: int = 0, several: int = 1000, num_test: int = 400, days: int = 14, **settings: Any) -> list[str]:
    """`single`, `several`: training pairs of one user, and of two."""
    train = pa.table({"num_users": [1] * single + [2] * several})
    end = date(2024, 3, 1)
    return data_advice(train, num_test, (end - timedelta(days), end), PairSettings(**settings))


def test_good_data_need_no_advice() -> None:
    """The figures are those at which a sentence begins, short of it."""
    assert advice(single=999, several=1001, days=28) == []
    assert advice(days=730, max_minutes=30) == advice(days=730, half_life_days=7) == []
    assert advice(days=730, score="swing") == []


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"single": 980, "several": 20}, "98 % of the training pairs come from a single user each: lower "
         "pairs.max_user_notes (now 2000) or raise pairs.min_users (now 1)."),
        ({"single": 1000, "several": 1000, "max_user_notes": None}, "50 % of the training pairs come from a single "
         "user each: lower pairs.max_user_notes (now null) or raise pairs.min_users (now 1)."),
        ({"days": 730}, "A click counts however long after the view, in a window of 730 days: set pairs.max_minutes or "
         "pairs.half_life_days, or lower window.train_days."),
        ({"several": 999, "low": 0.5, "min_users": 2}, "999 training pairs are few to fine-tune a model: raise "
         "window.train_days or pairs.top_t (now 3), or lower pairs.low (now 0.5) or pairs.min_users (now 2)."),
        ({"num_test": 100}, "With 100 test pairs, a recall of 50 % has a standard error of 5.0 points: raise "
         "window.test_days, or use split.by: hash with a larger split.pool_share."),
    ],
)  # fmt: skip
def test_a_sentence_names_the_settings_that_help(data: dict[str, Any], sentence: str) -> None:
    assert advice(**data) == [sentence]
