"""Exported embeddings are equal for all batch sizes, resumed after a kill, and refused for another model's features."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from notellm2_core import schema
from notellm2_core.config.load import load_config
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference import export
from notellm2_core.model.build import build_model, load_model
from notellm2_core.notes.token_store import read_tokens
from notellm2_core.vision import extract as features
from notellm2_core.vision.feature_store import FeatureStore, read_note_images
from tests.support.drafts import draft_of
from tests.support.waiting import wait_for

NUM_NOTES = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Notes of many lengths, every third without an image and two with the same; a tiny untrained model, features."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    config = {
        "name": "export",
        "model": {
            "llm": {"name": "tiny"},
            "vision": {"library": "tiny", "name": "tiny", "pretrained": None},
            "connector": {
                "num_queries": 2, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
            },
            "projection_dim": 8,
        },
        "export": {"batch_notes": 4, "shard_notes": 7},
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "source").mkdir()
    rows = []
    for n in range(NUM_NOTES):
        if n % 3:
            pixels = np.random.default_rng(max(n, 2)).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "source" / f"{n}.jpg")
        words = [str(w) for w in rng.choice(["red", "old", "ship", "tea", "hill"], rng.integers(0, 40))]
        rows.append(
            {
                "note_id": f"n{n:02d}", "title": f"note {n}", "topics": words[:2], "content": " ".join(words),
                "image_path": f"{n}.jpg" if n % 3 else None, "image": None,
            }
        )  # fmt: skip
    (root / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.NOTES), root / "notes" / "notes.parquet")
    model, processor = build_model(load_config(root / "config.yaml"), root / "cache")
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    parts = {"config": "config.yaml", "notes": "notes", "source": "source", "store": "store", "out": "images"}
    features.main([f for name, path in parts.items() for f in (f"--{name}", str(root / path))])
    return root


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    parts = {"config": "config.yaml", "model": "model", "notes": "notes", "images": "images", "store": "store"}
    return [f for name, path in parts.items() for f in (f"--{name}", str(world / path))] + ["--out", str(out), *more]


def exporter(world: Path, batch_notes: int) -> export.BatchEmbedder:
    model, processor = load_model(world / "model")
    encoder_id = json.loads((world / "images" / "vision" / "config.json").read_text())["encoder_id"]
    return export.BatchEmbedder(
        model, processor, read_tokens(world / "notes", processor.note_tokenizer), read_note_images(world / "images"),
        FeatureStore(world / "store" / encoder_id), batch_notes, torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of all three kinds of input in one run."""
    out = tmp_path_factory.mktemp("whole")
    export.main(arguments(world, out, "--inputs", "multimodal,image,text"))
    return out


def test_vectors_do_not_depend_on_their_batch(world: Path, whole: Path) -> None:
    """Notes alone, in fours (the export) or reversed in one batch have the same vectors up to rounding."""
    ids = [f"n{n:02d}" for n in range(NUM_NOTES)]
    for inputs in ("multimodal", "image", "text"):
        exported = read_embeddings(whole / inputs)
        assert exported.note_ids == tuple(ids)
        np.testing.assert_allclose(np.linalg.norm(exported.vectors, axis=1), 1, atol=1e-6)
        alone = exporter(world, 1).embed(ids, inputs)
        together = exporter(world, 32).embed(ids[::-1], inputs)[::-1]
        np.testing.assert_allclose(exported.vectors, alone, atol=2e-6)
        np.testing.assert_allclose(together, alone, atol=2e-6)


def test_each_kind_of_input_reads_only_its_own(world: Path, whole: Path) -> None:
    """Image-only vectors of notes without an image are all equal. Text-only vectors do not depend on the images."""
    image = read_embeddings(whole / "image").vectors
    np.testing.assert_allclose(image[::3], image[[0] * 10], atol=2e-6)
    assert np.abs(image[1] - image[4]).max() > 1e-4
    seeing = exporter(world, 4)
    blind = replace(seeing, images=dict.fromkeys(seeing.notes))
    ids = list(blind.notes)
    np.testing.assert_allclose(blind.embed(ids, "text"), read_embeddings(whole / "text").vectors, atol=2e-6)
    assert np.abs(blind.embed(ids, "multimodal") - read_embeddings(whole / "multimodal").vectors)[1].max() > 1e-4


def test_only_the_named_notes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"note_id": ["n03", "n20", "n04", "n03"]}), tmp_path / "ids.parquet")
    export.main(arguments(world, tmp_path / "out", "--note-ids", str(tmp_path / "ids.parquet")))
    assert read_embeddings(tmp_path / "out" / "multimodal").note_ids == ("n03", "n04", "n20")
    counts = json.loads(capsys.readouterr().out)
    assert (counts["notes"], counts["notes_without_image"], counts["precision"]) == (3, 1, "float32")


def test_inputs_of_one_modality_have_notes_of_their_own(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def embed(*note_ids: str) -> None:
        pq.write_table(pa.table({"note_id": note_ids}), tmp_path / "ids.parquet")
        options = ["--inputs", "multimodal,text", "--single-modality-note-ids", str(tmp_path / "ids.parquet")]
        export.main(arguments(world, tmp_path / "out", *options))

    embed("n20", "n04")
    assert read_embeddings(tmp_path / "out" / "text").note_ids == ("n04", "n20")
    assert read_embeddings(tmp_path / "out" / "multimodal").note_ids == read_embeddings(whole / "text").note_ids
    for absent in (["n20", "n99"], []):
        with pytest.raises(SystemExit):
            embed(*absent)
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert ("1 notes are not in" if absent else "there are no notes to embed") in message


def test_a_complete_export_computes_nothing(
    world: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(export.BatchEmbedder, "embed", never)
    export.main(arguments(world, whole, "--inputs", "image,text"))
    assert json.loads(capsys.readouterr().out)["notes_per_second"] == {"image": 0, "text": 0}


@pytest.mark.slow
def test_killed_and_started_again(world: Path, whole: Path, tmp_path: Path) -> None:
    """After kill -9 behind the second of five shards, the next run keeps those two and ends with the same bytes."""
    slow = (
        "import time; from notellm2_core.embeddings import shards; from notellm2_core.inference import export\n"
        "write = shards.write_shard\n"
        "def slowly(*a):\n    write(*a)\n    time.sleep(0 if a[0].name < 'part-00001' else 60)\n"
        "shards.write_shard = slowly\n"
        "export.main()"
    )
    arguments_ = arguments(world, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # threads decide the order of sums
    child = subprocess.Popen([sys.executable, "-c", slow, *arguments_], env=environment)
    second = tmp_path / "multimodal" / "part-00001.parquet"
    try:
        for _ in range(2400):
            if second.exists() or child.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    written = {p: p.stat().st_mtime_ns for p in second.parent.glob("part-*.parquet")}
    assert len(written) == 2
    draft_of(second.with_name("part-00002.parquet"), child.pid).write_bytes(b"half a shard")
    export.main(arguments_)
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert sorted(p.name for p in second.parent.iterdir()) == [f"part-0000{n}.parquet" for n in range(5)]
    for shard in second.parent.iterdir():
        assert shard.read_bytes() == (whole / "multimodal" / shard.name).read_bytes()


@pytest.mark.slow
def test_no_rank_outlives_its_launcher(world: Path, tmp_path: Path) -> None:
    """After kill -9 of torchrun while its ranks start, they write nothing, because the next run may write there."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "notellm2_core.inference.export", *arguments(world, tmp_path / "out")]
    launcher = psutil.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks: list[psutil.Process] = wait_for(lambda: len(children := launcher.children()) == 2 and children)  # type: ignore[assignment]
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(rank.is_running() for rank in ranks), 60)
    assert not (tmp_path / "out").exists()


def test_user_errors_are_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            export.main(list(argv))
        assert stop.value.code == 2
        text = capsys.readouterr().err
        assert text.strip().splitlines()[-1].startswith("error: ")
        return text

    assert "must be a comma-separated list of multimodal, image, text" in error(
        *arguments(world, tmp_path, "--inputs", "sound")
    )
    assert "does not exist: give --images" in error(*arguments(world, tmp_path, "--images", str(tmp_path)))
    assert "holds no model" in error(*arguments(world, tmp_path, "--model", str(tmp_path)))

    other = tmp_path / "model"
    shutil.copytree(world / "model", other)
    shutil.copytree(world / "images" / "vision", other / "vision")
    for file in (other / "config.json", other / "vision" / "config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_id": "f" * 16}))
    assert f"trained with vision encoder {'f' * 16}" in error(*arguments(world, tmp_path, "--model", str(other)))

    fewer = tmp_path / "images"
    (fewer / "vision").mkdir(parents=True)
    (fewer / "vision" / "config.json").write_bytes((world / "images" / "vision" / "config.json").read_bytes())
    table = pq.read_table(world / "images" / "note_images.parquet")
    pq.write_table(table.slice(0, NUM_NOTES - 2), fewer / "note_images.parquet")
    assert "2 notes are not in" in error(*arguments(world, tmp_path, "--images", str(fewer)))
