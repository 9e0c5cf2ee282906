"""Retention: removes the datasets that nothing needs any more.

What is needed is found by reachability, never by age alone: the champion, the previous one, the anchor, the next anchor
and the last releases of the configuration, all releases of the others, those that a service has in memory, what the
present run made or needs, and everything that these were made from. Copies of the log's files and its reduced
partitions stay as long as a log that is needed holds them: next week's window links to them. A dataset that is younger
than the grace time stays, too: another run may be making what needs it.
"""

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from notellm2_core.lake.lake import WORK_FOLDER, Dataset, Lake
from notellm2_core.lake.ledger import FOLDER, Ledger, State
from notellm2_core.lake.lineage import STAGES
from notellm2_core.release.release import NAME, SERVING_FOLDER
from notellm2_core.release.served import served_releases
from notellm2_core.runtime.files import is_hidden, remove_folder
from notellm2_core.schema import POSTED_NOTES

_OF_THE_LOG = ("ingestion", "log_partition")
_ALL = (*STAGES, *_OF_THE_LOG, POSTED_NOTES)
Address = tuple[str, str]  # name and fingerprint of a dataset


@dataclass(frozen=True)
class Swept:
    """What a sweep removed, and what the lake takes now."""

    num_datasets: int
    num_work_folders: int
    removed_bytes: int
    lake_bytes: int


def sweep_lake(
    lake: Lake, name: str, keep_releases: int, anchor_weeks: int, grace: timedelta, present: Iterable[Address] = ()
) -> Swept:
    """Remove what is not needed. keep_releases: the last ones of the configuration `name` that stay; all releases of
    other configurations stay. present: datasets of the run that sweeps, and those that it needs.

    Run it where no other run uses the lake; it is the last step of the weekly job, in its pool.
    """
    before = lake_bytes(lake)
    datasets = _datasets(lake)
    releases = retained(Ledger(lake.root, name).state(), keep_releases, anchor_weeks) | served_releases(lake)
    for other in _other_states(lake, name):
        releases |= {decision.release for decision in other.decisions}
    roots = {(NAME, release) for release in releases}
    needed = _reachable(datasets, {*roots, *present})
    oldest = datetime.now(UTC) - grace
    removed = 0
    for address, dataset in datasets.items():
        if address not in needed and datetime.fromisoformat(dataset.manifest.created) <= oldest:
            remove_folder(dataset.path)
            removed += 1
    work_folders = _sweep_work(lake, needed, time.time() - grace.total_seconds())
    served = lake.root / SERVING_FOLDER
    for folder in served.iterdir() if served.is_dir() else ():
        if not lake.path(NAME, folder.name).exists() and not is_hidden(folder.name):
            remove_folder(folder)
    after = lake_bytes(lake)
    return Swept(removed, work_folders, max(0, before - after), after)


def retained(state: State, keep_releases: int, anchor_weeks: int) -> set[str]:
    """The releases that stay: champion, previous, the anchor and the next one, and the last that were decided about."""
    last = list(dict.fromkeys(decision.release for decision in reversed(state.decisions)))[:keep_releases]
    return {r for r in (state.champion, state.previous, *state.anchors(anchor_weeks), *last) if r is not None}


def _other_states(lake: Lake, name: str) -> list[State]:
    """The ledgers of the other configurations in the lake."""
    folders = [folder for folder in (lake.root / FOLDER).iterdir() if folder.is_dir()]
    names = {unquote(folder.name) for folder in folders} - {name}
    return [Ledger(lake.root, other).state() for other in sorted(names)]


def _reachable(datasets: Mapping[Address, Dataset], roots: Iterable[Address]) -> set[Address]:
    """The roots, and what they were made from."""
    needed: set[Address] = set()
    waiting = list(roots)
    while waiting:
        address = waiting.pop()
        if address in needed:
            continue
        needed.add(address)
        if address in datasets:
            waiting += datasets[address].manifest.inputs.items()
    logs = [datasets[a].manifest.files for a in needed if a[0] == "raw_events" and a in datasets]
    names = {Path(file).name.partition("-")[0] for files in logs for file in files}
    checksums = {entry["sha256"] for files in logs for entry in files.values()}
    needed |= {("ingestion", name) for name in names}
    notes = [datasets[a] for a in needed if a[0] == "notes" and a in datasets]
    needed |= {(POSTED_NOTES, dataset.manifest.settings.get("posted", "")) for dataset in notes}
    needed |= {a for a, d in datasets.items() if a[0] == "log_partition" and _is_of(d.manifest.settings, checksums)}
    return needed


def _is_of(settings: Mapping[str, Any], checksums: set[str]) -> bool:
    return checksums.issuperset(settings["files"])


def _sweep_work(lake: Lake, needed: set[Address], oldest: float) -> int:
    """Remove the unfinished work of datasets that nothing needs: checkpoints of an abandoned training run."""
    removed = 0
    for name in STAGES:
        folder = lake.root / WORK_FOLDER / name
        for work in folder.iterdir() if folder.is_dir() else ():
            if (name, work.name) not in needed and _last_change(work) <= oldest:
                shutil.rmtree(work, ignore_errors=True)
                removed += 1
    return removed


def _last_change(folder: Path) -> float:
    return max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)


def lake_bytes(lake: Lake) -> int:
    """Bytes on the disk of everything in the lake; a file with several names counts once."""
    return _bytes([lake.root])


def release_bytes(lake: Lake, release: str) -> int:
    """Bytes on the disk of a release and of what it was made from, without the log, which all releases share."""
    datasets = _datasets(lake)
    reached = [a for a in _reachable(datasets, [(NAME, release)]) if a in datasets]
    log = [a for a in reached if a[0] in _OF_THE_LOG]  # whose files its other datasets link to
    return _bytes(datasets[a].path for a in reached) - _bytes(datasets[a].path for a in log)


def log_bytes(lake: Lake) -> int:
    """Bytes on the disk of the copies of the log's files and of its partitions, counted as in `lake_bytes`."""
    return _bytes(dataset.path for name in _OF_THE_LOG for dataset in lake.datasets(name))


def _datasets(lake: Lake) -> dict[Address, Dataset]:
    return {(name, d.manifest.fingerprint): d for name in _ALL for d in lake.datasets(name)}


def _bytes(folders: Iterable[Path]) -> int:
    seen: dict[tuple[int, int], int] = {}
    for root, name in ((root, name) for folder in folders for root, _, names in os.walk(folder) for name in names):
        try:
            stat = os.lstat(os.path.join(root, name))
        except FileNotFoundError:  # removed meanwhile
            continue
        seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(seen.values())
