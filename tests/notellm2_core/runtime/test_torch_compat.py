import os
import subprocess
import sys

import pytest

# Prints the memory that 500 products of different shapes leave behind, in MB, after 1,000 others.
MANY_SHAPES = """
import notellm2_core.runtime.torch_compat
import psutil, torch
layer = torch.nn.Linear(256, 256)
def product(rows):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(rows, 256))
for rows in range(1000, 2000):
    product(rows)
before = psutil.Process().memory_info().rss
for rows in range(2000, 2500):
    product(rows)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def left_behind(**variables: str) -> int:
    env = {key: value for key, value in os.environ.items() if not key.endswith("_CACHE_CAPACITY")}
    command = [sys.executable, "-c", MANY_SHAPES]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env | variables).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    """Each product has a new shape, like the batches of a training run, whose numbers of tokens differ."""
    uncapped = left_behind(ONEDNN_PRIMITIVE_CACHE_CAPACITY="4096", LRU_CACHE_CAPACITY="4096")
    if uncapped < 100:
        pytest.skip(f"this CPU's library keeps little ({uncapped} MB)")
    assert left_behind() < uncapped / 3


@pytest.mark.slow
def test_objects_are_frozen_before_the_exit() -> None:
    """gc.freeze, which spares the search for cycles at exit, runs first: exit handlers run in reverse order."""
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))"
    code += "; import notellm2_core.runtime.torch_compat"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000
