"""The graph with Spark on a standalone cluster makes the same datasets as locally, so no model is trained again."""

import pytest

from notellm2_core.lake.lineage import STAGES
from tests.pipelines.conftest import Workplace
from tests.support.cluster import Cluster

BY_SPARK = {"raw_events", "notes", "interactions", "cooccurrence", "note_split", "related_pairs", "pair_datasets"}


def contents(workplace: Workplace) -> dict[str, str]:
    """The workplace's files without those of raw_events, whose names depend on when the source was written."""
    return {file: content for file, content in workplace.files().items() if not file.startswith("raw_events/")}


@pytest.mark.slow
def test_the_same_datasets_through_spark_connect(
    finished: Workplace, copy_of_finished: Workplace, cluster: Cluster, connect_server: str
) -> None:
    copy_of_finished.forget("ingestion", "log_partition", *BY_SPARK)
    before = cluster.tasks()
    code, output = copy_of_finished.recall(SPARK_REMOTE=connect_server)
    assert code == 0, output[-6000:]
    assert all(now > earlier for now, earlier in zip(cluster.tasks(), before, strict=True))
    assert {name for name in STAGES if f" {name}: made at" in output} == BY_SPARK
    assert contents(copy_of_finished) == contents(finished)
