"""The URL of a Milvus, as `serving.engine` names it."""

import os
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

PASSWORD = "MILVUS_PASSWORD"  # environment variable, for a URL that names only the user
PORT = 19530
_KINDS = "milvus://HOST:PORT for a server, or milvus://./FILE.db or milvus:///FOLDER/FILE.db for milvus-lite"


@dataclass(frozen=True)
class MilvusUrl:
    """A server, or a file of milvus-lite. `str` and `repr` show neither user nor password."""

    address: str  # what pymilvus connects to: http://HOST:PORT, or the path of the file
    database: str = ""
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def is_file(self) -> bool:
        return not self.address.startswith("http://")

    @classmethod
    def parse(cls, url: str) -> "MilvusUrl":
        """Raises ValueError, in one sentence without the password, for anything else."""
        try:
            parts = urlsplit(url)
            port = parts.port or PORT
        except ValueError:
            raise ValueError(f"an engine is {_KINDS}; this URL has no port that can be read.") from None
        if parts.scheme != "milvus":
            raise ValueError(f"an engine is {_KINDS}, not {url.partition(':')[0]!r}.")
        if parts.query or parts.fragment:
            raise ValueError("the URL of an engine has no '?' and no '#'; in a password, they are %3F and %23.")
        if parts.netloc in ("", ".", ".."):
            return cls(_file(parts))
        database = parts.path.strip("/")
        if parts.hostname is None or not re.fullmatch(r"(?a)\w*", database):
            raise ValueError(f"an engine is {_KINDS}; behind the port there may be the name of a database.")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if user and not password:
            password = os.environ.get(PASSWORD, "")
        return cls(f"http://{host}:{port}", database, user, password)

    def __str__(self) -> str:
        return self.address.removeprefix("http://") + (f"/{self.database}" if self.database else "")


def require_milvus_url(url: str | None) -> str | None:
    """`url`, unchanged. Raises ValueError as `MilvusUrl.parse`."""
    if url is not None:
        MilvusUrl.parse(url)
    return url


def without_password(url: str | None) -> str | None:
    """The URL as it may be written to files that others read."""
    if url is None:
        return None
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{login.partition(':')[0]}{at}{host}"))


def _file(parts: SplitResult) -> str:
    path = parts.netloc + unquote(parts.path)
    if not path.endswith(".db"):
        raise ValueError(f"a file of milvus-lite ends with .db, not as {path!r}.")
    return path
