"""The process that decodes pictures of strangers: bombs take little memory, and nothing ends it for good."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image

from notellm2_core.serving import pictures
from notellm2_core.serving.pictures import PictureProcess
from tests.support.bombs import animations, encoded, refused
from tests.support.released import png

MOST_MB = 100.0


def peak_mb(process: psutil.Process) -> float:
    """The most memory that a process has had since its peak was last forgotten."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak(process: psutil.Process) -> float:
    """Its memory in MB, from which on its peak counts."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return peak_mb(process)


@contextmanager
def watched() -> Iterator[list[float]]:
    """The highest peak of the children of this process in MB above what each had: also of one that is ended."""
    before: dict[int, float] = {}
    highest, is_over = [0.0], threading.Event()

    def look() -> None:
        while not is_over.wait(0.002):
            for child in psutil.Process().children():
                try:
                    before[child.pid] = before.get(child.pid) or forget_peak(child)
                    highest[0] = max(highest[0], peak_mb(child) - before[child.pid])
                except (OSError, StopIteration, psutil.Error):  # it has ended
                    continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield highest
    finally:
        is_over.set()
        looking.join()


@pytest.fixture(scope="module")
def process() -> Iterator[PictureProcess]:
    process = PictureProcess()
    assert process.status(png(0)) == "ok"
    yield process
    process.close()


@pytest.mark.parametrize("name", refused())
def test_a_bomb_is_refused_and_takes_little_memory(process: PictureProcess, name: str) -> None:
    process.status(png(0))  # it runs, so that its own start is not measured
    with watched() as highest:
        assert process.status(refused()[name]) in ("too_large", "broken")
    assert highest[0] < MOST_MB


def test_animations_are_pictures(process: PictureProcess) -> None:
    with watched() as highest:
        assert {process.status(data) for data in animations().values()} == {"ok"}
    assert highest[0] < MOST_MB


def test_a_thumbnail(process: PictureProcess) -> None:
    made = process.thumbnail(encoded("PNG", (1000, 500)))
    assert made is not None and Image.open(io.BytesIO(made)).size == (320, 160)
    assert process.thumbnail(b"no picture") is None and process.thumbnail(png(0)) is not None


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A picture that takes some seconds, or on a quick machine half a second."""
    return encoded("JPEG2000", (3000, 3000))


@pytest.mark.parametrize(("tries", "status"), [(1, "broken"), (2, "ok")])
def test_a_process_that_ends_is_started_again(
    process: PictureProcess, slow: bytes, tries: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, that may have been somebody else's fault; a picture that it ends with each time is broken."""
    assert process.status(png(1)) == "ok" and process._process is not None
    monkeypatch.setattr(pictures, "_TRIES", tries)
    killing = threading.Timer(0.1, process._process.kill)
    killing.start()
    assert process.status(slow) == status
    killing.join()
    assert process.status(png(1)) == "ok"


def test_a_picture_that_takes_too_long_is_too_large(slow: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    process = PictureProcess()
    process.status(png(0))
    monkeypatch.setattr(pictures, "_LONGEST", 0.05)
    assert process.status(slow) == "too_large"
    monkeypatch.undo()
    assert process.status(png(0)) == "ok"
    process.close()
    with pytest.raises(OSError, match="not decoded any more"):
        process.status(png(0))
