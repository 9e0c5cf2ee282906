"""Which pairs each training step sees: a function of the seed and the step."""

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from notellm2_core.config.training import TrainingSettings

_LOOKAHEAD_BATCHES = 4  # how long a pair may wait for a batch that has neither of its notes


def planned_steps(training: TrainingSettings, num_pairs: int) -> int:
    """`training.num_steps`, or the steps of `training.num_epochs` over `num_pairs` training pairs.

    Worked example: 3 epochs of 100 pairs in batches of 16 are 3 * ceil(6.25) = 21 steps.
    """
    if training.num_steps is not None:
        return training.num_steps
    assert training.num_epochs is not None
    return training.num_epochs * math.ceil(num_pairs / training.batch_pairs)


def batch_schedule(pairs: np.ndarray, batch_pairs: int, num_steps: int, seed: int) -> np.ndarray:
    """Which pairs each step sees: [num_steps, B] indices into `pairs` [P, 2] of content ids.

    The pairs come in random permutations, one after the other. A pair that shares a content with the batch being filled
    waits for the next batch, so no content is twice in a batch. If waiting does not help (few pairs, or a content of
    very many pairs), the pair that waited longest is taken, and false-negative masking does the rest. The first steps
    do not depend on how many follow.

    Raises ValueError if there are no pairs.
    """
    if not len(pairs):
        raise ValueError("there are no training pairs: lower pairs.low or pairs.min_users, or raise window.train_days")
    stream = _permutations(len(pairs), seed)
    max_waiting = min(_LOOKAHEAD_BATCHES * batch_pairs, len(pairs))
    waiting: deque[int] = deque()
    batches = np.empty((num_steps, batch_pairs), dtype=np.int64)
    for step in range(num_steps):
        taken: list[int] = []
        in_batch: set[int] = set()
        passed_over: deque[int] = deque()
        while len(taken) < batch_pairs:
            if not waiting and len(passed_over) >= max_waiting:
                taken.append(passed_over.popleft())
                in_batch.update(pairs[taken[-1]].tolist())
                continue
            index = waiting.popleft() if waiting else next(stream)
            if in_batch.isdisjoint(pairs[index].tolist()):
                taken.append(index)
                in_batch.update(pairs[index].tolist())
            else:
                passed_over.append(index)
        waiting.extendleft(reversed(passed_over))
        batches[step] = taken
    return batches


def _permutations(num_pairs: int, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()
        epoch += 1
