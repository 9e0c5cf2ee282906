"""A dataset exists as a whole, or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.lake.lake import MANIFEST, Lake, LakeError, open_dataset
from notellm2_core.runtime.files import sha256_of
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.schema import SCHEMA_VERSION


def _publish(lake: Lake, fp: str = "f1", rows: int = 3) -> Path:
    with lake.publish("things", fp, {"up": "u1"}, {"a": 1}) as draft:
        (draft.path / "part").mkdir()
        pq.write_table(pa.table({"x": list(range(rows))}), draft.path / "part" / "0.parquet")
        draft.metrics["count"] = rows
    return lake.path("things", fp)


def test_a_full_disk_is_named_for_every_error_of_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk torch, safetensors and FAISS raise their own RuntimeErrors, and a torchrun child just ends."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    lake = Lake(tmp_path)
    message = f"no space left on the disk of {tmp_path}/a: free some or move the lake"
    with pytest.raises(OSError, match=message), lake.publish("a", "f" * 16, {}, {}) as draft:
        (draft.path / "weights").write_text("x")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_published_dataset_has_its_manifest(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    path = _publish(lake)
    dataset = lake.find("things", "f1")
    assert dataset is not None and dataset.path == path
    assert dataset.manifest.num_rows == 3
    assert dataset.manifest.inputs == {"up": "u1"} and dataset.manifest.metrics == {"count": 3}
    assert dataset.manifest.files["part/0.parquet"]["sha256"] == sha256_of(path / "part" / "0.parquet")


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with pytest.raises(OSError, match="No space left"), lake.publish("things", "f1", {}, {}) as draft:
        (draft.path / "half").write_text("half")
        raise OSError(28, "No space left on device")
    assert lake.find("things", "f1") is None
    assert list((tmp_path / "things").iterdir()) == []


def test_a_killed_writer_is_never_read_and_its_draft_is_swept(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from notellm2_core.lake.lake import Lake
        import time
        with Lake(Path({str(tmp_path)!r})).publish("things", "f1", {{}}, {{}}) as draft:
            (draft.path / "half").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    lake = Lake(tmp_path)
    assert lake.find("things", "f1") is None
    assert len(list((tmp_path / "things").iterdir())) == 1  # the draft
    _publish(lake)
    assert [p.name for p in (tmp_path / "things").iterdir()] == ["f1"]


def test_the_second_writer_of_a_fingerprint_keeps_the_first(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    path = _publish(lake, rows=3)
    _publish(lake, rows=3)
    dataset = lake.find("things", "f1")
    assert dataset is not None and dataset.manifest.num_rows == 3
    assert [p.name for p in path.parent.iterdir()] == ["f1"]


def _add_field(manifest: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "of_another_version": 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "part" / "0.parquet").unlink(), "does not match its manifest"),
        (lambda p: (p / "part" / "0.parquet").write_bytes(b"x"), "does not match its manifest"),
        (lambda p: (p / MANIFEST).write_text("{"), "not readable as JSON"),
        (lambda p: (p / MANIFEST).write_text(json.dumps({"schema_version": 99})), "schema version 99 by other code"),
        (lambda p: (p / MANIFEST).write_text("[]"), "schema version None by other code"),
        (lambda p: _add_field(p / MANIFEST), f"schema version {SCHEMA_VERSION} by other code"),
        (lambda p: (p / "part" / "1.parquet").write_bytes(b"x"), "1.parquet is not in the manifest"),
    ],
)
def test_a_dataset_that_cannot_be_trusted_is_refused_in_one_sentence(tmp_path: Path, damage, message: str) -> None:
    path = _publish(Lake(tmp_path))
    damage(path)
    with pytest.raises(LakeError, match=message) as refused:
        open_dataset(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_fingerprint_is_stable_and_sensitive() -> None:
    assert fingerprint({"b": 1, "a": [1, 2]}) == fingerprint({"a": [1, 2], "b": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_linked_file_keeps_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is linked without being read, or copied on a disk without hard links. Its dataset may then be deleted."""
    lake = Lake(tmp_path)
    part = open_dataset(_publish(lake))

    def no_link(*_: object) -> None:
        raise OSError("no hard links here")

    for name in ("linked", "copied"):
        if name == "copied":
            monkeypatch.setattr(os, "link", no_link)
        with lake.publish(name, "f", {}, {}) as draft:
            draft.link("whole/a.parquet", part, "part/0.parquet")
        whole = lake.open(name, "f")
        assert whole.manifest.files == {"whole/a.parquet": part.manifest.files["part/0.parquet"]}
        assert os.path.samefile(whole.path / "whole/a.parquet", part.path / "part/0.parquet") == (name == "linked")
    shutil.rmtree(part.path)
    assert pq.read_table(lake.open("linked", "f").path / "whole").num_rows == 3


def test_datasets_of_a_name_are_listed_without_damaged_ones(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    assert lake.datasets("things") == []
    paths = [_publish(lake, fp) for fp in ("f2", "f1", "f3")]
    shutil.copytree(paths[0], paths[0].with_name(".f2.host.1.0123abcd.draft"))  # a complete draft before its rename
    (paths[2] / MANIFEST).write_text("{")
    assert {dataset.path for dataset in lake.datasets("things")} == {*paths[:2]}
