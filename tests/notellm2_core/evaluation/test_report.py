"""The report: JSON, the table, the plot, the contact sheet."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from notellm2_core.evaluation.contact_sheet import MAX_BYTES, WIDTH, Neighbour, SheetRow, _font, _wrap, contact_sheet
from notellm2_core.evaluation.recall import Ranks
from notellm2_core.evaluation.report import Report, build_report, headline, run_metrics, to_markdown, to_plot


def ranks(*higher: int, ties: tuple[int, ...] = (0, 0), queries: tuple[int, ...] = (0, 1)) -> Ranks:
    return Ranks(np.array(higher), np.array(ties), np.full(len(ties), 50), np.array(queries), np.ones(len(ties)))


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
            ("bm25", "text"): ranks(0, 0, ties=(0, 4)),
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
    assert lines[4:10] == [
        "| random | – | 0.0 | 0.0 | 0.0 | 0.0 | – | – |",
        "| BM25 | text | **60.0** | 70.0 | 20.0 | 40.0 | – | – |",
        "| zero-shot | image | 0.0 | 50.0 | 0.0 | **100.0** | – | – |",
        "| notellm2, fine-tuned | multimodal | 50.0 | **100.0** | 0.0 | **100.0** | – | – |",
        "| notellm2, fine-tuned | text | 50.0 | 50.0 | **100.0** | **100.0** | – | – |",
        "| oracle | text | 100.0 | 100.0 | 100.0 | 100.0 | – | – |",
    ]
    assert lines[10] == "" and lines[11].startswith("All pairs, in percent: means over the 2 queries")


def test_the_other_metrics_in_a_table() -> None:
    """A query has the targets of rank 1 and 4, another one that of rank 2. k = 2, the smallest.

    MRR: per query (1 + 1/2) / 2, per pair (1 + 1/4 + 1/2) / 3. nDCG@2: the first query finds 1 of 1 + 1 / log2(3) =
    1.6309, the second 0.6309; per pair (1 + 0 + 0.6309) / 3. MAP@2: (1/2 + 1/2) / 2. Recall@2: (1/2 + 1) / 2.
    """
    mine = ranks(0, 3, 1, ties=(0, 0, 0), queries=(0, 0, 1))
    report = build_report({("m", "text"): mine}, {"all": np.ones(3, dtype=bool)}, (4, 2), 51)
    assert to_markdown(report, ["all"]).splitlines()[6:] == [
        "All pairs, in percent: means over the 2 queries, each with all of its targets; the last two columns are means "
        "over the pairs.",
        "",
        "| method | input | MRR | nDCG@2 | MAP@2 | hit rate@2 | R@2 | MRR per pair | nDCG@2 per pair |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| m, fine-tuned | text | **75.0** | **62.2** | **50.0** | **100.0** | **75.0** | **58.3** | **54.4** |",
    ]


def test_metrics_of_the_run(report: Report) -> None:
    """Recall of every slice with pairs, and two metrics of all pairs. BM25: ranks 1, and 1 to 5 alike; its MRR is
    (1 + 137/300) / 2, and its nDCG@1 (1 + 1/5) / 2.
    """
    metrics = run_metrics(report)
    assert metrics["bm25"]["text"] == {
        "all": {"1": pytest.approx(60), "2": pytest.approx(70)},
        "short_query": {"1": pytest.approx(20), "2": pytest.approx(40)},
        "short_target": {},
    }
    assert metrics["per_query"]["bm25"]["text"] == {
        "mrr": pytest.approx(100 * 437 / 600),
        "ndcg_at_1": pytest.approx(60),
    }
    assert metrics["random"]["-"]["all"] == {"1": 0, "2": 0}


def test_json(report: Report) -> None:
    raw = json.loads(json.dumps(report.to_dict()))
    metrics = {  # one target, at each of the ranks 1 to 5 alike
        "mrr": pytest.approx(100 * 137 / 300),
        "recall@1": pytest.approx(20), "hit_rate@1": pytest.approx(20), "mrr@1": pytest.approx(20),
        "ndcg@1": pytest.approx(20), "map@1": pytest.approx(20),
        "recall@2": pytest.approx(40), "hit_rate@2": pytest.approx(40), "mrr@2": pytest.approx(30),
        "ndcg@2": pytest.approx(20 + 20 / np.log2(3)), "map@2": pytest.approx(30),
    }  # fmt: skip
    bm25 = next(r for r in raw["rows"] if r["method"] == "bm25" and r["slice"] == "short_query")
    assert bm25 == {
        "method": "bm25",
        "input": "text",
        "slice": "short_query",
        "num_pairs": 1,
        "recall": {"1": pytest.approx(20), "2": pytest.approx(40)},
        "recall_pessimistic": {"1": 0, "2": 0},
        "recall_optimistic": {"1": 100, "2": 100},
        "num_queries": 1,
        "per_pair": metrics,
        "per_query": metrics,
    }
    assert raw["chance"] == {"1": 2.0}
    empty = next(r for r in raw["rows"] if r["slice"] == "short_target")
    assert (empty["num_pairs"], empty["recall"]) == (0, {"1": None, "2": None})
    assert (empty["num_queries"], empty["per_query"]["mrr"]) == (0, None)


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


def test_the_headline_has_five_figures_and_the_best_baseline() -> None:
    found = {("bm25", "text"): 30.04, ("zero_shot", "image"): 31.0, ("oracle", "text"): 99.0, ("m", "multimodal"): 40.0}
    found |= {("m", "image"): 20.0, ("m", "text"): 35.0, ("m, 8 of 64 numbers", "multimodal"): 39.0}
    rows = [
        {"method": method, "input": inputs, "recall": {"10": recall, "100": recall + 1}}
        for (method, inputs), recall in found.items()
    ]
    assert headline(rows, "m") == {
        "recall_at_10": 40.0, "recall_at_100": 41.0, "image_recall_at_10": 20.0, "text_recall_at_10": 35.0,
        "best_baseline_recall_at_10": 31.0, "best_baseline": "zero_shot image",
    }  # fmt: skip
    assert headline([], "m") == headline([{"method": "m", "input": "text", "recall": {"10": None}}], "m") == {}
