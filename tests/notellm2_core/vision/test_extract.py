import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from notellm2_core import schema
from notellm2_core.config.model import VisionSettings
from notellm2_core.vision import extract as features
from notellm2_core.vision import feature_store
from notellm2_core.vision.encoder import VisionEncoder, load_vision_encoder
from notellm2_core.vision.feature_store import FeatureStore, num_missing, read_note_images
from notellm2_core.vision.images import decode
from tests.support.drafts import dead_process, draft_of

ENCODER_BATCH = 4


def png(seed: int, size: int = 24) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def jpeg(seed: int, size: int = 48) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(png(seed, size))).save(out, "JPEG")
    return out.getvalue()


def image_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class World:
    """A source with images, its notes, a configuration with the tiny encoder, and a store."""

    def __init__(self, root: Path) -> None:
        self.source, self.notes, self.store = root / "source", root / "notes", root / "store"
        self.source.mkdir(parents=True), self.notes.mkdir()
        self.config = root / "config.yaml"
        vision = f"{{library: tiny, batch_size: {ENCODER_BATCH}}}"
        text = f"name: t\nsource: {{max_image_pixels: 10000}}\nmodel: {{llm: {{name: tiny}}, vision: {vision}}}\n"
        self.config.write_text(text)

    def write_notes(self, rows: list[tuple[str, str | None, bytes | None]], part: str = "part-0.parquet") -> None:
        notes = [
            {"note_id": n, "title": "", "topics": [], "content": "", "image_path": path, "image": data}
            for n, path, data in rows
        ]
        pq.write_table(pa.Table.from_pylist(notes, schema=schema.NOTES), self.notes / part)

    def arguments(self, out: Path, *more: str) -> list[str]:
        paths = {"config": self.config, "notes": self.notes, "source": self.source, "store": self.store, "out": out}
        return [x for name, path in paths.items() for x in (f"--{name}", str(path))] + list(more)

    def run(self, out: Path, *more: str) -> dict:
        features.main(self.arguments(out, *more))
        return json.loads((out / "counts.json").read_text())

    def open_store(self) -> FeatureStore:
        return FeatureStore(next(self.store.iterdir()))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "store", num_patches=3, width=2)


def values(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[None]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3, 2)).astype(np.float32), rng.normal(size=(n, 2)).astype(np.float32), [None] * n


def test_store_returns_rows_in_the_requested_order(store, monkeypatch):
    """Two parts have row groups of two rows (8 numbers x 2 bytes each). Any order with repeats works, also reopened."""
    monkeypatch.setattr(feature_store, "_ROW_GROUP_BYTES", 32)
    for seed, ids in enumerate(["abcde", "fghijkl"]):
        store.append(list(ids), *values(len(ids), seed))
    part = pq.ParquetFile(next(store.root.glob("part-*")))
    assert part.num_row_groups > 2 and part.schema_arrow.equals(schema.vision_features(3, 2))
    expected = {
        i: (p, g)
        for s, ids in enumerate(["abcde", "fghijkl"])
        for i, p, g, _ in zip(ids, *values(len(ids), s), strict=True)
    }
    reopened = FeatureStore(store.root)
    assert (reopened.num_patches, reopened.width) == (3, 2)
    assert reopened.image_ids() == set("abcdefghijkl")
    for letters in ("a", "l", "lafgecb", "aab", "abcdefghijkl", ""):
        loaded = FeatureStore(store.root).load(list(letters))
        assert loaded.image_ids == tuple(letters)
        assert loaded.patches.dtype == loaded.global_feature.dtype == np.float16
        assert loaded.patches.shape == (len(letters), 3, 2) and loaded.global_feature.shape == (len(letters), 2)
        for i, letter in enumerate(letters):
            assert np.array_equal(loaded.patches[i], expected[letter][0].astype(np.float16))
            assert np.array_equal(loaded.global_feature[i], expected[letter][1].astype(np.float16))


def test_store_sees_parts_of_other_writers(store):
    store.append(["a"], *values(1))
    reader = FeatureStore(store.root)
    assert reader.image_ids() == {"a"}
    store.append(["b"], *values(1, seed=1))
    assert reader.load(["b"]).image_ids == ("b",)
    store.append(["b"], *values(1, seed=1))  # the same part again
    assert len(list(store.root.glob("part-*"))) == 2


def test_store_refuses(store, tmp_path):
    store.append(["a"], *values(1))
    with pytest.raises(ValueError, match=r"no features of 1 of 2 images \(first: x\); compute them with"):
        store.load(["a", "x"])
    patches, pooled, hashes = values(2)
    patches[1, 0, 0] = 70_000  # fp16 ends at 65,504
    with pytest.raises(ValueError, match="beyond the range of fp16 for image c"):
        store.append(["b", "c"], patches, pooled, hashes)
    with pytest.raises(ValueError, match="holds 3 x 2 features, not 4 x 2"):
        FeatureStore.create(store.root, 4, 2)
    with pytest.raises(ValueError, match="holds no vision features"):
        FeatureStore(tmp_path / "nowhere")
    (store.root / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store\.json is damaged"):
        FeatureStore(store.root)


def test_a_damaged_part_is_refused_by_name(store):
    """Page checksums find a flipped bit among the features. A cut file and other columns are refused at the opening."""
    store.append(list("abcd"), *values(4))
    part = next(store.root.glob("part-*"))
    good = part.read_bytes()
    needle = values(4)[0].astype(np.float16)[2].tobytes()
    position = good.index(needle)  # so small a page is not compressed
    part.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    with pytest.raises(
        ValueError, match=rf"{part.name} cannot be read .*notellm2_core.vision.extract makes it where it is missing"
    ):
        FeatureStore(store.root).load(["a"])
    part.write_bytes(good[:-9])
    with pytest.raises(ValueError, match=rf"{part.name} cannot be read"):
        FeatureStore(store.root).image_ids()
    pq.write_table(pa.table({"image_id": ["a"]}), part)
    with pytest.raises(ValueError, match=rf"{part.name} cannot be read \(other columns"):
        FeatureStore(store.root).image_ids()
    part.write_bytes(good)
    assert np.array_equal(FeatureStore(store.root).load(["c"]).patches[0], values(4)[0].astype(np.float16)[2])


def test_a_failed_write_leaves_nothing(store, monkeypatch):
    def full(table, where, **options):
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.pq, "write_table", full)
    with pytest.raises(OSError, match=r"part-.* cannot be written: .*No space left"):
        store.append(["a"], *values(1))
    assert {p.name for p in store.root.iterdir()} == {"store.json"}


def test_leftovers_of_dead_writers_are_removed(store):
    part, dead = store.root / "part-x.parquet", dead_process()
    gone, alive, elsewhere = draft_of(part, dead), draft_of(part, os.getpid()), draft_of(part, dead, "another-host")
    gone.touch(), alive.touch(), elsewhere.touch()
    FeatureStore.create(store.root, 3, 2)
    assert not gone.exists() and alive.exists() and elsewhere.exists()


def test_images_that_the_store_has_lost_are_counted(store, tmp_path):
    """A part is deleted, then the whole store."""
    store.append(["a", "b"], *values(2))
    store.append(["c"], *values(1))
    images = tmp_path / "images"
    (images / "vision").mkdir(parents=True)
    (images / "vision" / "config.json").write_text(json.dumps({"encoder_id": store.root.name}))
    rows = {"note_id": ["1", "2", "3", "4"], "image_id": ["a", "c", "c", None], "status": ["ok", "ok", "ok", "missing"]}
    pq.write_table(pa.table(rows), images / "note_images.parquet")
    assert num_missing(images, store.root.parent) == 0
    part = next(p for p in store.root.glob("part-*") if "c" in pq.read_table(p)["image_id"].to_pylist())
    part.unlink()
    assert num_missing(images, store.root.parent) == 1
    shutil.rmtree(store.root)
    assert num_missing(images, store.root.parent) == 2


def test_the_whole_run(world, tmp_path):
    """Notes with images of every status, as paths and bytes. One image under three names is computed once, and its
    features are the encoder's in fp16.
    """
    first, second = png(1), png(2)
    (world.source / "a.png").write_bytes(first)
    (world.source / "again.png").write_bytes(first)
    (world.source / "cut.png").write_bytes(first[:200])
    world.write_notes(
        [
            ("n1", "a.png", None),
            ("n2", "again.png", None),
            ("n3", None, first),
            ("n4", None, second),
            ("n5", "none.png", None),
            ("n6", "cut.png", None),
            ("n7", "../secret.png", None),
        ]
    )
    world.write_notes([("n8", None, png(3, size=101)), ("n9", None, None)], "part-1.parquet")
    counts = world.run(tmp_path / "out")
    encoder = load_vision_encoder(VisionSettings(library="tiny"))
    assert counts == {
        "notes": 9, "ok": 4, "truncated": 0, "missing": 1, "not_found": 1, "broken": 1, "unsupported": 0,
        "too_large": 1, "escapes": 1,
        "distinct_images": 2, "computed": 2, "reused": 0,
        "encoder_id": encoder.encoder_id, "num_patches": 16, "width": 32,
    }  # fmt: skip
    table = pq.read_table(tmp_path / "out" / "note_images.parquet")
    assert table.schema.equals(schema.NOTE_IMAGES)
    status = dict(zip(table["note_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert [status[f"n{i}"] for i in range(1, 10)] == [
        "ok", "ok", "ok", "ok", "not_found", "broken", "escapes", "too_large", "missing",
    ]  # fmt: skip
    hashes = dict(zip(table["note_id"].to_pylist(), table["perceptual_hash"].to_pylist(), strict=True))
    assert hashes["n1"] == hashes["n2"] == hashes["n3"] is not None and hashes["n5"] is None
    note_images = read_note_images(tmp_path / "out")
    one, two = image_id(first), image_id(second)
    assert note_images == dict.fromkeys(("n1", "n2", "n3"), one) | {"n4": two} | dict.fromkeys(
        ("n5", "n6", "n7", "n8", "n9")
    )
    assert VisionEncoder.from_pretrained(tmp_path / "out" / "vision").encoder_id == encoder.encoder_id
    assert world.open_store().root.name == encoder.encoder_id
    loaded = world.open_store().load([one, two])
    pixels = torch.stack([encoder.preprocess(Image.open(io.BytesIO(d)).convert("RGB")) for d in (first, second)])
    patches, pooled = encoder(pixels)
    np.testing.assert_allclose(loaded.patches, patches.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(loaded.global_feature, pooled.numpy(), rtol=1e-3, atol=1e-3)


def test_the_second_run_computes_only_new_images(world, tmp_path, monkeypatch):
    encoded = []
    real = VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, x: encoded.append(len(x)) or real(self, x))
    world.write_notes([(f"n{i}", None, png(i)) for i in range(6)])
    assert world.run(tmp_path / "one")["computed"] == 6
    assert encoded == [4, 2]
    before = (tmp_path / "one" / "note_images.parquet").read_bytes()
    again = world.run(tmp_path / "two")
    assert (again["computed"], again["reused"], encoded) == (0, 6, [4, 2])
    assert (tmp_path / "two" / "note_images.parquet").read_bytes() == before
    world.write_notes([("n6", None, png(6)), ("n7", None, png(0))], "part-1.parquet")
    third = world.run(tmp_path / "three")
    assert (third["computed"], third["reused"], third["distinct_images"], encoded) == (1, 6, 7, [4, 2, 1])
    # a stricter limit also holds for images in the store
    world.config.write_text(world.config.read_text().replace("10000", "100"))
    strict = world.run(tmp_path / "four")
    assert (strict["too_large"], strict["ok"], strict["reused"]) == (8, 0, 0)


def test_a_truncated_jpeg_is_used_and_counted_in_every_run(world, tmp_path):
    """Its features are the encoder's of what can be decoded. It has no perceptual hash, which would be one of the grey
    part as well: images that end early would all look alike.
    """
    whole = jpeg(1)
    world.write_notes([("n1", None, whole), ("n2", None, whole[:-400]), ("n3", None, whole[:-400])])
    for run, computed in (("one", 2), ("two", 0)):
        counts = world.run(tmp_path / run)
        assert (counts["ok"], counts["truncated"], counts["broken"], counts["computed"]) == (1, 2, 0, computed)
        rows = pq.read_table(tmp_path / run / "note_images.parquet").to_pylist()
        assert [row["status"] for row in rows] == ["ok", "truncated", "truncated"]
        assert [row["perceptual_hash"] is None for row in rows] == [False, True, True]
    assert rows[1]["image_id"] == rows[2]["image_id"] == image_id(whole[:-400])
    encoder = load_vision_encoder(VisionSettings(library="tiny"))
    store = world.open_store()
    assert store.image_ids() == {image_id(whole), image_id(whole[:-400])}
    patches, _ = encoder(encoder.preprocess(decode(whole[:-400], 10_000)[1])[None])
    np.testing.assert_allclose(store.load([image_id(whole[:-400])]).patches, patches.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_killed_in_the_middle(world, tmp_path):
    """After kill -9 behind at least two parts of four images, the next run computes only the rest, and the store then
    holds the same bits as that of an uninterrupted run.
    """
    total = 600
    for i in range(total):
        (world.source / f"{i}.png").write_bytes(png(i, size=100))
    world.write_notes([(f"n{i}", f"{i}.png", None) for i in range(total)])
    command = [sys.executable, "-m", "notellm2_core.vision.extract"]
    parts = ("--part-images", "4")
    child = subprocess.Popen(command + world.arguments(tmp_path / "out", *parts), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(world.store.glob("*/part-*"))) < 2 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    done = len(world.open_store().image_ids())
    assert 8 <= done < total and done % 4 == 0
    assert not (tmp_path / "out").exists()
    counts = world.run(tmp_path / "out", *parts)
    assert (counts["computed"], counts["reused"]) == (total - done, done)
    assert not list(world.store.glob("*/.*"))

    killed = world.open_store()
    world.store = tmp_path / "other_store"
    assert world.run(tmp_path / "other", *parts)["computed"] == total
    ids = [i for i in read_note_images(tmp_path / "out").values() if i]
    a, b = killed.load(ids), world.open_store().load(ids)
    assert np.array_equal(a.patches, b.patches) and np.array_equal(a.global_feature, b.global_feature)
    assert read_note_images(tmp_path / "out") == read_note_images(tmp_path / "other")


def test_user_errors_are_one_line(world, tmp_path, capsys):
    def fails(message: str) -> None:
        with pytest.raises(SystemExit) as e:
            world.run(tmp_path / "out")
        assert e.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0], error

    fails("holds no notes")
    pq.write_table(pa.table({"note_id": ["a"]}), world.notes / "p.parquet")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        world.run(tmp_path / "out")
    assert "p.parquet cannot be read (no column image_path, image)" in capsys.readouterr().err
    world.source.rmdir()
    fails("is not a folder")
    assert not (tmp_path / "out").exists()


def test_readers_of_the_store_need_no_torch():
    code = "import sys, notellm2_core.vision.extract; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_notes_with_images(world, tmp_path):
    world.write_notes([("n1", None, None)])
    counts = world.run(tmp_path / "out")
    assert (counts["notes"], counts["missing"], counts["distinct_images"]) == (1, 1, 0)
    assert world.open_store().load([]).patches.shape == (0, 16, 32)
    world.write_notes([])
    assert world.run(tmp_path / "none")["notes"] == 0
