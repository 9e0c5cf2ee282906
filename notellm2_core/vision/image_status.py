"""What became of the images that notes name. Imports no Pillow, so that all who show counts can use it."""

from collections.abc import Mapping
from typing import Literal, get_args

Status = Literal["ok", "truncated", "missing", "not_found", "broken", "unsupported", "too_large", "escapes"]
STATUSES: tuple[Status, ...] = get_args(Status)
UNUSABLE: tuple[Status, ...] = ("not_found", "broken", "unsupported", "too_large", "escapes")  # a note names them

MEANINGS: Mapping[Status, str] = {
    "truncated": "used; the file ends early, and the missing part is grey",
    "not_found": "no such file in the images' folder",
    "broken": "no image, or a damaged one",
    "unsupported": "HEIC, which needs pip install pillow-heif",
    "too_large": "more pixels than source.max_image_pixels, or a longer side than 65,535",
    "escapes": "a path that leads out of the images' folder",
}


def described(counts: Mapping[str, int]) -> str:
    """The counts of images that are not used, or not as a whole, with their meanings; "" if there are none."""
    return "; ".join(f"{n} {status} ({MEANINGS[status]})" for status in MEANINGS if (n := counts.get(status, 0)))
