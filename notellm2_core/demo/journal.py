"""What a simulation has done so far, so that it can be stopped at any time, and run again.

A file of lines of JSON. The first one names the simulation; each of the others is a record with its key. What a user
was shown is written down before anything follows from it: a simulation that is run again asks no feed twice, so it
comes to the same events, with the same ids.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]  # a kind, and numbers


class Journal:
    """The records of a file. `run`: a name that no other simulation has."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begin a file, or go on with one. Raises ValueError if it belongs to a simulation of other settings."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last line that was cut is none
        size = sum(len(line) + 1 for line in lines)
        head, *records = [_parsed(path, n, line) for n, line in enumerate(lines, 1)] or [{}]
        if head and head.get("settings") != dict(settings):
            differ = [name for name in settings if head.get("settings", {}).get(name) != settings[name]]
            raise ValueError(
                f"{path} is the journal of another simulation ({', '.join(differ) or 'other settings'}): name a new "
                "file with --journal"
            )
        self._records: dict[Key, Any] = {tuple(record["key"]): record["value"] for record in records}
        self._file = path.open("r+b" if path.exists() else "wb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is in use: the same simulation runs already") from None
        self._file.truncate(size)
        self._file.seek(size)
        self.run: str = head.get("run") or secrets.token_hex(4)
        if not head:
            self._write({"run": self.run, "settings": dict(settings)})

    def get(self, *key: str | int) -> Any:
        """The value of a record; None: there is none."""
        return self._records.get(key)

    def add(self, value: Any, *key: str | int) -> Any:
        """Write a record. Returns its value."""
        self._records[key] = value
        self._write({"key": key, "value": value})
        return value

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()  # a kill of this process loses nothing

    def close(self) -> None:
        self._file.close()


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        assert isinstance(record, dict) and (number == 1 or {"key", "value"} <= record.keys())
    except (ValueError, AssertionError):
        raise ValueError(f"{path}, line {number} is damaged: name a new file with --journal") from None
    return record
