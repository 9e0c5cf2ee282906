"""The notes of a source: how many are usable, what they have, and whether their images can be used."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from notellm2_core.notes.source_reader import NoteTable, has_text
from notellm2_core.tables.table import Table
from notellm2_core.vision.images import allow_pixels, check, fetch, locate

_SAMPLE = 200  # images whose header is read
_SAMPLED_SPLITS = 4
_NUM_EXAMPLES = 3


def note_metrics(notes: NoteTable) -> dict[str, Any]:
    """The counts of `spark_jobs.clean.prepare_notes`, without with_image; and filled.

    Returns rows, html_rows, notes, with_text, dropped {reason: rows}, and filled: how many notes have a title, topics
    and content.
    """
    texts = notes.texts
    return {
        "rows": notes.num_rows,
        "html_rows": notes.html_rows,
        "notes": len(texts),
        "with_text": sum(map(has_text, texts)),
        "dropped": dict(Counter(notes.dropped).most_common()),
        "filled": {name: sum(bool(getattr(note, name)) for note in texts) for name in ("title", "topics", "content")},
    }


def image_metrics(source: Path, notes: NoteTable, table: Table, max_pixels: int) -> dict[str, Any]:
    """How many notes name an image, and how many of these images can be used.

    Returns named (notes), found {status: notes} of all files that are named, sampled (images), statuses {status:
    images} of the sample, whose headers are read, and examples {status: [path]}. Where the table may hold the bytes of
    images, only the rows of a sample are looked at: named and found are None.
    """
    allow_pixels(max_pixels)
    if _has_bytes(table):
        rows = list(_sampled_rows(table))
        statuses = Counter(_status(source, path, data, max_pixels) for path, data in rows)
        del statuses["missing"]
        return {"rows_sampled": len(rows), "named": None, "found": None, "sampled": statuses.total(),
                "statuses": dict(statuses.most_common()), "examples": {}}  # fmt: skip
    paths, root, realpath = list(notes.image_paths.values()), source.resolve(), cache(os.path.realpath)
    found: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    usable = []
    for path in paths:
        file = locate(root, path, max_pixels, realpath)
        status: str = "ok" if isinstance(file, Path) else file
        found[status] += 1
        if status == "ok":
            usable.append(path)
        elif len(its_examples := examples.setdefault(status, [])) < _NUM_EXAMPLES:
            its_examples.append(path)
    sample = _spread(usable, _SAMPLE)
    statuses = Counter()
    for path in sample:
        status = _status(source, path, None, max_pixels)
        statuses[status] += 1
        if status != "ok" and len(its_examples := examples.setdefault(status, [])) < _NUM_EXAMPLES:
            its_examples.append(path)
    return {"named": len(paths), "found": dict(found.most_common()), "sampled": len(sample),
            "statuses": dict(statuses.most_common()), "examples": examples}  # fmt: skip


def unusable_counts(images: dict[str, Any], num_notes: int) -> dict[str, float]:
    """The notes by the status of their image, as `vision_features` would count them: of a sample, an estimate."""
    shares = {status: n / images["sampled"] for status, n in images["statuses"].items()} if images["sampled"] else {}
    found = images["found"]
    if found is None:  # of the rows of the sample
        named = num_notes * images["sampled"] / max(1, images["rows_sampled"])
        found = {"ok": named}
    counts: Counter[str] = Counter({status: n for status, n in found.items() if status != "ok"})
    counts.update({status: share * found.get("ok", 0) for status, share in shares.items()})
    return {**counts, "missing": num_notes - sum(counts.values())}


def _has_bytes(table: Table) -> bool:
    """Whether the table has a column with the bytes of images."""
    names = {name for origin in table.origins if origin.column.name == "image" for name in origin.kinds}
    return bool(names & table.stored_names)


def _sampled_rows(table: Table) -> Iterator[tuple[str | None, bytes | None]]:
    """The path and the bytes of the image of the first rows of some splits."""
    for split in _spread(table.splits(), _SAMPLED_SPLITS):
        for batch in table.read(split, ["image_path", "image"]):
            for row in batch.slice(0, _SAMPLE // _SAMPLED_SPLITS).to_pylist():
                yield row["image_path"], row["image"] or None
            break


def _status(source: Path, path: str | None, data: bytes | None, max_pixels: int) -> str:
    encoded = fetch(source, path, data, max_pixels)
    return check(encoded.data, max_pixels) if encoded.status == "ok" else encoded.status


def _spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` of `items`, evenly spread."""
    return [items[i * len(items) // num] for i in range(num)] if len(items) > num else list(items)
