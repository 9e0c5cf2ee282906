"""Pictures of strangers, decoded in a process of their own, which is ended where one takes too much memory or time.

No limit of the operating system does that. RLIMIT_AS counts what a library only reserves. Under RLIMIT_DATA, CPython
may loop for ever where an object cannot be allocated. So whoever waits for the process looks at its resident memory.
"""

import io
import multiprocessing
import os
import threading
import time
import warnings
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from notellm2_core.config.source import SourceSettings
from notellm2_core.runtime.processes import die_with_parent
from notellm2_core.vision.image_status import Status
from notellm2_core.vision.images import allow_pixels, open_image, to_rgb

THUMBNAIL_SIDE = 320  # pixels
_HEADER_BYTES = 64 << 20  # of memory that reading a header may take, on top of three copies of the file
_BYTES_PER_PIXEL = 24  # of memory that decoding may take; OpenJPEG takes nearly as much
_LONGEST = 60.0  # seconds for a picture
_TRIES = 2  # with a picture that the process dies of
_LOOK_SECONDS = 0.005
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class PictureProcess:
    """Any number of threads ask; one picture is decoded at a time. The process starts with the first one."""

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._process: BaseProcess | None = None

    def status(self, data: bytes) -> Status:
        """What becomes of a picture: too_large also where it takes more memory or time than its size explains.

        Raises OSError where the process cannot be started, or was closed.
        """
        return self._ask(b"s", data)[0]

    def thumbnail(self, data: bytes) -> bytes | None:
        """A picture as a small JPEG; None: it cannot be used. Raises as `status`."""
        return self._ask(b"t", data)[1]

    def close(self) -> None:
        """End the process, also while it decodes."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ask(self, what: bytes, data: bytes) -> tuple[Status, bytes | None]:
        with self._lock:
            for _ in range(_TRIES):
                if self._closed:
                    raise OSError("pictures are not decoded any more")
                if self._process is None:
                    self._start()
                try:
                    return self._answer(what, data)
                except MemoryError:
                    self._end()
                    return "too_large", None
                except (EOFError, OSError):  # a decoder crashed, or somebody killed it
                    self._end()
            return "broken", None

    def _answer(self, what: bytes, data: bytes) -> tuple[Status, bytes | None]:
        bound = self._resident_bytes() + _HEADER_BYTES + 3 * len(data)
        deadline = time.monotonic() + _LONGEST
        self._pipe.send_bytes(what)
        self._pipe.send_bytes(data)
        num_pixels: int = self._next(bound, deadline)
        result: tuple[Status, bytes | None] = self._next(bound + _BYTES_PER_PIXEL * num_pixels, deadline)
        return result

    def _next(self, most_bytes: int, deadline: float) -> Any:
        """What the process sends next. Raises MemoryError once it takes more than this, or longer."""
        while not self._pipe.poll(_LOOK_SECONDS):
            if self._resident_bytes() > most_bytes or time.monotonic() > deadline:
                raise MemoryError
        return self._pipe.recv()

    def _resident_bytes(self) -> int:
        """0 where the system does not tell (it is not Linux): there, only the time is bounded."""
        assert self._process is not None
        try:
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        except FileNotFoundError:
            return 0

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), name="pictures", daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            self._pipe.recv()  # it has imported what it needs
        except EOFError:
            self._end()
            raise OSError("the process for pictures did not start") from None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection) -> None:
    """The process: for each picture, the number of its pixels as its header says, and what becomes of it."""
    die_with_parent()
    warnings.simplefilter("ignore")  # of damaged files
    max_pixels = SourceSettings().max_image_pixels
    allow_pixels(max_pixels)
    pipe.send(None)
    while True:
        try:
            what, data = pipe.recv_bytes(), pipe.recv_bytes()
        except EOFError:
            return
        status, image = open_image(data, max_pixels)
        pipe.send(0 if image is None else image.width * image.height)
        if image is not None:
            status, image = to_rgb(image, max_pixels)
        pipe.send((status, _jpeg(image) if image is not None and what == b"t" else None))


def _jpeg(image: Any) -> bytes:
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
