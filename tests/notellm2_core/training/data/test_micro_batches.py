"""A batch is divided: each note once, equal numbers on all ranks, and a limit on tokens."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.training.data.micro_batches import Share, plan

tokens = st.lists(st.integers(1, 90), min_size=1, max_size=40)


def test_worked_example() -> None:
    """Notes are dealt from the longest on: 5 to rank 0, 4 and 2 to rank 1, 1 to rank 0."""
    shares = plan(np.array([5, 1, 4, 2]), 2)
    assert [[part.tolist() for part in share] for share in shares] == [[[0, 1]], [[2, 3]]]
    shares = plan(np.array([5, 1, 4, 2]), 2, max_tokens=5)
    assert [[part.tolist() for part in share] for share in shares] == [[[0], [1]], [[2], [3]]]
    with pytest.raises(ValueError, match="3 notes cannot be divided evenly among 2 ranks"):
        plan(np.ones(3), 2)


@settings(max_examples=200)
@given(num_tokens=tokens, num_ranks=st.integers(1, 4), max_tokens=st.none() | st.integers(1, 300))
def test_plan(num_tokens: list[int], num_ranks: int, max_tokens: int | None) -> None:
    costs = np.array(num_tokens * num_ranks)
    shares = plan(costs, num_ranks, max_tokens)
    assert sorted(np.concatenate([part for share in shares for part in share]).tolist()) == list(range(len(costs)))
    assert {sum(map(len, share)) for share in shares} == {len(num_tokens)}
    assert len({len(share) for share in shares}) == 1
    totals = [int(costs[np.concatenate(share)].sum()) for share in shares]
    assert max(totals) - min(totals) <= max(num_tokens)
    for share in shares:
        assert all(len(part) for part in share)
        for part in share:
            assert max_tokens is None or costs[part].sum() <= max(max_tokens, costs.max())


def test_waits_for_micro_batches_add_up() -> None:
    """Three batches take 0.1 s each to make and no time to use. GradCache reads them twice, so it waits for 0.6 s.

    The one micro-batch of a share that is not divided is made ahead, so it needs no wait.
    """

    def make(notes: np.ndarray) -> str:
        time.sleep(0.1)
        return str(notes)

    several = Share(np.arange(3), torch.arange(3), 3, 3, 0.0, [np.array([i]) for i in range(3)], make, None)  # type: ignore[arg-type]
    assert list(several.micro_batches()) == list(several.micro_batches()) == ["[0]", "[1]", "[2]"]
    assert 0.5 < several.seconds_waited < 1.5
    one = Share(np.arange(1), torch.arange(1), 1, 1, 0.0, [np.array([0])], make, make(np.arange(1)))  # type: ignore[arg-type]
    assert list(one.micro_batches()) == ["[0]"] and one.seconds_waited == 0
