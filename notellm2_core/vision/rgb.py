"""The RGB image of an image of any mode: upright, on white where it is transparent, in 8 bits.

It is converted strip by strip: the steps of a conversion would each take several times the memory of the image.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

_STRIP_PIXELS = 1 << 20


def rgb_of(image: Image.Image) -> Image.Image:
    """The RGB image, upright: `image` itself where it is that already."""
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        low, high = _range(image)
        return _by_strips(image, lambda strip: _to_8_bits(strip, low, high))
    if image.has_transparency_data:
        return _by_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says: `image` itself where it says nothing, which saves a copy."""
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB image of the converted strips."""
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    num_lines = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_lines):
        yield 0, top, image.width, min(image.height, top + num_lines)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
    """What black and white are. 16 bits have a range (65535 is white); 32 bits and floats have none: it is theirs."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    extremes = [(values.min(), values.max()) for values in map(_values, map(image.crop, _strips(image)))]
    return min(low for low, _ in extremes), max(high for _, high in extremes)


def _to_8_bits(image: Image.Image, low: float, high: float) -> Image.Image:
    scaled = (_values(image) - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8)).convert("RGB")


def _values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))
