"""Reads users' images safely: any file gives an RGB image, or a status that says why not.

An image id is the sha256 of the encoded bytes. Nothing outside the source folder is read, nothing is decoded before its
header gives its size, and an unusable image is never replaced by a black one.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from notellm2_core.runtime.image_formats import optional_formats
from notellm2_core.vision import jpeg
from notellm2_core.vision.image_status import Status
from notellm2_core.vision.rgb import rgb_of

Image.init()
if "HEIF" in optional_formats():
    from pillow_heif import register_heif_opener

    register_heif_opener()
# Plain bitmaps only: Pillow would run Ghostscript for EPS, and ICO and ICNS can contain a larger image.
FORMATS = tuple(  # MPO opens as JPEG; AVIF is not in every build of Pillow
    name
    for name in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "HEIF")
    if name in Image.OPEN
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_MAX_BYTES_PER_PIXEL = 8  # 16 bits x 4 channels, uncompressed: the largest file of an image, except for a margin
_MARGIN_BYTES = 1 << 20
_MAX_SIDE = 65_535  # of a JPEG or a GIF; Pillow needs more memory for the lines of a longer image than for its pixels
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_MIN_CONTRAST = 8  # of 255 greys; below it, the hash would be a hash of noise


@dataclass(frozen=True)
class EncodedImage:
    """The encoded bytes of a note's image, or a status that says why there are none."""

    status: Status
    data: bytes = b""

    @property
    def image_id(self) -> str:
        """sha256 of the encoded bytes."""
        return hashlib.sha256(self.data).hexdigest()


def read_image(
    source: Path, image_path: str | None, data: bytes | None, max_pixels: int
) -> tuple[Status, str | None, Image.Image | None]:
    """(status, image id, RGB image) of one note; id and image are None unless it can be used."""
    encoded = fetch(source, image_path, data, max_pixels)
    if encoded.status != "ok":
        return encoded.status, None, None
    status, image = decode(encoded.data, max_pixels)
    return status, None if image is None else encoded.image_id, image


def fetch(source: Path, image_path: str | None, data: bytes | None, max_pixels: int) -> EncodedImage:
    """The encoded bytes: `data` where the note contains them, else the file `image_path` relative to `source`.

    Status: missing: the note names no image. not_found: no regular file has the name. escapes: the path is absolute or
    leaves the folder (by "..", or through a link). broken: no bytes, or not readable. too_large: more bytes than
    `max_pixels` pixels can take.
    """
    max_bytes = _max_bytes(max_pixels)
    if data is None:
        if not image_path:
            return EncodedImage("missing")
        file = locate(source.resolve(), image_path, max_pixels)
        if not isinstance(file, Path):
            return EncodedImage(file)
        try:
            data = file.read_bytes()
        except OSError:  # no permission, a disk error
            return EncodedImage("broken")
    if len(data) > max_bytes:
        return EncodedImage("too_large")
    return EncodedImage("ok", data) if data else EncodedImage("broken")


def locate(
    root: Path, image_path: str, max_pixels: int, realpath: Callable[[str], str] = os.path.realpath
) -> Path | Status:
    """The file `image_path` in the folder `root`, a resolved path, or a status of `fetch`. No byte of it is read.

    `realpath`: resolves folders; one that remembers them is quick where many files lie in few folders.
    """
    if "\0" in image_path:
        return "not_found"
    folder, name = os.path.split(os.path.join(root, image_path))
    try:
        path = os.path.join(realpath(folder), name)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):
            path = os.path.realpath(path)
        if os.path.isabs(image_path) or not os.path.join(path, "").startswith(os.path.join(root, "")):
            return "escapes"
        found = os.stat(path)
    except OSError as e:
        return "not_found" if e.errno in _NO_FILE else "broken"  # no permission, a name that is too long
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device would block
        return "not_found"
    return "too_large" if found.st_size > _max_bytes(max_pixels) else Path(path)


def _max_bytes(max_pixels: int) -> int:
    return max_pixels * _MAX_BYTES_PER_PIXEL + _MARGIN_BYTES


def check(data: bytes, max_pixels: int) -> Status:
    """The status that `decode` gives for an image that it has decoded before, mostly without decoding it again."""
    status, image = open_image(data, max_pixels)
    if isinstance(image, jpeg.JpegImageFile) and not data.endswith(jpeg.END):  # truncated, or with trailing bytes
        return to_rgb(image, max_pixels)[0]
    return status


def decode(data: bytes, max_pixels: int) -> tuple[Status, Image.Image | None]:
    """("ok" | "truncated", RGB image), or ("broken" | "unsupported" | "too_large", None).

    A JPEG that ends early is decoded up to its end: its missing part is grey, or coarse if it is progressive. An
    animation gives its first frame. The EXIF orientation is applied, transparency is composited on white, and greys of
    more than 8 bits are scaled to 8.
    """
    status, image = open_image(data, max_pixels)
    return (status, None) if image is None else to_rgb(image, max_pixels)


def to_rgb(image: Image.Image, max_pixels: int) -> tuple[Status, Image.Image | None]:
    """As `decode`, for an image that Pillow has opened."""
    if (status := _check_size(image, max_pixels)) != "ok":
        return status, None
    try:
        status = jpeg.load(image) if isinstance(image, jpeg.JpegImageFile) else "ok"
        image.load()
        return status, None if status == "broken" else rgb_of(image)
    except MemoryError:
        raise
    except Exception:  # on damaged bytes, Pillow's decoders raise errors of nearly any type; the caller counts them
        return "broken", None


def perceptual_hash(image: Image.Image) -> str | None:
    """pHash: 64 bits of an image's low frequencies, in hex. Copies of another size or compression mostly share it.

    None for an image without contrast, such as a single colour: all of these would share one hash.
    """
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    return str(imagehash.phash(small)) if np.ptp(np.asarray(small)) >= _MIN_CONTRAST else None


def open_image(data: bytes, max_pixels: int) -> tuple[Status, Image.Image | None]:
    """("ok", an image whose header was read, for `to_rgb`), or as `decode`."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:  # Pillow's own bound, where `allow_pixels` was not called
        return "too_large", None
    except MemoryError:
        raise
    except Exception:  # as in `to_rgb`
        return "unsupported" if _is_heic(data) and "HEIF" not in FORMATS else "broken", None
    status = _check_size(image, max_pixels)
    return status, image if status == "ok" else None


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS


def _check_size(image: Image.Image, max_pixels: int) -> Status:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > _MAX_SIDE:
        return "too_large"
    return "ok" if width and height else "broken"


def allow_pixels(max_pixels: int) -> None:
    """Raise Pillow's process-wide bound to at least `max_pixels`, so that only the check of this module counts."""
    bound = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if bound is None else max(bound, max_pixels)
