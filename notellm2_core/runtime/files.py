"""Atomic files and folders: written under a hidden name, synced to the disk, then renamed.

A draft lies beside its target and is named `.TARGET.HOST.PROCESS.RANDOM.draft`. Readers of Parquet skip such names, and
the name identifies the writer. Each writer first removes the drafts that others left in the folder: those of dead
processes of this host, and those of other hosts whose lease has ended. A living writer renews the lease of its drafts
every few minutes; those of a container that is gone are removed hours later. Importing this module needs only the
standard library.
"""

import hashlib
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DRAFT = re.compile(r"(?s)\.(?P<target>.+)\.(?P<host>[^.]+)\.(?P<process>\d{1,9})\.[0-9a-f]{8}\.(?P<kind>draft|old)")
LEASE_SECONDS, _RENEWAL_SECONDS = 6 * 3600.0, 300.0


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write a file to. It is renamed to `path` if the block ends without an error.

    Parents are created. The last of several writers wins. A block that fails leaves `path` unchanged.
    """
    draft = _hidden_beside(path, "draft")
    try:
        with _LEASES.held(draft):
            yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all, also if the power fails."""
    with written_whole(path) as draft:
        draft.write_text(text)


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that replaces it (`swap_in`) if the block ends without an error."""
    with draft_folder(out) as draft:
        yield draft
        swap_in(draft, out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A new folder that is renamed to `out` if the block ends without an error.

    Use it where the name determines the content: if another process has made `out` by then, its folder stays and this
    one is removed.
    """
    with draft_folder(out) as draft:
        yield draft
        _sync_tree(draft)
        try:
            os.rename(draft, out)
        except OSError:
            if not out.is_dir():
                raise
        sync(out.parent)


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`. It is removed after the block unless it was renamed."""
    folder = _hidden_beside(target, "draft")
    folder.mkdir()
    try:
        with _LEASES.held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap_in(new: Path, out: Path) -> None:
    """Replace the folder `out`, which need not exist, by `new`. Both must be on one file system.

    The previous content of `out` is moved aside, restored if the rename fails, and removed at the end. After a kill
    between the two renames, the next `sweep` restores it.
    """
    _sync_tree(new)
    old = _hidden_beside(out, "old")
    if out.exists():
        os.utime(out)  # its lease begins
        os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    sync(out.parent)
    if old.exists():
        with suppress(FileNotFoundError):  # another host's sweep was quicker
            _remove(old)


def sweep(folder: Path) -> None:
    """Remove the drafts in `folder` whose writers are gone, and restore the folders that they moved aside."""
    for path in folder.iterdir():
        draft = _DRAFT.fullmatch(path.name)
        if draft is None or _has_writer(path, draft):
            continue
        target = path.with_name(draft["target"])
        with suppress(OSError):  # another process may be sweeping
            if draft["kind"] == "old" and not target.exists():
                os.rename(path, target)
            else:
                _remove(path)


def remove_folder(path: Path) -> None:
    """Remove a folder at once for whoever looks for it: it is renamed to a draft first. Open files stay readable."""
    draft = _hidden_beside(path, "draft")
    os.rename(path, draft)
    sync(path.parent)
    shutil.rmtree(draft, ignore_errors=True)


def is_draft(path: Path) -> bool:
    """Whether `path` has the name of a draft or of a folder moved aside, of any process."""
    return _DRAFT.fullmatch(path.name) is not None


def host() -> str:
    """A name without dots for the namespace of this process's id: the machine or the container.

    Containers on the host's network share its host name, but not its process ids.
    """
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname().replace('.', '-')}-{namespace.stat().st_ino if namespace.exists() else 0}"


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk. Raises OSError naming `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Make the new file `target` with the content of `source`: a hard link where possible, else a copy.

    Raises FileExistsError where `target` exists.
    """
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or a file system without hard links
        with written_whole(target) as draft:
            shutil.copy2(source, draft)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet_files(folder: Path) -> list[Path]:
    """The visible *.parquet files of `folder`, sorted: those that readers of Parquet folders read as its table."""
    return sorted(path for path in folder.glob("*.parquet") if not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    """Whether readers of Parquet folders, such as Spark and Arrow, skip files of this name."""
    return name.startswith((".", "_"))


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Relative path, bytes and modification time in ns of every file below `folder`, except in hidden folders."""
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root) / name
            stat = path.stat() if path.exists() else path.lstat()  # a broken link
            files.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return files


@contextmanager
def read_errors(path: Path, made_by: str | None = None) -> Iterator[None]:
    """Turn an error of reading `path` into a ValueError that names the file.

    `made_by`: the command that makes the file where it is missing; None: it is not ours.
    """
    from pyarrow import ArrowException  # here, because most importers of this module read no Parquet

    try:
        yield
    except (OSError, ValueError, ArrowException) as e:
        remade = f"; {made_by} makes it where it is missing" if made_by else ""
        raise ValueError(f"{path} cannot be read ({e}){remade}") from e


def _hidden_beside(path: Path, kind: str) -> Path:
    """An unused hidden name beside `path`. Its folder is created if it is missing, and swept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    return path.with_name(f".{path.name}.{host()}.{os.getpid()}.{secrets.token_hex(4)}.{kind}")


def _has_writer(path: Path, draft: re.Match[str]) -> bool:
    """Whether the writer of a draft may be alive. The lease alone tells it of another host: the last change."""
    if draft["host"] == host():
        return _is_alive(int(draft["process"]))
    try:
        return time.time() - path.lstat().st_mtime < LEASE_SECONDS
    except FileNotFoundError:  # renamed or removed meanwhile
        return True


class _Leases:
    """The drafts of this process, whose time of change a thread renews."""

    def __init__(self) -> None:
        self._drafts: set[Path] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def held(self, draft: Path) -> Iterator[None]:
        """Renew the lease of `draft` until the block ends."""
        self._drafts.add(draft)
        if self._thread is None or not self._thread.is_alive():  # after a fork, the child has none
            self._thread = threading.Thread(target=self._renew, name="leases of drafts", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self._drafts.discard(draft)

    def _renew(self) -> None:
        while True:
            time.sleep(_RENEWAL_SECONDS)
            for draft in [*self._drafts]:
                with suppress(OSError):  # not yet there, or renamed
                    os.utime(draft)


_LEASES = _Leases()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _remove(path: Path) -> None:
    """Remove a draft or a folder moved aside.

    The latter is renamed to a draft first, so that `sweep` never restores a partial folder.
    """
    draft = path.rename(path.with_suffix(".draft"))
    if draft.is_dir() and not draft.is_symlink():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink()


def _sync_tree(folder: Path) -> None:
    """`sync` everything in `folder`, except the targets of symbolic links."""
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            if not path.is_symlink():
                sync(path)
        sync(Path(root))
