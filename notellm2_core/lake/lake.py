"""The lake: a dataset is published whole, with a manifest, or not at all.

A dataset lives at `<root>/<name>/<fingerprint>/`. The fingerprint covers everything that the dataset depends on
(settings, code version, fingerprints of its inputs), so equal inputs give the same address and nothing is computed
twice. Files are written into a hidden folder, which one rename publishes; the manifest in it lists every file with its
size, rows and checksum. Opening a dataset compares the sizes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from notellm2_core import __version__
from notellm2_core.runtime.files import is_hidden, link_or_copy, new_folder, sha256_of, write_atomically
from notellm2_core.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"
WORK_FOLDER = ".work"  # in a lake: unfinished work that killed runs resume, converted weights; no dataset
_REMADE = "the next run makes the dataset where its folder is missing"
_FULL_BYTES = 16 << 20  # a disk with less free space is full: writers allocate blocks of about this size


class LakeError(ValueError):
    """A dataset is missing, damaged, or of another schema version."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset was made from, and its files."""

    name: str
    fingerprint: str
    inputs: Mapping[str, str]  # dataset name -> fingerprint
    settings: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]  # relative path -> {bytes, sha256, rows?}
    metrics: Mapping[str, Any] = field(default_factory=dict)  # counts and measurements that the UI and reports show
    schema_version: int = SCHEMA_VERSION
    code_version: str = __version__
    created: str = ""

    @property
    def num_rows(self) -> int:
        return sum(f.get("rows", 0) for f in self.files.values())


@dataclass(frozen=True)
class Dataset:
    """A published dataset: its folder and its manifest."""

    path: Path
    manifest: Manifest


class Lake:
    """Publishes and opens datasets below one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, fingerprint: str) -> Path:
        return self.root / name / fingerprint

    def find(self, name: str, fingerprint: str) -> Dataset | None:
        """The published dataset, or None. Raises LakeError where it exists but is not valid (`open_dataset`)."""
        path = self.path(name, fingerprint)
        if not (path / MANIFEST).exists():
            return None
        return open_dataset(path)

    def open(self, name: str, fingerprint: str) -> Dataset:
        """The published dataset. Raises LakeError where it is missing or not valid (`open_dataset`)."""
        return open_dataset(self.path(name, fingerprint))

    def datasets(self, name: str) -> list[Dataset]:
        """All valid published datasets of this name, the oldest first."""
        datasets = []
        for path in (self.root / name).glob("[!.]*"):  # drafts are hidden
            with suppress(LakeError):
                datasets.append(open_dataset(path))
        return sorted(datasets, key=lambda d: (d.manifest.created, d.manifest.fingerprint))

    @contextmanager
    def publish(
        self, name: str, fingerprint: str, inputs: Mapping[str, str], settings: Mapping[str, Any]
    ) -> Iterator["Draft"]:
        """A folder to write into. It becomes the dataset when the block ends without an error; otherwise it is removed.

        Two writers of one fingerprint do the same work: the second one discards its own. If the disk is full, any
        exception in the block becomes an OSError.
        """
        target = self.path(name, fingerprint)
        with new_folder(target) as work:
            work.chmod(target.parent.stat().st_mode)  # Spark's workers may run as other users that share the lake
            draft = Draft(work)
            try:
                yield draft
                manifest = Manifest(
                    name=name,
                    fingerprint=fingerprint,
                    inputs=dict(inputs),
                    settings=dict(settings),
                    files=_describe(work, draft.linked),
                    metrics=draft.metrics,
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                write_atomically(work / MANIFEST, json.dumps(asdict(manifest), indent=1, default=str))
            except Exception as e:
                if shutil.disk_usage(work).free < _FULL_BYTES:  # before the draft is removed
                    raise OSError(f"no space left on the disk of {target.parent}: free some or move the lake") from e
                raise
            if target.exists() and not (target / MANIFEST).exists():
                shutil.rmtree(target)  # no dataset: publishing never leaves a folder without a manifest


@dataclass
class Draft:
    """A dataset being written: the folder, and what goes into the manifest."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    linked: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # relative path -> its entry in the manifest

    def link(self, name: str, dataset: Dataset, file: str) -> None:
        """Add `file` of a published dataset as `name`, without reading it, and by a hard link where possible."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(dataset.path / file, target)
        self.linked[name] = dataset.manifest.files[file]


def open_dataset(path: Path) -> Dataset:
    """The dataset in `path`.

    Raises LakeError if it is missing, of another schema version, or if its files are not exactly those that the
    manifest lists, with their sizes: readers read every file of a folder.
    """
    file = path / MANIFEST
    if not file.exists():
        raise LakeError(f"{path} holds no dataset (no {MANIFEST}).")
    try:
        raw = json.loads(file.read_text())
    except ValueError as e:
        raise LakeError(f"{file} is not readable as JSON ({e}); {_REMADE}.") from e
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION or raw.keys() != {f.name for f in fields(Manifest)}:
        raise LakeError(
            f"{path} was written with schema version {version} by other code, this code reads version "
            f"{SCHEMA_VERSION}: point `lake` at a new folder."
        )
    manifest = Manifest(**raw)
    foreign = {str(f.relative_to(path)) for f in _files(path)} - {*manifest.files, MANIFEST}
    if foreign:
        raise LakeError(f"{path / min(foreign)} is not in the manifest of its dataset, which holds no other files.")
    for name, entry in manifest.files.items():
        if not (path / name).exists() or (path / name).stat().st_size != entry["bytes"]:
            raise LakeError(f"{path / name} does not match its manifest; {_REMADE}.")
    return Dataset(path, manifest)


def _describe(folder: Path, linked: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The manifest's entry of every file. Those of `linked` files are copied, without reading the file.

    Spark's markers and hidden checksums are removed: the manifest replaces them.
    """
    files: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_hidden(path.name):
            path.unlink()
    for path in _files(folder):
        if (name := str(path.relative_to(folder))) in linked:
            files[name] = linked[name]
            continue
        entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if path.suffix == ".parquet":
            entry["rows"] = pq.read_metadata(path).num_rows
        files[name] = entry
    return files


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.name))
