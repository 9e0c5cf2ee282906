"""The hub client's cache, filled as a download fills it, so that the client needs no network."""

import hashlib
import shutil
from pathlib import Path


def cache_model(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Put `folder` into the cache as the hub's model `name` at a branch or tag."""
    repo, commit = cache / f"models--{name.replace('/', '--')}", hashlib.sha1(revision.encode()).hexdigest()
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
