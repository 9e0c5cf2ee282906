"""Files and folders are written whole or not at all, under failures, kills and several writers at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_core.runtime import files
from notellm2_core.runtime.files import (
    draft_folder,
    is_draft,
    is_hidden,
    link_or_copy,
    listing,
    new_folder,
    parquet_files,
    read_errors,
    replaced_folder,
    swap_in,
    sweep,
    sync,
    write_atomically,
    written_whole,
)
from tests.support.drafts import dead_process, draft_of
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[3]
OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "deep/c": "new"}


def write_in_two(path: Path, text: str) -> None:
    """Write the first half of `text`, then the rest."""
    with written_whole(path) as draft:
        draft.write_text(text[: len(text) // 2])
        with draft.open("a") as file:
            file.write(text[len(text) // 2 :])


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace(out: Path, content: dict[str, str]) -> None:
    with replaced_folder(out) as draft:
        fill(draft, content)


def create(out: Path, content: dict[str, str]) -> None:
    with new_folder(out) as draft:
        fill(draft, content)


def content_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """The id of a forked process that does `action` and exits."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed_at(point: int, action: Callable[[], None]) -> bool:
    """Do `action` in a process that is killed before its `point`-th file access. False if it ended before that."""

    def dying() -> None:
        accesses = count()

        def hook(event: str, arguments: object) -> None:
            if event.split(".")[0] in ("open", "os", "shutil") and next(accesses) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()

    _, status = os.waitpid(in_child(dying), 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_a_file_is_written_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "file"
    for text in ("one", "two"):
        write_atomically(path, text)
        assert path.read_text() == text and names(path.parent) == ["file"]


def test_a_writer_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path, out = tmp_path / "file", tmp_path / "folder"
    write_atomically(path, "old"), replace(out, OLD)
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, ValueError("no vector"), KeyboardInterrupt()):
        with pytest.raises(type(error)), written_whole(path) as draft:
            draft.write_text("half")
            raise error
        for folder_of in (replaced_folder, new_folder, draft_folder):
            with pytest.raises(type(error)), folder_of(out) as draft:
                fill(draft, NEW)
                raise error
    with pytest.raises(FileNotFoundError), written_whole(path):
        pass  # nothing was written
    with pytest.raises(FileNotFoundError), replaced_folder(out) as draft:
        draft.rmdir()  # so `out`, which was moved aside, is put back
    assert path.read_text() == "old" and content_of(out) == OLD and names(tmp_path) == ["file", "folder"]


def test_a_file_whose_writer_is_killed_is_the_old_or_the_new(tmp_path: Path) -> None:
    """A writer is killed at each of its file accesses in turn. The next complete write removes what was left."""
    path, contents = tmp_path / "file", []
    for point in count():
        write_atomically(path, "old")
        killed = killed_at(point, lambda: write_in_two(path, "new"))
        contents.append(path.read_text())
        write_in_two(path, "new")
        assert path.read_text() == "new" and names(tmp_path) == ["file"]
        if not killed:
            break
    assert set(contents[:-1]) == {"old", "new"} and contents[-1] == "new"
    assert contents == sorted(contents, reverse=True)  # first the old, then the new


@pytest.mark.slow
@pytest.mark.parametrize("is_removed", [False, True])
def test_a_folder_whose_writer_is_killed_is_the_old_or_the_new(is_removed: bool, tmp_path: Path) -> None:
    """A writer is killed at each of its file accesses in turn. Between its two renames the folder is absent, until a
    sweep puts the old one back. If somebody removes the new one meanwhile, no half of the old one comes back.
    """
    out, contents, num_absent = tmp_path / "out", [], 0
    for point in count():
        replace(out, OLD)
        killed = killed_at(point, lambda: replace(out, NEW))
        num_absent += not out.exists()
        if is_removed and out.exists() and content_of(out) == NEW:
            shutil.rmtree(out)
        sweep(tmp_path)
        contents.append(content_of(out) if out.exists() else None)
        assert contents[-1] in ([OLD, None] if is_removed else [OLD, NEW])
        replace(out, NEW)
        assert content_of(out) == NEW and names(tmp_path) == ["out"]
        if not killed:
            break
    assert OLD in contents and len(contents) > 20 and num_absent == 1


def test_drafts_of_another_host_go_when_their_lease_has_ended(tmp_path: Path) -> None:
    """A draft and a folder that was moved aside, each of a host that is gone for a day, and of one that is at work."""
    names_of = {}
    for name, age in (("gone", 86_400), ("working", 60)):
        for kind in ("draft", "old"):
            left = tmp_path / f".{name}-{kind}.elsewhere-1.7.00000000.{kind}"
            fill(left, NEW)
            stamp = time.time() - age
            os.utime(left, (stamp, stamp))
            names_of[name, kind] = left.name
    sweep(tmp_path)
    assert names(tmp_path) == sorted(["gone-old", names_of["working", "draft"], names_of["working", "old"]])
    assert content_of(tmp_path / "gone-old") == NEW


def test_the_lease_of_a_draft_is_renewed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_RENEWAL_SECONDS", 0.01)
    monkeypatch.setattr(files, "_LEASES", files._Leases())
    with draft_folder(tmp_path / "out") as draft:
        os.utime(draft, (0, 0))
        wait_for(lambda: draft.stat().st_mtime > 0)


def test_a_new_folder_whose_writer_is_killed_is_whole_or_absent(tmp_path: Path) -> None:
    out, contents = tmp_path / "out", []
    for point in count():
        shutil.rmtree(out, ignore_errors=True)
        killed = killed_at(point, lambda: create(out, NEW))
        contents.append(content_of(out) if out.exists() else None)
        create(out, NEW)
        assert content_of(out) == NEW and names(tmp_path) == ["out"]
        if not killed:
            break
    assert all(content in (None, NEW) for content in contents) and None in contents and NEW in contents[:-1]


def test_the_first_of_two_new_folders_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as late:
        fill(late, NEW)
        create(tmp_path / "out", OLD)
    assert content_of(tmp_path / "out") == OLD and names(tmp_path) == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError), new_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_last_of_two_replacing_folders_stays(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as late:
        fill(late, NEW)
        replace(tmp_path / "out", OLD)
    assert content_of(tmp_path / "out") == NEW and names(tmp_path) == ["out"]


def test_a_work_folder_is_swapped_in(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".partial"
    for content in (OLD, NEW):
        fill(work, content)
        swap_in(work, out)
        assert content_of(out) == content and names(tmp_path) == ["out"]
    out.rename(tmp_path / "real")
    out.symlink_to("real")
    replace(out, OLD)  # the link itself is replaced, not its target
    assert content_of(out) == OLD and content_of(tmp_path / "real") == NEW and names(tmp_path) == ["out", "real"]


def test_two_writers_at_once_write_whole_files(tmp_path: Path) -> None:
    """Neither writer removes the other's draft, and a reader sees the content of one of them."""
    path, texts = tmp_path / "file", ["a" * 100_000, "b" * 100_000]
    write_atomically(path, texts[0])

    def write(text: str) -> None:
        for _ in range(50):
            write_in_two(path, text)

    for child in [in_child(partial(write, text)) for text in texts]:
        done = 0
        while not done:
            assert path.read_text() in texts
            done, status = os.waitpid(child, os.WNOHANG)
        assert status == 0
    assert names(tmp_path) == ["file"]


def test_drafts_of_the_dead_are_swept(tmp_path: Path) -> None:
    """Drafts of this host's dead processes are removed; those of live ones, of other hosts and similar names stay."""
    path, dead = tmp_path / "a.parquet", dead_process()
    gone, elsewhere = draft_of(path, dead), draft_of(path, dead, "another-host")
    alive = [draft_of(path, process) for process in (os.getpid(), 1)]
    others = [tmp_path / name for name in (f".a.{dead}.draft", f"{gone.name[1:]}", f"{gone.name}.txt")]
    for file in (gone, *alive, elsewhere, *others):
        file.touch()
    fill(draft_of(tmp_path / "out", dead), OLD)
    write_atomically(tmp_path / "b", "any writer sweeps its folder")
    assert names(tmp_path) == sorted(p.name for p in (*alive, elsewhere, *others, tmp_path / "b"))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30).filter(
        lambda n: n.strip(".")
    )
)
def test_no_reader_takes_a_draft_for_a_file(name: str, tmp_path: Path) -> None:
    for target in (tmp_path / name, tmp_path / f"{name}.parquet"):
        with written_whole(target) as draft, draft_folder(target) as folder:
            draft.touch()
            for hidden in (draft, folder):
                assert is_draft(hidden) and is_hidden(hidden.name) and hidden.suffix == ".draft"
                assert hidden.parent == tmp_path
        assert not is_draft(target)
        target.unlink()


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft, with all its files but no targets of links, is synced before its rename, and the parent after it."""
    done: list[str] = []
    fsync, rename, replace_ = os.fsync, os.rename, os.replace

    def name(path: object) -> str:
        path = Path(os.fspath(path)).relative_to(tmp_path)  # type: ignore[call-overload]
        return "/".join("draft" if is_draft(Path(part)) else part for part in path.parts) or "parent"

    def synced(descriptor: int) -> None:
        done.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def renamed(way: Callable[[object, object], None]) -> Callable[[object, object], None]:
        return lambda old, new: (done.append(f"{name(old)} -> {name(new)}"), way(old, new))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace_))
    write_atomically(tmp_path / "file", "x")
    assert done == ["sync draft", "draft -> file", "sync parent"]
    for folder_of in (new_folder, replaced_folder):
        done.clear()
        with folder_of(tmp_path / "out") as draft:
            fill(draft, {"a": "1", "deep/b": "2"})
            (draft / "link").symlink_to("nowhere")
        assert sorted(done[:4]) == ["sync draft", "sync draft/a", "sync draft/deep", "sync draft/deep/b"]
        assert done[-3:].index("draft -> out") < done[-3:].index("sync parent")
    assert done[4] == "out -> draft"  # moved aside


def test_a_disk_that_cannot_sync_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a full disk is noticed only at the sync."""
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"\[Errno 28\] No space left on device: '{tmp_path}/\.file\."):
        write_atomically(path, "new")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        sync(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_hard_link_or_else_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, alias = tmp_path / "source", tmp_path / "alias"
    source.write_text("x")
    alias.symlink_to(source)
    link_or_copy(alias, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source) and not (tmp_path / "linked").is_symlink()
    with pytest.raises(FileExistsError):
        link_or_copy(source, tmp_path / "linked")

    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "x" and not (tmp_path / "copied").samefile(source)
    assert (tmp_path / "copied").stat().st_mtime_ns == source.stat().st_mtime_ns


def test_the_parquet_files_of_a_folder(tmp_path: Path) -> None:
    """The files are those that Arrow reads; a missing folder has none."""
    table = pa.table({"x": [1]})
    for name in ("b.parquet", "a.parquet", ".hidden.parquet", "_hidden.parquet"):
        pq.write_table(table, tmp_path / name)
    assert pq.read_table(tmp_path).num_rows == 2
    (tmp_path / "counts.json").touch()
    assert [file.name for file in parquet_files(tmp_path)] == ["a.parquet", "b.parquet"]
    assert parquet_files(tmp_path / "nowhere") == []


def test_a_listing_shows_every_change(tmp_path: Path) -> None:
    """Files in folders and behind links, and broken links, are listed; the content of hidden folders is not."""
    fill(tmp_path, {"a": "1", "deep/b": "22", ".git/c": "3"})
    (tmp_path / "deep" / "lost").symlink_to("nowhere")
    sizes = {name: size for name, size, _ in listing(tmp_path)}
    assert sizes == {"a": 1, "deep/b": 2, "deep/lost": len("nowhere")}
    before = sorted(listing(tmp_path))
    os.utime(tmp_path / "a", ns=(0, 1))
    assert sorted(listing(tmp_path)) == [("a", 1, 1), *before[1:]]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no Parquet")
    for made_by, end in ((None, ""), ("the run", "; the run makes it where it is missing")):
        message = rf"x\.parquet cannot be read \(.*\){end}$"
        with pytest.raises(ValueError, match=message), read_errors(tmp_path / "x.parquet", made_by):
            pq.read_table(tmp_path / "x.parquet")
    with pytest.raises(KeyError), read_errors(tmp_path):
        {}["nothing else is touched"]


def test_it_needs_the_standard_library_alone() -> None:
    """Spark's workers and asset processes import the module. -S: without site-packages."""
    code = "import sys; import notellm2_core.runtime.files; print(*(m for m in sys.modules if 'notellm2' in m))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["notellm2_core", "notellm2_core.runtime", "notellm2_core.runtime.files"]
