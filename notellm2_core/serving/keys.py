"""Keys of the service: random, scoped, and kept as hashes.

    {"keys": [{"name": "feed", "scope": "read", "sha256": "..."}]}

A scope includes the lower ones: admin, write, read. Without a file of keys, everything is allowed, and the service
listens on this machine alone.
"""

import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from notellm2_core.runtime.files import write_atomically

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)  # each includes those before it
_KEY_BYTES = 32


@dataclass(frozen=True)
class Key:
    name: str
    scope: Scope
    sha256: str


@dataclass(frozen=True)
class Keys:
    """The keys of a file. None of them: everything is allowed."""

    keys: tuple[Key, ...] = ()

    @classmethod
    def load(cls, file: Path) -> "Keys":
        """Raises ValueError naming the file if it is not one of keys, or holds none."""
        try:
            keys = tuple(Key(**key) for key in json.loads(file.read_text())["keys"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{file} is no file of keys ({e}): `notellm2 keys add --keys {file}` makes one") from None
        if unknown := [key.scope for key in keys if key.scope not in SCOPES]:
            raise ValueError(f"{file} has the scope {unknown[0]!r}; scopes are {', '.join(SCOPES)}")
        if not keys:
            raise ValueError(f"{file} holds no keys: `notellm2 keys add --keys {file}` adds one")
        return cls(keys)

    def scope_of(self, secret: str | None) -> Scope | None:
        """The scope of a key; None: there is no such key. The time it takes does not depend on the key."""
        if not self.keys:
            return "admin"
        digest, found = _digest(secret or ""), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key.scope
        return found

    def allows(self, scope: Scope | None, needed: Scope) -> bool:
        return scope is not None and SCOPES.index(scope) >= SCOPES.index(needed)


def add_key(file: Path, name: str, scope: Scope) -> str:
    """Add a key to the file, which may not exist yet. Returns the key, which is kept nowhere.

    Raises ValueError for a name that is taken.
    """
    keys = Keys.load(file).keys if file.exists() else ()
    if name in {key.name for key in keys}:
        raise ValueError(f"{file} has a key {name!r} already")
    secret = secrets.token_urlsafe(_KEY_BYTES)
    content = {"keys": [asdict(key) for key in (*keys, Key(name, scope, _digest(secret)))]}
    write_atomically(file, json.dumps(content, indent=1))
    file.chmod(0o600)
    return secret


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
