"""Saliency as a table, as a plot, and of several models by command."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from notellm2_core.evaluation.saliency_report import main, read_saliency, shares, to_markdown, to_plot, visual_shares

LAYERS = [
    {"visual": 1.0, "text": 2.0, "other": 5.0},
    {"visual": 0.5, "text": 0.5, "other": 0.0},
    {"visual": None, "text": 3.0, "other": 1.0},
    {"visual": 0.0, "text": 0.0, "other": 0.0},
]


def record(layers: list[dict[str, Any]] = LAYERS, num_without_image: int = 0) -> dict[str, Any]:
    return {"method": "basic", "layers": layers, "num_notes": 1234, "num_without_image": num_without_image}


def test_shares() -> None:
    """Scores 1, 2 and 5 are shares of 8. An undefined score is in no sum; if all are 0 there is no share."""
    assert shares(LAYERS[0]) == pytest.approx({"visual": 0.125, "text": 0.25, "other": 0.625})
    assert shares(LAYERS[2]) == {"visual": None, "text": 0.75, "other": 0.25}
    assert shares(LAYERS[3]) == {"visual": None, "text": None, "other": None}
    assert visual_shares(record()) == pytest.approx({"1": 0.125, "2": 0.5})


def test_table() -> None:
    """Bars have 20 characters: shares up to 0.125, 0.375 and 1 end at 2 (2.5 rounds to even), 8 (7.5) and 20."""
    lines = to_markdown(record(num_without_image=9)).splitlines()
    assert "mean of 1,234 training notes (9 without an image left out)" in lines[0]
    assert lines[2] == "| layer | S_v % | S_t % | S_o % | █ S_v ▒ S_t ░ S_o |"
    assert lines[4:] == [
        f"| 1 | 12.5 | 25.0 | 62.5 | `{'█' * 2}{'▒' * 6}{'░' * 12}` |",
        f"| 2 | 50.0 | 50.0 | 0.0 | `{'█' * 10}{'▒' * 10}` |",
        f"| 3 | – | 75.0 | 25.0 | `{'▒' * 15}{'░' * 5}` |",
        "| 4 | – | – | – | – |",
    ]


def test_plot() -> None:
    """Plots of one model and of three with 32 layers, with undefined scores, are PNGs below 150 kB."""
    one = to_plot({"basic": record()})
    many = to_plot({name: record(LAYERS * 8) for name in ("basic", "notellm2", "only_late_fusion")})
    narrow, wide = (Image.open(io.BytesIO(png)) for png in (one, many))
    assert narrow.format == "PNG" and wide.width > 2 * narrow.width
    assert max(len(one), len(many)) < 150_000


def test_the_curves_are_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot has one curve per score, in the paper's order and with its names; an undefined share is a hole."""
    drawn: dict[str, list[float]] = {}
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.update({k["label"]: list(a[2])}) or plot(*a, **k))
    to_plot({"basic": record()})
    nan = float("nan")
    assert list(drawn) == ["$S_v$", "$S_t$", "$S_o$"]
    np.testing.assert_allclose(
        list(drawn.values()), [[0.125, 0.5, nan, nan], [0.25, 0.5, 0.75, nan], [0.625, 0, 0.25, nan]]
    )


def test_models_are_compared_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "saliency.json").write_text(json.dumps(record()))
    assert read_saliency(tmp_path) == record() and read_saliency(tmp_path / "nowhere") is None
    main([f"basic={tmp_path}", f"notellm2={tmp_path}", "--out", str(tmp_path / "both.png")])
    assert Image.open(tmp_path / "both.png").width > 700
    assert "notellm2. Saliency" in capsys.readouterr().out
    for wrong in (str(tmp_path), f"basic={tmp_path}/nowhere"):
        with pytest.raises(SystemExit):
            main([wrong, "--out", str(tmp_path / "none.png")])
        assert f"error: {wrong} is not LABEL=DIR with a saliency.json in DIR" in capsys.readouterr().err
