"""Two workers share the files; the longest file starts first, so that neither waits for the other at the end."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub that cannot be reached is not waited for


def pytest_configure(config: pytest.Config) -> None:
    """Several ranks share this machine's cores, not its one GPU: only `pytest -m gpu` sees that."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker takes whole files; those that need the finished graph go to one, which makes it once."""
    for item in items:
        needs_graph = "finished" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("finished" if needs_graph else item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: "test_weekly" not in item.nodeid)
