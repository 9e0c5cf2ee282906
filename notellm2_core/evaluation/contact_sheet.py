"""The contact sheet: the images and titles of query notes and of their nearest neighbours, for people.

One row per query: the query on the left, then its neighbours; related ones (test pairs) have a green frame.
"""

import io
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH = 1500  # px
TILE_GAP = 14  # px, between tiles
QUERY_GAP = 34  # px, between the query and its neighbours
FONT_SIZE = 16  # px
TITLE_LINES = 2
MAX_TITLE = 200  # characters that are drawn at most
MAX_BYTES = 500_000
GREEN, GREY, INK, PAPER = (26, 150, 65), (205, 205, 205), (30, 30, 30), (255, 255, 255)
# System fonts with Chinese and Japanese glyphs, by file name; the first one found is used.
CJK_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc")

ImageReader = Callable[[str], Image.Image | None]  # note_id -> its image, or None


@dataclass(frozen=True)
class Neighbour:
    """A note near the query."""

    note_id: str
    score: float  # cosine
    related: bool  # to the query, by a test pair


@dataclass(frozen=True)
class SheetRow:
    """One row of the sheet: a query and its neighbours, from left to right."""

    query_id: str
    neighbours: tuple[Neighbour, ...]


def contact_sheet(rows: Sequence[SheetRow], title: Callable[[str], str], image: ImageReader) -> bytes:
    """The sheet as JPEG bytes, WIDTH px wide and below MAX_BYTES. Raises ValueError if `rows` is empty."""
    if not rows:
        raise ValueError("there is no query note to draw a sheet of: the test pairs are empty.")
    columns = 1 + max(len(row.neighbours) for row in rows)
    tile = (WIDTH - QUERY_GAP - TILE_GAP * columns) // columns
    line = FONT_SIZE + 4
    row_height = tile + (TITLE_LINES + 1) * line + 2 * TILE_GAP
    header = line + 2 * TILE_GAP
    sheet = Image.new("RGB", (WIDTH, header + row_height * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)

    def put(note_id: str, x: int, y: int, caption: str, frame: tuple[int, int, int], thick: int) -> None:
        sheet.paste(_thumbnail(image(note_id), tile), (x, y))
        draw.rectangle((x - thick, y - thick, x + tile + thick - 1, y + tile + thick - 1), outline=frame, width=thick)
        text = title(note_id)
        font = _font(_has_cjk(text))
        y += tile + 8
        for part in _wrap(text, font, tile):
            draw.text((x, y), part, font=font, fill=INK)
            y += line
        draw.text((x, y), caption, font=_font(False), fill=GREEN if frame == GREEN else (110, 110, 110))

    left = TILE_GAP
    right = left + tile + QUERY_GAP
    draw.text((left, TILE_GAP), "query note", font=_font(False), fill=INK)
    draw.text((right, TILE_GAP), "its nearest notes, with cosine; green: a related pair", font=_font(False), fill=INK)
    for n, row in enumerate(rows):
        y = header + n * row_height
        put(row.query_id, left, y, "", INK, 1)
        for m, neighbour in enumerate(row.neighbours):
            caption = f"{neighbour.score:.3f}" + (" related" if neighbour.related else "")
            frame, thick = (GREEN, 6) if neighbour.related else (GREY, 1)
            put(neighbour.note_id, right + m * (tile + TILE_GAP), y, caption, frame, thick)
    return _compress(sheet)


def _thumbnail(image: Image.Image | None, size: int) -> Image.Image:
    """The whole image in a square, its aspect ratio kept; a labelled placeholder without one."""
    square = Image.new("RGB", (size, size), (240, 240, 240))
    if image is None:
        ImageDraw.Draw(square).text(
            (size / 2, size / 2), "no image", font=_font(False), fill=(140, 140, 140), anchor="mm"
        )
        return square
    small = image.convert("RGB")
    scale = size / max(small.size)
    small = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in at most TITLE_LINES lines of `width` px, broken at spaces if possible, and cut with an ellipsis."""
    rest = " ".join("".join(c if c.isprintable() else " " for c in text[:MAX_TITLE]).split())
    lines: list[str] = []
    while rest and len(lines) < TITLE_LINES:
        end = next((n for n in range(1, len(rest) + 1) if font.getlength(rest[:n]) > width), len(rest) + 1) - 1
        end = max(end, 1)
        if end < len(rest) and len(lines) == TITLE_LINES - 1:
            lines.append(rest[: max(end - 1, 1)].rstrip() + "…")
            break
        space = rest.rfind(" ", 1, end + 1)
        cut = space if end < len(rest) and space > 0 else end
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return lines


def _has_cjk(text: str) -> bool:
    return any(unicodedata.east_asian_width(c) in "WF" for c in text)


@cache
def _font(cjk: bool) -> ImageFont.FreeTypeFont:
    """DejaVu from matplotlib's files; for CJK titles a system font with the glyphs (without one, boxes are drawn)."""
    for name in CJK_FONTS if cjk else ():
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), FONT_SIZE)


def _compress(sheet: Image.Image) -> bytes:
    """JPEG in the best quality below MAX_BYTES."""
    for quality in (88, 80, 70, 60, 50, 40, 30, 20):
        out = io.BytesIO()
        sheet.save(out, "JPEG", quality=quality, optimize=True, progressive=True)
        if out.tell() < MAX_BYTES:
            break
    return out.getvalue()
