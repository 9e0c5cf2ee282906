"""Two workers share the tests: one of them makes each expensive fixture, and the longest units start first."""

import gc
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest
from coverage import Coverage
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from tests.support.cluster import Cluster

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, two cores
settings.register_profile("any machine", deadline=None)  # an example may take as long as it takes
settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # so that no test waits for an unreachable hub

# One worker runs a unit as a whole, in this order: the finished graph, the cluster and the Spark session are made once.
# The ranks come before Spark's tests because on a fresh machine the graph's first test makes an archive that these use.
UNITS = {
    "tests/pipelines/": "graph",
    "tests/spark_jobs/test_cluster.py": "graph",
    "tests/notellm2_core/training/engine/test_ranks.py": "ranks",
    "tests/spark_jobs/": "spark",
    "tests/assets/resources/test_incremental.py": "spark",
    "tests/notellm2_core/serving/test_engines": "engines",  # one Milvus for all of these files
    "tests/notellm2_core/training/test_training.py": "training",
    "tests/notellm2_core/training/test_overfit.py": "overfit",
    "tests/notellm2_core/training/state/test_checkpoints.py": "checkpoints",
    "tests/notellm2_core/model/test_llm.py": "llm",
}


def unit(nodeid: str) -> str:
    """The unit of a test: one of UNITS, or its file."""
    file = nodeid.partition("::")[0]
    return next((name for start, name in UNITS.items() if file.startswith(start)), file)


class Scheduling(LoadFileScheduling):
    """Schedules whole units. (xdist's own groups have no effect on it under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return Scheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment of the tests and of the processes that they start: no GPU."""
    if config.option.markexpr != "gpu":  # several ranks share this machine's cores, not its one GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = list(dict.fromkeys(UNITS.values()))
    items.sort(key=lambda item: first.index(name) if (name := unit(item.nodeid)) in first else len(first))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Slow tests are not measured: trace functions slow Python by half, and most of these start processes anyway."""
    measurement = Coverage.current()
    if measurement is None or item.get_closest_marker("slow") is None:
        return (yield)
    measurement.stop()
    try:
        return (yield)
    finally:
        measurement.start()


@pytest.fixture(scope="session")
def spark() -> Iterator["SparkSession"]:
    """One Spark session for all tests of a worker."""
    from spark_jobs.common.session import spark_session
    from tests.support.jvm import UNCOMPILED, quick_jvm

    os.environ["JDK_JAVA_OPTIONS"] = quick_jvm()
    # The endpoint is for test_session: Hadoop reads it at the start.
    extra = UNCOMPILED | {"spark.hadoop.fs.s3a.endpoint": "http://127.0.0.1:9000"}
    session = spark_session("tests", "local[2]", "1g", 2, extra)
    del os.environ["JDK_JAVA_OPTIONS"]
    yield session
    session.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """One standalone Spark cluster for all tests of a worker."""
    from tests.support.cluster import standalone_cluster

    with standalone_cluster(tmp_path_factory.mktemp("spark") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def connect_server(cluster: "Cluster") -> Iterator[str]:
    """The address of a Spark Connect server on the cluster."""
    with cluster.connect_server() as remote:
        yield remote


def pytest_collection_finish() -> None:
    gc.freeze()  # what collection has imported stays: garbage collections need not look at it again
