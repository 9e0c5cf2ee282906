"""The profile of notes, images and related texts: worked examples."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.release.data_profile import notes_profile, related_texts
from notellm2_core.schema import NOTE_IMAGES, NOTE_IMAGES_FILE, NOTES, RELATED_PAIRS


def _notes(folder: Path, *texts: str) -> Path:
    rows = [
        {"note_id": f"n{i}", "title": text, "topics": [], "content": "", "image_path": None, "image": None}
        for i, text in enumerate(texts)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=NOTES), folder / "part.parquet")
    return folder


def _images(folder: Path, *ids: str | None) -> Path:
    rows = [
        {"note_id": f"n{i}", "image_id": image, "perceptual_hash": None, "status": "ok"} for i, image in enumerate(ids)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=NOTE_IMAGES), folder / NOTE_IMAGES_FILE)
    return folder


def test_notes_profile(tmp_path: Path) -> None:
    notes = _notes(tmp_path / "notes", "AaB", "b", "cafÃ©", "c")
    found = notes_profile(notes, _images(tmp_path / "images", "x", "x", "y", None))
    assert found["num_notes"] == 4 and found["text_length"] == 10 / 4 and found["wrongly_decoded"] == 1 / 4
    assert found["image_share"] == 3 / 4 and found["repeated_images"] == pytest.approx(2 / 3)
    shares = dict(found["characters"])
    assert shares["a"] == pytest.approx(3 / 10) and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "text", ["Beyoncé’s", "café… José”", "né–mort", "liberté\u00a0!", "naïve “façade”", "Où ça\u00a0?", "", "plain"]
)
def test_correct_texts_have_no_sign_of_wrong_decoding(tmp_path: Path, text: str) -> None:
    notes, images = _notes(tmp_path / "notes", text), _images(tmp_path / "images", None)
    assert notes_profile(notes, images)["wrongly_decoded"] == 0


@pytest.mark.parametrize("text", ["voilà, l’été", "qualité", "你好，世界", "Привет", "¿Qué? ½ × 3 °C", "naïve façade"])
def test_wrong_decoding_is_seen_and_right_texts_are_not(tmp_path: Path, text: str) -> None:
    images = _images(tmp_path / "images", None)
    as_latin = text.encode().decode("latin-1")
    assert notes_profile(_notes(tmp_path / "right", text), images)["wrongly_decoded"] == 0
    assert notes_profile(_notes(tmp_path / "latin", as_latin), images)["wrongly_decoded"] == 1
    as_windows = text.encode().decode("cp1252", errors="replace")
    assert notes_profile(_notes(tmp_path / "windows", as_windows), images)["wrongly_decoded"] == 1


def test_related_texts(tmp_path: Path) -> None:
    """Notes 0 and 1 share one of three words, 2 and 3 all; other pairs share none."""
    notes = _notes(tmp_path / "notes", "a b", "b c", "d", "d", "x", "y", "z", "w")

    def pairs(name: str, *ends: tuple[int, int]) -> Path:
        rows = [
            {"query_id": f"n{q}", "target_id": f"n{t}", "score": 1.0, "num_users": 1, "rank": 1}
            for q, t in sorted(ends)
        ]
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=RELATED_PAIRS), tmp_path / name / "part.parquet")
        return tmp_path / name

    found = related_texts(notes, pairs("train", (0, 1), (2, 3)), pairs("test", (4, 5), (6, 7)))
    assert found["train"] == pytest.approx({"num_pairs": 2, "similarity": 2 / 3, "error": (1 / 3) / 2**0.5})
    assert found["test"] == {"num_pairs": 2, "similarity": 0.0, "error": 0.0}
    assert related_texts(notes, pairs("one", (0, 1)), pairs("none"))["train"]["num_pairs"] == 1
