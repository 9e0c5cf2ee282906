"""The RGB image strip by strip is that of the whole image."""

import numpy as np
import pytest
from PIL import Image

from notellm2_core.vision import rgb
from notellm2_core.vision.rgb import rgb_of

SIZE = (13, 11)


def image_of(mode: str) -> Image.Image:
    numbers = np.random.default_rng(0)
    bytes_ = numbers.integers(0, 256, (SIZE[1], SIZE[0], 4), np.uint8)
    if mode == "F":
        floats = numbers.normal(size=SIZE[::-1]).astype(np.float32)
        floats[0, :3] = np.nan, 7.5, -9.25
        return Image.fromarray(floats)
    if mode == "I":
        return Image.fromarray(numbers.integers(-100_000, 100_000, SIZE[::-1], np.int32))
    if mode == "I;16":
        return Image.fromarray(numbers.integers(0, 65536, SIZE[::-1], np.uint16))
    if mode == "P":
        image = Image.fromarray(bytes_[..., 0]).convert("P")
        image.putpalette(numbers.integers(0, 256, 768, np.uint8).tobytes())
        image.info["transparency"] = bytes(range(256))
        return image
    image = Image.fromarray(bytes_, "RGBA")
    if mode == "RGB and a colour":
        image = image.convert("RGB")
        image.info["transparency"] = image.getpixel((2, 9))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB and a colour", "F", "I", "I;16"])
def test_strips_give_what_the_whole_image_gives(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.asarray(rgb_of(image_of(mode)))
    monkeypatch.setattr(rgb, "_STRIP_PIXELS", 40)  # 3 lines; the last strip has 2
    assert np.array_equal(np.asarray(rgb_of(image_of(mode))), whole)
    assert np.ptp(whole) > 200


def test_an_rgb_image_is_not_copied() -> None:
    image = image_of("RGB")
    assert rgb_of(image) is image
    image.getexif()[0x0112] = 6
    assert rgb_of(image).size == SIZE[::-1] and image.size == SIZE
