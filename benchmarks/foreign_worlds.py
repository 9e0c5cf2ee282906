"""Two sources of kinds that are neither demo nor films, for `small.yaml` (benchmarks/recall_seeds.py).

    .venv/bin/python benchmarks/foreign_worlds.py purchases FOLDER
    .venv/bin/python benchmarks/foreign_worlds.py posts FOLDER

purchases: 10,000 products with pictures; purchases of 1,400 customers over two years, by the day. A customer has a few
    projects, each of one taste. It buys from a category and from those that complement it, which share no words with
    it. Words name the category; words and picture hint at the taste. Nearly every pair comes from one customer.
posts: 6,000 posts of three to seven words without pictures, in a log of three weeks by the second. Half of the words
    are slang that no dictionary has; each of 120 circles has its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

_NOUNS = """
    kettle toaster blender grinder mug teapot tray apron skillet saucepan colander ladle tent sleeping-bag
    lantern backpack compass hammock canteen stove drill hammer wrench saw level clamp sander paint brush roller
    ladder trellis shovel rake hose planter pruner seeds lamp sofa rug curtain cushion shelf mirror frame clock
    racket shuttlecock football goggles swimsuit treadmill dumbbell yoga-mat guitar strings keyboard microphone
    amplifier headset camera tripod lens
"""
NOUNS = _NOUNS.split()
TASTES = {  # words, colours
    "rustic": ("oak linen hand-thrown weathered", ("saddlebrown", "peru", "tan")),
    "minimal": ("matte seamless slim plain", ("whitesmoke", "gainsboro", "white")),
    "vivid": ("bright bold playful striped", ("red", "gold", "deepskyblue")),
    "luxury": ("brass marble engraved polished", ("darkgoldenrod", "black", "ivory")),
    "green": ("recycled bamboo organic refillable", ("forestgreen", "yellowgreen", "olivedrab")),
    "industrial": ("steel riveted raw heavy-duty", ("dimgray", "slategray", "darkorange")),
    "pastel": ("soft lilac rounded powder", ("lavender", "mistyrose", "honeydew")),
    "retro": ("enamel chrome seventies tube", ("orangered", "teal", "khaki")),
}
_COMMON = """
    today again really finally anyone else just tried new old big small never always best worst maybe thanks
    help look found lost weekend morning tonight please story week first last
"""
COMMON = _COMMON.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["purchases", "posts"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    {"purchases": purchases, "posts": posts}[options.world](options.folder, np.random.default_rng(7))


def purchases(folder: Path, rng: np.random.Generator, num_products: int = 10_000, num_customers: int = 1400) -> None:
    """Products and purchases, as a shop would export them: names and event of its own."""
    tastes = list(TASTES)
    category, taste = rng.integers(len(NOUNS), size=num_products), rng.integers(len(tastes), size=num_products)
    complements = np.stack([rng.permutation(len(NOUNS)) for _ in range(2)], axis=1)  # [categories, 2]
    brands = [syllables(rng, 2).title() for _ in range(300)]
    names, texts = [], []
    for c, t in zip(category, taste, strict=True):
        hints = rng.permutation(TASTES[tastes[t]][0].split())
        names.append(f"{rng.choice(brands)} {hints[0] if rng.random() < 0.7 else ''} {NOUNS[c]}".replace("  ", " "))
        texts.append(
            f"A {hints[1]} {NOUNS[c]} for every day. Model {rng.integers(100, 999)}. Comes in {hints[2]} finish."
        )
    (folder / "images").mkdir()
    for i, t in enumerate(taste):
        picture(rng, TASTES[tastes[t]][1]).save(folder / "images" / f"{i}.jpg", quality=80)
    products = [f"p{i}" for i in range(num_products)]
    table = {"note_id": products, "title": names, "topics": pa.nulls(num_products, pa.string()), "content": texts,
             "image_path": [f"images/{i}.jpg" for i in range(num_products)]}  # fmt: skip
    pq.write_table(pa.table(table), folder / "notes.parquet")

    rows: list[tuple[str, str, np.datetime64, str]] = []
    cells = {
        (c, t): np.flatnonzero((category == c) & (taste == t)) for c in range(len(NOUNS)) for t in range(len(tastes))
    }
    for customer in range(num_customers):
        for _ in range(rng.integers(2, 5)):  # projects
            c, t = int(rng.integers(len(NOUNS))), int(rng.integers(len(tastes)))
            day = int(rng.integers(0, 640))
            for place in (c, *complements[c], c):
                for product in rng.permutation(cells[place, t])[: rng.integers(1, 4)]:
                    day = min(729, day + int(rng.exponential(6)))
                    rows.append((f"c{customer}", products[product], np.datetime64("2023-01-01") + day, "purchase"))
    write_events(folder, rows)


def posts(folder: Path, rng: np.random.Generator, num_posts: int = 6000, num_readers: int = 4000) -> None:
    """Posts and their readers."""
    num_circles, days = 120, 21
    slang = [[syllables(rng, int(rng.integers(2, 4))) for _ in range(14)] for _ in range(num_circles)]
    circle = rng.permutation(np.arange(num_posts) % num_circles)
    published = rng.uniform(-3, days, size=num_posts)
    words = []
    for c in circle:
        chosen = [*rng.choice(slang[c], 2, replace=False), *rng.choice(COMMON, rng.integers(1, 6))]
        words.append(" ".join(rng.permutation(chosen)))
    table = {"note_id": [f"{i}" for i in range(num_posts)], "title": words,
             "topics": pa.nulls(num_posts, pa.string()), "content": [""] * num_posts}  # fmt: skip
    pq.write_table(pa.table(table), folder / "notes.parquet")

    rows: list[tuple[str, str, np.datetime64, str]] = []
    start = np.datetime64("2025-03-02T00:00:00")
    for reader in range(num_readers):
        for c in rng.choice(num_circles, 2, replace=False):
            for visit in rng.uniform(0, days, size=2):
                there = np.flatnonzero((circle == c) & (published < visit) & (published > visit - 5))
                for n, post in enumerate(rng.permutation(there)[:4]):
                    second = int(min(visit * 86_400 + 40 * n, days * 86_400 - 1))
                    rows.append((f"r{reader}", f"{post}", start + second, "view"))
                    if rng.random() < 0.5:
                        rows.append((f"r{reader}", f"{post}", start + second + 5, "click"))
    write_events(folder, rows)


def write_events(folder: Path, rows: Sequence[tuple[str, str, np.datetime64, str]]) -> None:
    users, notes, times, events = zip(*sorted(rows, key=lambda row: row[2]), strict=True)
    table = {"user_id": users, "note_id": notes, "timestamp": [str(time) for time in times], "event": events}
    pacsv.write_csv(pa.table(table), folder / "events.csv")


def syllables(rng: np.random.Generator, number: int) -> str:
    return "".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(number))


def picture(rng: np.random.Generator, colours: Sequence[str]) -> Image.Image:
    image = Image.new("RGB", (128, 128), colours[int(rng.integers(len(colours)))])
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = (int(v) for v in rng.integers((0, 0, 12), (110, 110, 50)))
        draw.rectangle((x, y, x + size, y + size), fill=colours[int(rng.integers(len(colours)))])
    return image


if __name__ == "__main__":
    main()
