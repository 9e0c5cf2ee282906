"""The drafts that a killed writer leaves behind, and a process id that no process has."""

import subprocess
from pathlib import Path

from notellm2_core.runtime.files import host


def dead_process() -> int:
    """The id of a process of this host that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def draft_of(path: Path, process: int, on_host: str | None = None) -> Path:
    """The path of that process's draft of `path`."""
    return path.with_name(f".{path.name}.{on_host or host()}.{process}.0123abcd.draft")
