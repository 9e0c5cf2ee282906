"""Files and folders that are whole or not there: written under a hidden name, synced to the disk, then renamed.

A draft lies beside its target and is named `.TARGET.HOST.PROCESS.RANDOM.draft`. No reader of Parquet opens such a name,
and it says who writes it: each writer first removes the drafts of this host's dead processes from the folder, so a kill
leaves nothing for long. At import this module needs the standard library alone.
"""

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DRAFT = re.compile(r"(?s)\.(?P<target>.+)\.(?P<host>[^.]+)\.(?P<process>\d{1,9})\.[0-9a-f]{8}\.(?P<kind>draft|old)")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write a file to. It gets the name `path` if the block ends without an error.

    Parents are created. Of several writers at once, the last one wins. A block that fails leaves `path` as it was.
    """
    draft = _hidden_beside(path, "draft")
    try:
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
    """A new folder beside `out` that takes its place, as by `swap_in`, if the block ends without an error."""
    with draft_folder(out) as draft:
        yield draft
        swap_in(draft, out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A new folder that is renamed to `out` if the block ends without an error.

    For a folder whose name says what is in it: if another process has made it by then, that one stays, and this one is
    removed.
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
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap_in(new: Path, out: Path) -> None:
    """The folder `new` takes the place of `out`, which need not exist. Both must be on one file system.

    The previous content of `out` is moved aside, put back if the rename fails, and removed in the end. After a kill
    between the two renames, the next `sweep` puts it back.
    """
    _sync_tree(new)
    old = _hidden_beside(out, "old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    sync(out.parent)
    if old.exists():
        _remove(old)


def sweep(folder: Path) -> None:
    """Remove the drafts that dead processes of this host have left in `folder`, and put back what they moved aside."""
    for path in folder.iterdir():
        draft = _DRAFT.fullmatch(path.name)
        if draft is None or draft["host"] != host() or _is_alive(int(draft["process"])):
            continue
        target = path.with_name(draft["target"])
        with suppress(OSError):  # another process may sweep, too
            if draft["kind"] == "old" and not target.exists():
                os.rename(path, target)
            else:
                _remove(path)


def is_draft(path: Path) -> bool:
    """Whether the name is that of a draft of any process, or of what it has moved aside."""
    return _DRAFT.fullmatch(path.name) is not None


def host() -> str:
    """A name without dots for the machine, or container, in which process ids mean what they do here.

    Containers on the host's network share its name, but not its process ids.
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
    """Give the content of `source` to the new file `target`: by a hard link where the file system can, else a copy."""
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or a file system without links
        with written_whole(target) as draft:
            shutil.copy2(source, draft)


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet_files(folder: Path) -> list[Path]:
    """The visible *.parquet files of `folder`, sorted: those that readers of Parquet folders take for its table."""
    return sorted(path for path in folder.glob("*.parquet") if not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    """Whether readers of Parquet folders, as Spark and Arrow, pass over files of this name."""
    return name.startswith((".", "_"))


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Relative path, bytes and modification time in ns of every file below `folder`, except in hidden folders."""
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root) / name
            stat = path.stat() if path.exists() else path.lstat()  # a link to nowhere
            files.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return files


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for `path` into a ValueError that names it."""
    from pyarrow import ArrowException  # here: most users of this module read no Parquet

    try:
        yield
    except (OSError, ValueError, ArrowException) as e:
        raise ValueError(f"{path} cannot be read ({e}); if it is damaged, delete it and run again") from e


def _hidden_beside(path: Path, kind: str) -> Path:
    """A name that is free, in the folder of `path`, which is created or swept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    return path.with_name(f".{path.name}.{host()}.{os.getpid()}.{secrets.token_hex(4)}.{kind}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _remove(path: Path) -> None:
    """Remove a draft, or what was moved aside: that is a draft first, for half of it must not be put back."""
    draft = path.rename(path.with_suffix(".draft"))
    if draft.is_dir() and not draft.is_symlink():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink()


def _sync_tree(folder: Path) -> None:
    """`sync` everything in `folder`, but not what symbolic links in it lead to."""
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            if not path.is_symlink():
                sync(path)
        sync(Path(root))
