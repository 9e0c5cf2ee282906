import notellm2_core.runtime.torch_compat  # noqa: F401, before any test module imports transformers

# isort: split
from pathlib import Path

import pytest

from tests.support.world import World, write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Small training data, made once for all tests of a worker."""
    return write_world(Path(tmp_path_factory.mktemp("world")))
