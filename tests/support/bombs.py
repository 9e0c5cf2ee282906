"""Small files that say, or hold, far more than they weigh."""

import io
import struct
import zlib
from collections.abc import Mapping
from functools import cache

from PIL import Image

_TIFF_DATA = 200  # where the data of a TIFF begins, behind its tags


def encoded(fmt: str, size: tuple[int, int] = (16, 16), mode: str = "RGB", num_frames: int = 1) -> bytes:
    out = io.BytesIO()
    frames = [Image.new(mode, size, (n % 256, 0, n // 256)) for n in range(num_frames)]
    more = {"save_all": True, "append_images": frames[1:]} if num_frames > 1 else {}
    frames[0].save(out, fmt, **more)
    return out.getvalue()


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    """One bit per pixel; `more`: its other chunks."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = pixels or compressed_zeros((1 + (width + 7) // 8) * height)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def compressed_zeros(num: int) -> bytes:
    out = zlib.compressobj(1)
    blocks = [out.compress(bytes(min(1 << 20, num - start))) for start in range(0, num, 1 << 20)]
    return b"".join(blocks) + out.flush()


def tiff(width: int, height: int, *tags: tuple[int, int, int, int], data: bytes = bytes(1000)) -> bytes:
    """Tags: number, type (3: 16 bits, 4: 32 bits), count, value or place. Pillow reads them itself."""
    known = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries = sorted([*known, *tags])
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body).ljust(_TIFF_DATA, b"\0") + data


def _replaced(data: bytes, before: bytes, offset: int, value: bytes) -> bytes:
    """`data` with other bytes behind a place that is found by what stands there."""
    start = data.index(before) + offset
    return data[:start] + value + data[start + len(value) :]


def _gif(side: int) -> bytes:
    size, data = struct.pack("<HH", side, side), encoded("GIF")
    return _replaced(_replaced(data, b"GIF8", 6, size), b"\x2c\0\0\0\0\x10\0\x10\0", 5, size)


def _bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, side, side, 1, 24, *[0] * 6) + bytes(900)


@cache
def refused() -> Mapping[str, bytes]:
    """Files that nobody should decode, by what they are."""
    strips, one = bytes(4_000_000), ((259, 3, 1, 1), (278, 4, 1, 1))
    deflated = (259, 3, 1, 8)
    jpeg = struct.pack(">HH", 65500, 65500)
    return {
        "png of 900 million pixels": png(30_000, 30_000),
        "png of 2**62 pixels": png(2**31 - 1, 2**31 - 1, pixels=zlib.compress(b"")),
        "png of one line": png(49_000_000, 1),
        "png of one column": png(1, 49_000_000),
        "png with 200 MB of text": png(8, 8, chunk(b"zTXt", b"a\0\0" + compressed_zeros(200 << 20))),
        "png with 200 MB of UTF-8": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + compressed_zeros(200 << 20))),
        "png with 100 texts of 1 MB": png(8, 8, *[chunk(b"zTXt", b"a\0\0" + compressed_zeros(1 << 20))] * 100),
        "png with a profile of 200 MB": png(8, 8, chunk(b"iCCP", b"a\0\0" + compressed_zeros(200 << 20))),
        "gif": _gif(65535),
        "webp": _replaced(encoded("WEBP"), b"\x9d\x01\x2a", 3, struct.pack("<HH", 16383, 16383)),
        "jpeg": _replaced(encoded("JPEG"), b"\xff\xc0", 5, jpeg),
        "progressive jpeg": _replaced(encoded("JPEG"), b"\xff\xc0", 0, b"\xff\xc2\0\x11\x08" + jpeg),
        "jpeg 2000": _replaced(encoded("JPEG2000"), b"ihdr", 4, struct.pack(">II", 60_000, 60_000)),
        "bmp": _bmp(60_000),
        "ppm": b"P6 60000 60000 255\n" + bytes(100),
        "tiff": tiff(65_000, 65_000, deflated, (273, 4, 1, _TIFF_DATA), (279, 4, 1, 500)),
        "tiff of a million strips": tiff(
            7000, 7000, *one, (273, 4, 1_000_000, 200), (279, 4, 1_000_000, 200), data=strips
        ),
        "tiff of 2**30 strips": tiff(16, 16, *one, (273, 4, 2**30 - 1, 200), (279, 4, 2**30 - 1, 200)),
        "tiff of a million tiles": tiff(
            7000, 7000, (259, 3, 1, 1), (322, 4, 1, 1), (323, 4, 1, 1), (324, 4, 1_000_000, 200),
            (325, 4, 1_000_000, 200), data=strips,
        ),
        "tiff of a tile of 900 million pixels": tiff(
            16, 16, deflated, (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 200), (325, 4, 1, 100),
            data=zlib.compress(bytes(900)),
        ),
    }  # fmt: skip


def animations() -> Mapping[str, bytes]:
    """Files of three hundred frames: pictures, because the first frame is one."""
    return {fmt: encoded(fmt, (8, 8), num_frames=300) for fmt in ("GIF", "WEBP", "PNG", "TIFF")}
