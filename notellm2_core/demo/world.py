"""The demo world: notes, images, users and logs whose signal is known, as a source like any other.

A note belongs to a hidden topic, and users click on the few topics that they like; the logs contain nothing else. A
topic is a pair (theme, style): the theme is what the note is about, the style is what its image looks like. Themes and
styles alternate on a ring

    style 0 - theme 0 - style 1 - theme 1 - style 2 - ... - style 0

and every edge is a topic, so each theme has two styles and each style two themes: text alone leaves two topics to
choose from, the image alone leaves two *other* ones, both together leave one. What one modality can explain is thus
known, and `oracle.parquet` states it for each note: `text_key` (the theme; null if the text carries no signal) and
`image_key` (the style; null without a readable image). 15 % of the notes are text-poor: a model that neglects images
fails there. Only the report reads the oracle, and shows the recall that text, images and both can reach.

The files of the folder:
    notes.parquet    note_id, title, topics, content, image_path (null: no image)
    events.csv.gz    user_id, note_id, timestamp (ISO 8601, UTC), event (view | click); with some dirty rows
    images/*.jpg     a few of them broken
    oracle.parquet   note_id, text_key, image_key

Equal settings give equal bytes (with equal versions of numpy, Pillow, pyarrow and zlib).
"""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.config.source import DemoSettings
from notellm2_core.demo.images import STYLES, draw_image
from notellm2_core.demo.logs import DAY, Impressions, simulate
from notellm2_core.demo.texts import poor_titles, write_note
from notellm2_core.demo.words import THEMES
from notellm2_core.runtime.files import written_whole
from notellm2_core.runtime.progress import ProgressBar

FIRST_DAY = np.datetime64("2025-01-05T00:00:00")  # a Sunday, when weeks begin; days are counted from here, in UTC
MIN_NOTES_PER_TOPIC = 20  # a small world has fewer topics, so that each has training and test notes
TEXT_POOR_SHARE = 0.15
NO_IMAGE_SHARE = 0.01
BACKLOG_SHARE, BACKLOG_DAYS = 0.1, 7  # notes published before the log begins
DUPLICATE_SHARE, UNKNOWN_NOTE_SHARE, BAD_TIME_SHARE = 0.002, 0.001, 0.0005  # of the events: dirt, as in a real log


@dataclass(frozen=True)
class Layout:
    """The plan of all notes. N: notes, T: topics."""

    theme_of_topic: np.ndarray  # [T]
    style_of_topic: np.ndarray  # [T]
    topic: np.ndarray  # [N]
    published: np.ndarray  # [N] day, see `simulate`
    text_poor: np.ndarray  # [N]
    image: np.ndarray  # [N] "ok" | "missing" | "broken"


def generate(out: Path, settings: DemoSettings) -> dict[str, int]:
    """Write the world to `out`; returns its counts, by name. Raises ValueError if `out` already holds a source."""
    num_notes, num_days, seed = settings.num_notes, settings.num_days, settings.seed
    if (out / "notes.parquet").exists():
        raise ValueError(f"{out} already holds a source (notes.parquet); name a new folder.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    # One random stream per part: a change of one part leaves the others unchanged.
    layout = lay_out(np.random.default_rng([seed, 0]), num_notes, num_days)
    stream = np.random.default_rng([seed, 1])
    impressions = simulate(stream, layout.topic, layout.published, settings.num_users, num_days)
    counts = {"num_notes": num_notes, "num_users": settings.num_users, "num_topics": len(layout.theme_of_topic)}
    counts |= _write_events(out / "events.csv.gz", np.random.default_rng([seed, 2]), impressions, num_notes, num_days)
    _write_images(out / "images", seed, layout)
    _write_oracle(out / "oracle.parquet", layout)
    _write_notes(out / "notes.parquet", seed, layout)  # last: a folder without it is no source
    return counts | {
        "num_text_poor": int(layout.text_poor.sum()),
        "num_without_image": int((layout.image == "missing").sum()),
        "num_broken_images": int((layout.image == "broken").sum()),
    }


def lay_out(rng: np.random.Generator, num_notes: int, num_days: int) -> Layout:
    """Draw topic, day, text and image of all notes."""
    num_themes = int(np.clip(num_notes // (2 * MIN_NOTES_PER_TOPIC), 2, min(len(THEMES), len(STYLES))))
    styles = rng.permutation(num_themes)
    topic = rng.permutation(np.arange(num_notes) % (2 * num_themes))
    # A topic's notes are spread evenly over time, so that every topic has old and new ones.
    age_rank = (_nth_of_its_kind(topic) + rng.random(num_notes)) / np.bincount(topic)[topic]  # 0 (old) .. 1 (new)
    in_backlog = (age_rank / BACKLOG_SHARE - 1) * BACKLOG_DAYS
    in_log = (age_rank - BACKLOG_SHARE) / (1 - BACKLOG_SHARE) * num_days
    published = np.floor(np.where(age_rank < BACKLOG_SHARE, in_backlog, in_log)).astype(np.int64)
    # Every note carries signal: a text-poor one has a readable image.
    order = rng.permutation(num_notes)
    num_poor, num_missing = round(TEXT_POOR_SHARE * num_notes), max(1, round(NO_IMAGE_SHARE * num_notes))
    image = np.full(num_notes, "ok", dtype="<U7")
    image[order[num_poor : num_poor + num_missing]] = "missing"
    image[order[num_poor + num_missing :][: 1 if num_notes < 1000 else 2]] = "broken"
    return Layout(
        theme_of_topic=np.repeat(np.arange(num_themes), 2),
        style_of_topic=np.stack([styles, np.roll(styles, -1)], axis=1).ravel(),
        topic=topic,
        published=published,
        text_poor=np.isin(np.arange(num_notes), order[:num_poor]),
        image=image,
    )


def note_id(index: int) -> str:
    return f"n{index:06d}"


def _nth_of_its_kind(kind: np.ndarray) -> np.ndarray:
    """The number of equal values before each value `[N]`."""
    order = np.argsort(kind, kind="stable")
    counts = np.bincount(kind)
    nth = np.empty(len(kind), dtype=np.int64)
    nth[order] = np.arange(len(kind)) - np.repeat(np.cumsum(counts) - counts, counts)
    return nth


def _write_events(
    path: Path, rng: np.random.Generator, impressions: Impressions, num_notes: int, num_days: int
) -> dict[str, int]:
    """Write views and clicks by time, then a few duplicates, unknown notes and bad timestamps. Returns counts."""
    clicked = impressions.clicked_after > 0
    user = np.concatenate([impressions.user, impressions.user[clicked]])
    note = np.concatenate([impressions.note, impressions.note[clicked]])
    second = np.concatenate([impressions.second, (impressions.second + impressions.clicked_after)[clicked]])
    is_click = np.repeat([False, True], [len(impressions.user), int(clicked.sum())])
    order = np.lexsort((note, user, is_click, second))
    second[order[-1]] = num_days * DAY - 1  # so that the log covers its last day to the end

    stamps = np.datetime_as_string(FIRST_DAY + second[order].astype("timedelta64[s]"), unit="s")
    events = np.where(is_click[order], "click", "view")
    good = list(
        zip(user[order].tolist(), note[order].tolist(), (f"{stamp}Z" for stamp in stamps), events.tolist(), strict=True)
    )

    def sample(share: float) -> list[tuple[int, int, str, str]]:
        return [good[i] for i in rng.choice(len(good), size=max(1, round(share * len(good))), replace=False)]

    duplicate = sample(DUPLICATE_SHARE)
    unknown_note = [(u, num_notes + n, stamp, event) for u, n, stamp, event in sample(UNKNOWN_NOTE_SHARE)]
    bad_time = [(u, n, "yesterday", event) for u, n, _, event in sample(BAD_TIME_SHARE)]
    rows = good + duplicate + unknown_note + bad_time
    lines = (f"u{u:05d},{note_id(n)},{stamp},{event}\n" for u, n, stamp, event in rows)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=6) as file:
        file.write(("user_id,note_id,timestamp,event\n" + "".join(lines)).encode())
    return {
        "num_events": len(rows),
        "num_clicks": int(clicked.sum()),
        "num_duplicate_events": len(duplicate),
        "num_unknown_note_events": len(unknown_note),
        "num_bad_timestamps": len(bad_time),
    }


def _write_images(folder: Path, seed: int, layout: Layout) -> None:
    for i in ProgressBar(range(len(layout.topic)), desc="demo images", unit="image"):
        if layout.image[i] == "missing":
            continue
        path = folder / f"{note_id(i)}.jpg"
        style = STYLES[layout.style_of_topic[layout.topic[i]]]
        draw_image(np.random.default_rng([seed, 3, i]), *style).save(path, quality=80)
        if layout.image[i] == "broken":
            os.truncate(path, 100)  # within the header: no line of pixels is left


def _write_notes(path: Path, seed: int, layout: Layout) -> None:
    themes = list(THEMES)
    poor = iter(poor_titles(np.random.default_rng([seed, 4]), int(layout.text_poor.sum())))
    texts: list[tuple[str, list[str], str]] = []
    for i, topic in enumerate(layout.topic):
        if layout.text_poor[i]:
            texts.append((next(poor), [], ""))
        else:
            texts.append(write_note(np.random.default_rng([seed, 5, i]), themes[layout.theme_of_topic[topic]]))
    titles, topics, contents = zip(*texts, strict=True)
    table = pa.table(
        {
            "note_id": [note_id(i) for i in range(len(texts))],
            "title": list(titles),
            "topics": pa.array(list(topics), pa.list_(pa.string())),
            "content": list(contents),
            "image_path": [
                None if image == "missing" else f"images/{note_id(i)}.jpg" for i, image in enumerate(layout.image)
            ],
        }
    )
    with written_whole(path) as draft:
        pq.write_table(table, draft)


def _write_oracle(path: Path, layout: Layout) -> None:
    themes, styles = list(THEMES), [" ".join(style) for style in STYLES]
    text_key = [themes[t] for t in layout.theme_of_topic[layout.topic]]
    image_key = [styles[s] for s in layout.style_of_topic[layout.topic]]
    table = pa.table(
        {
            "note_id": [note_id(i) for i in range(len(layout.topic))],
            "text_key": pa.array(text_key, pa.string(), mask=layout.text_poor),
            "image_key": pa.array(image_key, pa.string(), mask=layout.image != "ok"),
        }
    )
    pq.write_table(table, path)
