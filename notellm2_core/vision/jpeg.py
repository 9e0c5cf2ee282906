"""Decodes JPEGs whose files end early, up to where they end.

Pillow's switch for this, ImageFile.LOAD_TRUNCATED_IMAGES, is one for the whole process, and does not say which images
needed it. Here the decoder gets an end-of-image marker where the file ends without one. libjpeg then fills what is
missing: with grey, or, in a progressive JPEG, with what the scans before have of it.
"""

from typing import IO, Literal

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

END = b"\xff\xd9"
_HEADERS = (b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd")  # of tables and scans; 2 bytes of length follow
_GREYS = (127, 128)  # of missing pixels; CMYK is inverted
_MIN_BLOCK, _MAX_BLOCK = 8, 32  # pixels: side of the smallest blocks, height of the largest, of subsampled colours


def load(image: JpegImageFile) -> Literal["ok", "truncated", "broken"]:
    """Decode the pixels. truncated: some are missing. broken: the file ends within the first line of blocks.

    Raises what Pillow raises for damaged bytes.
    """
    if image.fp is not None:  # not yet loaded
        image.load_read = _Bytes(image.fp)  # type: ignore[method-assign]
    image.load()
    if not (isinstance(image.load_read, _Bytes) and image.load_read.is_truncated):
        return "ok"
    return "broken" if _lacks_first_line(image) else "truncated"


class _Bytes:
    """The bytes of a JPEG as Pillow's decoder asks for them: the file, then END if more are needed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.is_truncated = file, False

    def __call__(self, read_bytes: int) -> bytes:  # all at once, because only the end says where to cut
        data = self._file.read()
        if data or self.is_truncated:
            return _without_cut_header(data)
        self.is_truncated = True
        return END


def _without_cut_header(data: bytes) -> bytes:
    """A JPEG without the header that its end cuts through: the decoder would take END for the rest of it."""
    start = max(data.rfind(marker) for marker in _HEADERS)
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    return data[:start] if start >= 0 and (len(data) < start + 4 or len(data) < end) else data


def _lacks_first_line(image: JpegImageFile) -> bool:
    """Whether all is grey below the first line of blocks, and at its right end."""
    values = np.asarray(image)
    is_grey = (values >= _GREYS[0]) & (values <= _GREYS[1])
    return bool(is_grey[_MAX_BLOCK:].all() and is_grey[:_MIN_BLOCK, -_MIN_BLOCK:].all())
