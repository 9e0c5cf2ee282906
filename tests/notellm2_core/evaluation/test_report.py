"""The report: JSON, the table, the plot, the contact sheet."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from notellm2_core.evaluation.contact_sheet import MAX_BYTES, WIDTH, Neighbour, SheetRow, _font, _wrap, contact_sheet
from notellm2_core.evaluation.recall import Ranks
from notellm2_core.evaluation.report import Report, build_report, to_markdown, to_plot


def ranks(*higher: int) -> Ranks:
    return Ranks(np.array(higher), np.zeros(len(higher), dtype=int), np.full(len(higher), 50))


@pytest.fixture
def report() -> Report:
    """Two pairs, the second with a short query; no pair has a short target."""
    masks = {"all": np.array([1, 1]), "short_query": np.array([0, 1]), "short_target": np.array([0, 0])}
    return build_report(
        {
            ("oracle", "text"): ranks(0, 0),
            ("notellm2", "text"): ranks(9, 0),
            ("notellm2", "multimodal"): ranks(0, 1),
            ("zero_shot", "image"): ranks(20, 1),
            ("bm25", "text"): Ranks(np.array([0, 0]), np.array([0, 4]), np.array([50, 50])),
            ("random", ""): ranks(30, 40),
        },
        {name: mask.astype(bool) for name, mask in masks.items()},
        ks=(1, 2),
        pool_notes=51,
        context={"chance": {"1": 2.0}},
    )


def test_table(report: Report) -> None:
    """Rows are in reading order. BM25's second pair has rank 1 with probability 1/5, so R@1 = (1 + .2) / 2.

    The best of each column, except the oracle, is bold; both columns of the empty slice show dashes.
    """
    lines = to_markdown(report).splitlines()
    assert "pool of 51 notes. Test pairs: all 2, short query 1, short target 0" in lines[0]
    assert lines[2].startswith("| method | input | all R@1 | all R@2 | short query R@1 |")
    assert lines[4:] == [
        "| random | – | 0.0 | 0.0 | 0.0 | 0.0 | – | – |",
        "| BM25 | text | **60.0** | 70.0 | 20.0 | 40.0 | – | – |",
        "| zero-shot | image | 0.0 | 50.0 | 0.0 | **100.0** | – | – |",
        "| notellm2, fine-tuned | multimodal | 50.0 | **100.0** | 0.0 | **100.0** | – | – |",
        "| notellm2, fine-tuned | text | 50.0 | 50.0 | **100.0** | **100.0** | – | – |",
        "| oracle | text | 100.0 | 100.0 | 100.0 | 100.0 | – | – |",
    ]


def test_json(report: Report) -> None:
    raw = json.loads(json.dumps(report.to_dict()))
    bm25 = next(r for r in raw["rows"] if r["method"] == "bm25" and r["slice"] == "short_query")
    assert bm25 == {
        "method": "bm25",
        "input": "text",
        "slice": "short_query",
        "num_pairs": 1,
        "recall": {"1": pytest.approx(20), "2": pytest.approx(40)},
        "recall_pessimistic": {"1": 0, "2": 0},
        "recall_optimistic": {"1": 100, "2": 100},
    }
    assert raw["chance"] == {"1": 2.0}
    empty = next(r for r in raw["rows"] if r["slice"] == "short_target")
    assert (empty["num_pairs"], empty["recall"]) == (0, {"1": None, "2": None})


def test_lookup(report: Report) -> None:
    assert report.recall("notellm2") == 50
    assert report.recall("bm25", "text", "all", 2) == 70
    assert report.recall("bm25", "text", "short_target") is None
    with pytest.raises(ValueError, match="no Recall@7 of bm25"):
        report.recall("bm25", "text", k=7)


def test_plot(report: Report) -> None:
    image = Image.open(io.BytesIO(to_plot(report)))
    assert image.format == "PNG"
    assert image.width > 400
    Image.open(io.BytesIO(to_plot(report, "short_target"))).load()  # an empty slice is drawn too


def test_sheet_is_readable_and_small() -> None:
    """Six queries with noise images (the worst case for JPEG): 1,500 px wide, below 500 kB, with green frames."""
    rng = np.random.default_rng(0)

    def image(note_id: str) -> Image.Image | None:
        if note_id == "n1":
            return None
        shape = (300, 200, 3) if note_id == "n2" else (90, 400, 3)
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(
            "CMYK" if note_id == "n3" else "RGB"
        )

    titles = {
        "n1": "电影：卧虎藏龙（二〇〇〇年）很长很长的标题很长很长的标题很长很长",
        "n2": "",
        "n3": "a\nb\x00c " * 40,
    }
    row = SheetRow("q", tuple(Neighbour(f"n{i}", 0.9 - i / 10, related=i == 2) for i in range(5)))
    data = contact_sheet([row] * 6, lambda i: titles.get(i, f"Title of note {i}"), image)
    sheet = Image.open(io.BytesIO(data))
    assert (sheet.format, sheet.width) == ("JPEG", WIDTH)
    assert len(data) < MAX_BYTES
    red, green, blue = np.moveaxis(np.asarray(sheet).astype(int), 2, 0)
    assert ((green - red > 80) & (green - blue > 40)).sum() > 6 * 1000
    with pytest.raises(ValueError, match="no query note"):
        contact_sheet([], str, image)


def test_wrapping_breaks_at_spaces_and_ends_with_an_ellipsis() -> None:
    font = _font(False)
    lines = _wrap("The quick brown fox jumps over the lazy dog and runs away", font, 150)
    assert len(lines) == 2
    assert lines[0] == "The quick brown"
    assert lines[1].endswith("…")
    assert all(font.getlength(line) <= 160 for line in lines)
    assert _wrap("short", font, 150) == ["short"]
    assert _wrap("", font, 150) == []
    assert len(_wrap("x" * 500, font, 150)) == 2
