"""Images by image id, from bytes in the notes table or from files of the source."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.notes.inputs import ImageFolders
from notellm2_core.schema import NOTES
from notellm2_core.vision.note_images import NoteImages
from tests.support.world import png_of


def test_bytes_and_files(tmp_path: Path) -> None:
    """Notes a and c share an image, d has none, e is not requested. A file that changes afterwards is an error."""
    first, second = png_of(1), png_of(2)
    ids = {data: hashlib.sha256(data).hexdigest() for data in (first, second)}
    (tmp_path / "b.png").write_bytes(second)
    rows = [
        {"note_id": "a", "image": first}, {"note_id": "b", "image_path": "b.png"}, {"note_id": "c", "image": first},
        {"note_id": "d"}, {"note_id": "e", "image": png_of(3)},
    ]  # fmt: skip
    texts = {"title": "t", "topics": [], "content": ""}
    (tmp_path / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist([texts | row for row in rows], schema=NOTES), tmp_path / "notes/part-0.parquet")
    note_images = {"a": ids[first], "b": ids[second], "c": ids[first], "d": None, "e": "0" * 64}
    folders = ImageFolders(tmp_path / "notes", tmp_path)

    images = NoteImages(folders, note_images, ["d", "c", "b", "a"], 10_000)
    assert images.image_ids == [ids[first], ids[second]]
    assert images.read([ids[second], ids[first]]) == [second, first]
    assert images.decode(first).size == (40, 40)
    assert NoteImages(folders, note_images, ["d"], 10_000).read([]) == []

    (tmp_path / "b.png").write_bytes(png_of(4))
    with pytest.raises(ValueError, match="the image of note 'b' has changed since its features were made"):
        images.read([ids[second]])
