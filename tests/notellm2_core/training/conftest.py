from pathlib import Path

import pytest

from tests.notellm2_core.training.world import World, write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(Path(tmp_path_factory.mktemp("world")))
