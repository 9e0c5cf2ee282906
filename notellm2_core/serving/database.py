"""The database of the log: SQLite or PostgreSQL, brought up to date when it is opened, with one writer at a time."""

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from notellm2_core.serving.tables import VERSION_TABLE

_BUSY_SECONDS = 30.0  # how long a writer to SQLite waits for the others
_RETRY_SECONDS = 0.01
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}
# The first statement of every transaction that writes. There is one writer at a time, in all processes: what it commits
# is visible before the next one reads the last number, so numbers are committed in their order. PostgreSQL's lock is
# released after the commit is visible. A commit is on the disk when it returns, also where the server's default is not.
_BEGIN = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(5577006791947779410),"
    " set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), true)",
}


# A silent network, or a process that stopped in the middle of a write, blocks the others for no longer than this.
_POSTGRESQL = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_LIMITS = "-c lock_timeout=30s -c idle_in_transaction_session_timeout=60s"


class LogFull(OSError):
    """The disk is full. Nothing of the transaction was written, and the log can still be read."""


class LogUnavailable(ConnectionError):
    """The database cannot be reached now. The writes of this call may be there or not: repeat them."""


def connect(url: str) -> Engine:
    """An engine for the database at `url`. The folder of a SQLite file is created. Raises ValueError for other URLs."""
    try:
        parsed = make_url(url)
        driver = _DRIVERS[parsed.get_backend_name()]
    except (ArgumentError, KeyError):
        scheme = url.partition(":")[0]  # what follows may hold a password
        raise ValueError(f"a log is sqlite:///FILE or postgresql://HOST/DATABASE, not {scheme!r}.") from None
    if driver != "sqlite":
        return create_engine(
            parsed.set(drivername=driver), isolation_level="READ COMMITTED", pool_pre_ping=True,
            connect_args=_POSTGRESQL | {"options": " ".join((str(parsed.query.get("options", "")), _LIMITS)).strip()},
        )  # fmt: skip
    if parsed.database in (None, "", ":memory:"):
        raise ValueError(f"a log needs a file, as in sqlite:///FILE; {url!r} names none.")
    with log_errors():
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    # isolation_level None: Python's driver begins no transaction by itself.
    arguments = {"isolation_level": None, "timeout": _BUSY_SECONDS}
    engine = create_engine(parsed.set(drivername=driver), connect_args=arguments)
    event.listen(engine, "connect", _make_durable)
    return engine


def migrate(engine: Engine) -> None:
    """Bring the tables up to date in one transaction. Raises ValueError for tables of a newer version of this code."""
    config = Config()
    config.set_main_option("script_location", "notellm2_core.serving:migrations")
    script = ScriptDirectory.from_config(config)
    known = [step.revision for step in script.walk_revisions()]  # the newest first
    with writing(engine) as connection:
        found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
        if found is not None and found not in known:
            raise ValueError(
                f"the log {engine.url} has tables of version {found}, and this notellm2 knows those up to {known[0]}: "
                "update notellm2."
            )
        if found != known[0]:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes, the only one at its time. It is rolled back if the block fails."""
    with log_errors(), engine.begin() as connection:
        connection.exec_driver_sql(_BEGIN[engine.dialect.name])
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that reads what is committed."""
    with log_errors(), engine.connect() as connection:
        yield connection


@contextmanager
def log_errors() -> Iterator[None]:
    """Turn the errors of both databases into LogFull and LogUnavailable."""
    try:
        yield
    except PoolTimeout as e:
        raise LogUnavailable("all connections to the database of the log are in use") from e
    except DBAPIError as e:
        if not isinstance(e, OperationalError | InternalError) and not e.connection_invalidated:
            raise  # a mistake of ours
        code = getattr(e.orig, "sqlite_errorcode", None) or getattr(e.orig, "sqlstate", None)
        if code in (sqlite3.SQLITE_FULL, "53100"):  # PostgreSQL's disk_full
            raise LogFull(errno.ENOSPC, f"the disk of the log is full ({e.orig})") from e
        if code == sqlite3.SQLITE_ERROR:  # a mistake in our SQL
            raise
        raise LogUnavailable(f"the database of the log cannot be used now ({e.orig})") from e
    except OSError as e:
        if e.errno != errno.ENOSPC or isinstance(e, LogFull):
            raise
        raise LogFull(errno.ENOSPC, "the disk of the log is full", e.filename) from e


def _make_durable(connection: Any, _: object) -> None:
    """Of SQLite: a commit is on the disk when it returns, and readers wait for no writer."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as e:  # while another process writes, SQLite may refuse this at once
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_SECONDS)
    connection.execute("PRAGMA synchronous = FULL")
