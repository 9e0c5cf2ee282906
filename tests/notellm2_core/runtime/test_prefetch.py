import time

import pytest

from notellm2_core.runtime.prefetch import Prefetcher
from tests.support.waiting import wait_for


def test_the_next_item_is_made_while_the_current_one_is_used() -> None:
    """The next item is begun before it is requested; its exception is raised when it is requested."""
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number * number

    squares = iter(Prefetcher(map(work, range(1, 5))))
    assert next(squares) == 1
    wait_for(lambda: begun == [1, 2])
    assert next(squares) == 4
    with pytest.raises(ValueError, match="three"):
        next(squares)
    assert list(Prefetcher([])) == [] and list(Prefetcher([1])) == [1]


def test_the_wait_for_each_item() -> None:
    """Items take 0.2 s to make. The second is made while the first is used for 0.3 s, so it needs no wait. The third is
    waited for, because the second takes no time to use.
    """
    items = Prefetcher(time.sleep(0.2) for _ in range(3))
    waits = []
    for number, _ in enumerate(items):
        waits.append(items.seconds_waited)
        time.sleep(0.3 if number == 0 else 0)
    assert waits[0] >= 0.15 and waits[1] < 0.1 and waits[2] >= 0.15
