"""Java options for tests, whose JVMs run a few small jobs and spend most of their time on loading Spark's classes."""

import fcntl
import functools
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyspark

from notellm2_core.runtime.files import written_whole
from spark_jobs.common.session import java_home, spark_session

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".pytest_cache" / "java"

SMALL = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # no time for its compilers to pay off
UNCOMPILED = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}


@functools.cache
def quick_jvm() -> str:
    """JDK_JAVA_OPTIONS with which Spark starts in half the time, from an archive of its classes.

    The first test run on a machine makes the archive in about 30 s, while other workers wait. A JVM with other jars
    (the launcher's) silently ignores it. Where Java cannot make an archive, the options name none.
    """
    version = subprocess.run([f"{java_home()}/bin/java", "-version"], capture_output=True, text=True, check=True).stderr
    (major,) = re.findall(r'version "(\d+)', version)
    make, use = ("AOTCacheOutput", "AOTCache") if int(major) >= 25 else ("ArchiveClassesAtExit", "SharedArchiveFile")
    key = f"{version}{SMALL}{pyspark.__file__}{pyspark.__version__}"
    archive = FOLDER / hashlib.sha256(key.encode()).hexdigest()[:16]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            with written_whole(archive) as draft:
                command = [sys.executable, "-m", "tests.support.jvm", f"{SMALL} -XX:{make}={draft}"]
                subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
                draft.touch()
    return f"{SMALL} -XX:{use}={archive} -Xlog:disable" if archive.stat().st_size else SMALL


def _typical_jobs(options: str) -> None:
    """Run jobs that load the classes of most tests."""

    def same(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from batches

    spark = spark_session("classes", "local[2]", "1g", 2, UNCOMPILED | {"spark.driver.defaultJavaOptions": options})
    numbers = spark.range(100).selectExpr("id", "id % 7 AS k", "CAST(id AS string) AS name")
    counts = numbers.groupBy("k").agg({"id": "max", "name": "collect_list"}).orderBy("k")
    joined = numbers.mapInArrow(same, numbers.schema).join(counts, "k").dropDuplicates(["name"])
    assert joined.selectExpr("row_number() OVER (PARTITION BY k ORDER BY name) AS n").filter("n = 1").count() == 7
    gateway = spark.sparkContext._gateway
    assert gateway is not None
    spark.stop()
    gateway.proc.stdin.close()  # its sign to end, and an archive is written at the end
    gateway.proc.wait()


if __name__ == "__main__":
    _typical_jobs(sys.argv[1])
