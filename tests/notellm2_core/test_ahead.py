import pytest

from notellm2_core.ahead import one_ahead
from tests.waiting import wait_for


def test_one_ahead() -> None:
    """The next is begun before it is asked for; what it raises is raised where it is asked for."""
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number * number

    found = one_ahead(map(work, range(1, 5)))
    assert next(found) == 1
    wait_for(lambda: begun == [1, 2])
    assert next(found) == 4
    with pytest.raises(ValueError, match="three"):
        next(found)
    assert list(one_ahead([])) == [] and list(one_ahead([1])) == [1]
