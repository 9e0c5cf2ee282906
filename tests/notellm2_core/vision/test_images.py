import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from notellm2_core.vision import images
from notellm2_core.vision.images import FORMATS, check, decode, fetch, perceptual_hash, read_image, to_rgb

MAX = 1_000_000


def encode(image: Image.Image, fmt: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def rgb(data: bytes) -> np.ndarray:
    status, image = decode(data, MAX)
    assert status == "ok" and image is not None and image.mode == "RGB"
    return np.asarray(image).astype(int)


def noise(width: int = 20, height: int = 10) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header has this size, without pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (body, empty, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_rgb_comes_back_exactly(fmt):
    assert np.array_equal(rgb(encode(noise(), fmt)), np.asarray(noise()))


@pytest.mark.parametrize("fmt", ["JPEG", "WEBP", "GIF"])
def test_lossy_rgb_comes_back_nearly(fmt):
    plain = Image.new("RGB", (32, 32), (200, 100, 50))
    assert np.abs(rgb(encode(plain, fmt)) - (200, 100, 50)).max() <= 4


def test_palette():
    plain = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert plain.mode == "P"
    assert (rgb(encode(plain, "PNG")) == (10, 200, 30)).all()


def test_transparent_palette_is_white_where_transparent():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert rgb(encode(image, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_alpha_is_composited_on_white():
    """Half-transparent black (alpha 128 of 255) on white is 255 * (1 - 128 / 255) = 127."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert rgb(encode(image, "PNG"))[0].tolist() == [[127] * 3, [255] * 3]
    grey = Image.new("LA", (2, 1), (0, 128))
    grey.putpixel((1, 0), (100, 255))
    assert rgb(encode(grey, "PNG"))[0].tolist() == [[127] * 3, [100] * 3]


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert rgb(encode(image, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9] * 3]


def test_cmyk():
    """No ink is white, full black ink is black, and full cyan has no red."""
    image = Image.new("CMYK", (24, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 8))
    image.paste((255, 0, 0, 0), (16, 0, 24, 8))
    for data in (encode(image, "JPEG", quality=100), encode(image, "TIFF")):
        pixels = rgb(data)
        assert pixels[4, 2].min() > 245 and pixels[4, 12].max() < 10
        assert pixels[4, 20][0] < 10 and pixels[4, 20][1:].min() > 245


def test_grey_of_1_8_and_16_bits():
    """16 bits are scaled to 8: 65535 -> 255, 32768 -> 127.5 -> 128, 257 -> 1, 0 -> 0."""
    assert rgb(encode(Image.new("1", (2, 2), 1), "PNG")).min() == 255
    assert (rgb(encode(Image.new("L", (2, 2), 77), "PNG")) == 77).all()
    deep = Image.fromarray(np.array([[65535, 32768, 257, 0]], np.uint16))
    for fmt in ("PNG", "TIFF"):
        assert rgb(encode(deep, fmt))[0, :, 0].tolist() == [255, 128, 1, 0]


def test_grey_of_32_bits_and_floats_is_stretched():
    """Without a declared range the darkest value becomes 0 and the brightest 255; nan counts as 0."""
    floats = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32))
    assert rgb(encode(floats, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    ints = Image.fromarray(np.array([[0, 100_000, 200_000]], np.int32))
    assert rgb(encode(ints, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    flat = Image.fromarray(np.array([[np.nan, 0.0]], np.float32))
    assert rgb(encode(flat, "TIFF")).max() == 0


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animations_give_their_first_frame(fmt):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {"quality": 100} if fmt == "MPO" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert np.abs(rgb(data) - (255, 0, 0)).max() <= (2 if fmt == "MPO" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """An image whose pixels are stored turned is read upright: the red corner is top left, the size 20 x 10."""
    upright = Image.new("RGB", (20, 10), "white")
    upright.paste("red", (0, 0, 5, 5))
    undo = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    stored = upright
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(rgb(encode(stored, "PNG", exif=exif)), np.asarray(upright))


@pytest.mark.parametrize("fmt", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image_is_broken_not_half_grey(fmt):
    data = encode(noise(64, 64), fmt)
    for share in (0.3, 0.6, 0.9):
        assert decode(data[: int(len(data) * share)], MAX)[0] == "broken"


def clouds(width: int = 100, height: int = 120, seed: int = 0) -> Image.Image:
    """A smooth image of many colours, none of which is the grey of missing pixels throughout."""
    values = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_truncated_jpeg_is_read_as_far_as_it_goes(mode):
    """Of the first 75 % of the bytes: all pixels in the upper half of the image, grey in the lowest fifth.

    libjpeg gives 128 for missing pixels. Of CMYK, which is stored inverted, each of the four is 127, and RGB is then
    (255 - 127) * (255 - 127) / 255 = 64.
    """
    data = encode(clouds().convert(mode), "JPEG", subsampling=0)
    status, image = decode(data[: len(data) * 3 // 4], MAX)
    assert status == "truncated" and image is not None and image.mode == "RGB" and image.size == (100, 120)
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(pixels[:60], rgb(data)[:60])
    assert (pixels[96:] == (64 if mode == "CMYK" else 128)).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_pixels_are_those_of_pillows_own_switch(progressive, monkeypatch):
    """The switch works for the whole process; it is not used, so that a truncated PNG stays broken."""
    data = encode(clouds(), "JPEG", progressive=progressive)[:-300]
    status, image = decode(data, MAX)
    assert status == "truncated" and not ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))


def test_of_several_frames_only_the_first_has_to_be_whole():
    frames = [clouds(seed=seed) for seed in range(2)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    end_of_first = data.index(b"\xff\xd9")
    assert decode(data[: end_of_first - 300], MAX)[0] == "truncated"
    assert np.array_equal(rgb(data[:-300]), rgb(data)) and check(data[:-300], MAX) == "ok"


def test_a_truncated_jpeg_that_was_opened_before_is_counted_each_time():
    opened = Image.open(io.BytesIO(encode(clouds(), "JPEG")[:2000]))
    assert [to_rgb(opened, MAX)[0] for _ in range(2)] == ["truncated", "truncated"]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_every_length_of_a_jpeg(mode, options):
    """Broken as long as no pixel can be decoded, then truncated, and ok with the last byte, or the last two or three.

    `check` agrees, which looks at the header and at the end of the bytes.
    """
    data = encode(clouds(40, 48).convert(mode), "JPEG", **options)
    statuses = [decode(data[:n], MAX)[0] for n in range(len(data) + 1)]
    first, last = statuses.index("truncated"), statuses.index("ok")
    assert statuses == ["broken"] * first + ["truncated"] * (last - first) + ["ok"] * (len(data) + 1 - last)
    assert first < len(data) * 0.7 and last >= len(data) - 2
    assert [check(data[:n], MAX) for n in range(first, len(data) + 1)] == statuses[first:]
    assert check(data + b"trailing bytes", MAX) == decode(data + b"trailing bytes", MAX)[0] == "ok"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_ends_within_its_first_line_is_broken(mode):
    """With a restart marker at the end of each row of blocks, the first one is where the first row ends."""
    data = encode(clouds(800, 64).convert(mode), "JPEG", restart_marker_rows=1)
    start, end = data.index(b"\xff\xda"), data.index(b"\xff\xd0")
    for share in (0, 0.3, 0.6, 0.9):
        assert decode(data[: int(start + share * (end - start))], MAX) == ("broken", None)
    assert decode(data[:end], MAX)[0] == "truncated"
    black = encode(Image.new(mode, (64, 64)), "JPEG")
    assert decode(black[:-20], MAX)[0] == "truncated"


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"


def test_heic_without_its_package_is_told_apart_from_broken_images(monkeypatch):
    monkeypatch.setattr(images, "FORMATS", tuple(f for f in FORMATS if f != "HEIF"))
    assert read_image(Path("."), None, HEIC, MAX) == ("unsupported", None, None)
    monkeypatch.setattr(images, "FORMATS", (*FORMATS, "HEIF"))
    assert decode(HEIC, MAX)[0] == "broken"
    assert decode(HEIC.replace(b"heic", b"isom"), MAX)[0] == "broken"


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heic(orientation):
    """Lossless HEIC gives the pixels of PNG up to rounding in YCbCr, upright, and is refused by its header's size."""
    pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(clouds(), "HEIF", quality=-1, chroma=444, exif=exif.tobytes())
    assert np.abs(rgb(data) - rgb(encode(clouds(), "PNG", exif=exif))).max() <= 2
    assert check(data, MAX) == "ok" and decode(data, 100)[0] == "too_large"
    assert {decode(data[:n], MAX)[0] for n in (50, 500, len(data) - 50)} == {"broken"}


@pytest.mark.parametrize(
    "data", [b"x", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF"]
)
def test_other_files_are_broken(data):
    assert read_image(Path("."), None, data, MAX) == ("broken", None, None)


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    """Small files whose headers claim 30,000 x 30,000 or 1,000 x 1,001 pixels are refused; the limit of 10^6 is not."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert decode(png_header(30_000, 30_000), MAX) == ("too_large", None)
    assert decode(png_header(1000, 1001), MAX) == ("too_large", None)
    assert check(png_header(1000, 1000), MAX) == "ok"
    assert check(png_header(0, 5), MAX) == "broken"


def test_pillows_bound_is_raised_to_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(noise(30, 30), "PNG")
    assert decode(data, MAX)[0] == "too_large"  # 900 pixels > 2 * 100
    images.allow_pixels(MAX)
    assert Image.MAX_IMAGE_PIXELS == MAX
    assert decode(data, MAX)[0] == "ok"


def test_id_is_the_hash_of_the_bytes(tmp_path):
    data = encode(noise(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for result in (read_image(tmp_path, "a.png", None, MAX), read_image(tmp_path, None, data, MAX)):
        assert result[:2] == ("ok", hashlib.sha256(data).hexdigest())
    assert read_image(tmp_path, "a.png", b"", MAX)[0] == "broken"  # bytes in the table win over the path


def test_paths(tmp_path):
    """The target of a path decides: a link may lead to a file inside the source, and no file outside is opened."""
    source = tmp_path / "source"
    (source / "images" / "deep").mkdir(parents=True)
    data = encode(noise(), "PNG")
    for path in (source / "images" / "a.png", tmp_path / "outside.png", source / "images" / "..odd.png"):
        path.write_bytes(data)
    (source / "empty.png").touch()
    (source / "inside.png").symlink_to("images/a.png")
    (source / "out.png").symlink_to(tmp_path / "outside.png")
    (source / "out").symlink_to(tmp_path)
    (source / "loop.png").symlink_to("loop.png")
    (source / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(source / "pipe.png")
    expected = {
        "images/a.png": "ok",
        "images/deep/../a.png": "ok",
        "images/..odd.png": "ok",
        "inside.png": "ok",
        "../outside.png": "escapes",
        "images/../../outside.png": "escapes",
        "../nowhere.png": "escapes",
        str(tmp_path / "outside.png"): "escapes",
        str(source / "images/a.png"): "escapes",
        "/etc/passwd": "escapes",
        "out.png": "escapes",
        "out/outside.png": "escapes",
        "images/none.png": "not_found",
        "gone.png": "not_found",
        "loop.png": "not_found",
        "images": "not_found",
        "pipe.png": "not_found",
        "images/a\0.png": "not_found",
        "": "missing",
        "empty.png": "broken",
        "x" * 5000: "broken",
    }
    for path, status in expected.items():
        assert (path, read_image(source, path, None, MAX)[0]) == (path, status)
    assert read_image(source, None, None, MAX) == ("missing", None, None)


def test_a_source_behind_a_link_is_no_escape(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(encode(noise(), "PNG"))
    (tmp_path / "link").symlink_to("real")
    assert read_image(tmp_path / "link", "a.png", None, MAX)[0] == "ok"


def test_a_file_too_long_for_its_pixels_is_not_read(tmp_path, monkeypatch):
    """A file may have 8 bytes per allowed pixel plus 1 MiB: 10 pixels allow 1,048,656 bytes."""
    with (tmp_path / "huge.png").open("wb") as f:
        f.truncate(1_048_657)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert fetch(tmp_path, "huge.png", None, 10).status == "too_large"
    assert fetch(tmp_path, None, b"x" * 1_048_657, 10).status == "too_large"
    assert fetch(tmp_path, None, b"x" * 1_048_656, 10).status == "ok"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged TIFFs and of bombs
@settings(max_examples=150)
@given(
    fmt=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "TGA"]),
    seed=st.integers(0, 10**6),
)
def test_damaged_bytes_never_raise(fmt, seed):
    """A file with any overwritten bytes gives an RGB image or a reason."""
    rng = np.random.default_rng(seed)
    data = bytearray(encode(noise(16, 16), fmt))
    for position in rng.integers(0, len(data), rng.integers(1, 20)):
        data[position] = rng.integers(0, 256)
    status, image = decode(bytes(data), MAX)
    assert status in ("ok", "truncated", "broken", "too_large")
    assert (image is not None and image.mode == "RGB") == (status in ("ok", "truncated"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "HEIF"])
def test_every_sixteenth_of_a_file(fmt):
    """A file that ends anywhere gives an RGB image or a reason."""
    data = encode(noise(), fmt)
    found = [decode(data[: len(data) * n // 16], MAX)[0] for n in range(17)]
    assert found[0] == "broken" and found[-1] == "ok" and set(found) <= {"ok", "truncated", "broken", "too_large"}


def test_a_longer_side_than_any_camera_has_is_too_large():
    """Pillow takes 70 bytes a pixel for an image of one column."""
    assert decode(encode(Image.new("1", (1, 65_535)), "PNG"), MAX)[0] == "ok"
    for size in ((1, 65_536), (65_536, 1)):
        assert decode(encode(Image.new("1", size), "PNG"), MAX) == ("too_large", None)


def test_perceptual_hash():
    """Most copies of other quality, size or format share the hash. Other images do not; a single colour has none."""

    def is_shared(image: Image.Image, copy: bytes) -> bool:
        return perceptual_hash(decode(copy, MAX)[1]) == perceptual_hash(image)

    images = [clouds(200, 160, seed) for seed in range(20)]
    for quality, side in ((90, 200), (60, 200), (85, 100)):
        copies = [encode(p.resize((side, side * 4 // 5)), "JPEG", quality=quality) for p in images]
        assert sum(map(is_shared, images, copies)) >= 10
    assert all(is_shared(p, encode(p, "PNG")) for p in images)
    assert len({perceptual_hash(p) for p in images}) == 20
    assert perceptual_hash(Image.new("RGB", (64, 64), "white")) is None
    assert perceptual_hash(Image.new("RGB", (64, 64), "red")) is None
