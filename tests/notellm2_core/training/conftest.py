import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    """The group of the first run lives until the end: DeepSpeed would continue to use it after it was destroyed."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(_process_group: None) -> Iterator[None]:
    """Training runs of this process have a group of one rank; afterwards everything is restored for other tests."""
    before, num_threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)
