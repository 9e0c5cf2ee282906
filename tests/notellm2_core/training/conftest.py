import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    """The one of the first training lives until the end: DeepSpeed would go on using it after it was destroyed."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(_process_group: None) -> Iterator[None]:
    """Trainings of this process are alone in their group; afterwards other tests find everything as it was."""
    before, num_threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)
