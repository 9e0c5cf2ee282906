"""The image formats that optional packages add to Pillow's own."""

from importlib.util import find_spec


def optional_formats() -> list[str]:
    """Pillow's names of the formats that an installed optional package reads.

    They are part of what a result depends on: with the package, more images are read.
    """
    return ["HEIF"] if find_spec("pillow_heif") else []
