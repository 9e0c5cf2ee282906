"""`notellm2 index build` and `search`: by a stored id, by a table, by a text and an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from notellm2_core.cli import main
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference import index_queries
from notellm2_core.inference.embed_table import embed_notes
from notellm2_core.notes.source_reader import read_note_table
from tests.support.released import Release, write_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    release = write_release(tmp_path_factory.mktemp("release"))
    embed_notes(release.model, read_note_table(release.source), release.root / "embeddings")
    main(["index", "build", "--embeddings", str(release.root / "embeddings"), "--out", str(release.root / "index")])
    return release


def search(release: Release, capsys: pytest.CaptureFixture[str], *options: Any) -> list[Any]:
    capsys.readouterr()
    main(["index", "search", "--index", str(release.root / "index"), *map(str, options)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_by_a_stored_id_and_by_a_table(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    """Both give the exact order of the other notes."""
    embeddings = release.root / "embeddings"
    table = read_embeddings(embeddings)
    lines = search(release, capsys, "--queries", embeddings, "--k", 19)
    assert [line["query_id"] for line in lines] == list(table.note_ids)
    for row, line in enumerate(lines):
        scores = {n: float(s) for n, s in zip(table.note_ids, table.vectors @ table.vectors[row], strict=True)}
        del scores[table.note_ids[row]]
        assert {hit["note_id"] for hit in line["hits"]} == set(scores)
        np.testing.assert_allclose([hit["score"] for hit in line["hits"]], sorted(scores.values())[::-1], atol=2e-6)
        assert all(hit["score"] == pytest.approx(scores[hit["note_id"]], abs=2e-6) for hit in line["hits"])
    for place in ([], ["--embeddings", embeddings]):
        (hits,) = search(release, capsys, "--note-id", table.note_ids[3], *place, "--k", 10**12)
        assert hits == lines[3]["hits"]


def test_by_a_text_and_an_image(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    """A note of the index without topics and content would be its own nearest; here the score is that of the model."""
    from notellm2_core.inference.embedder import Embedder

    image = release.source / "8.png"
    table, embedder = read_embeddings(release.root / "embeddings"), Embedder.from_pretrained(release.model)
    for options, note in (
        (["--text", "a red kite"], {"title": "a red kite"}),
        (["--image", image], {"image": image}),
        (["--text", "a red kite", "--image", image], {"title": "a red kite", "image": image}),
    ):
        (hits,) = search(release, capsys, *options, "--model", release.model, "--k", 3, "--params", "exhaustive")
        scores = table.vectors @ embedder.embed([note])[0]
        assert hits[0]["note_id"] == table.note_ids[int(scores.argmax())]
        np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(scores)[::-1][:3], atol=1e-5)


def test_a_truncated_image_is_searched_for_with_a_warning(release: Release, tmp_path: Path) -> None:
    Image.open(release.source / "8.png").resize((64, 64)).save(tmp_path / "8.jpg")
    (tmp_path / "8.jpg").write_bytes((tmp_path / "8.jpg").read_bytes()[:-300])
    with pytest.warns(UserWarning, match=r"8\.jpg is truncated: used; the file ends early"):
        query = index_queries.new_note(release.model, None, tmp_path / "8.jpg", 16)
    assert query.vectors.shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "search by one of --note-id, --queries, or --text with or without --image"),
        (["--note-id", "a", "--text", "b"], "search by one of"),
        (["--note-id", "nobody"], "index holds no note 'nobody'; for another note, name its table by --embeddings"),
        (["--text", "a", "--embeddings", "EMBEDDINGS"], "--embeddings belongs to --note-id"),
        (["--text", "a"], "--model belongs to --text and --image"),
        (["--queries", "EMBEDDINGS", "--model", "MODEL"], "--model belongs to"),
        (["--note-id", "nobody", "--embeddings", "EMBEDDINGS"], "the first is 'nobody'"),
        (["--image", "no.png", "--model", "MODEL"], "the image no.png cannot be used: not_found"),
        (
            ["--queries", "EMBEDDINGS", "--params", "nprobe=3"],
            "'nprobe=3' is no search parameter of this index: it has",
        ),
        (["--queries", "OTHER"], "vectors of two models cannot be compared"),
    ],
)
def test_errors(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    table = pq.read_table(release.root / "embeddings")
    metadata = {**table.schema.metadata, b"weights": b"of another model"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "other.parquet")
    names = {"EMBEDDINGS": release.root / "embeddings", "MODEL": release.model, "OTHER": tmp_path / "other.parquet"}
    with pytest.raises(SystemExit) as ended:
        search(release, capsys, *(names.get(option, option) for option in options))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and printed.count("error:") == 1


def test_the_model_is_the_same_wherever_it_lies(release: Release, tmp_path: Path) -> None:
    """The graph's export, `notellm2 embed` and a package of the model name it alike; another kind of input, too."""
    from notellm2_core.inference import export
    from notellm2_core.inference.package import package

    main_id = read_embeddings(release.root / "embeddings").weights_id
    export.main([*release.features(), "--inputs", "text", "--out", str(tmp_path / "export")])
    package(release.model, tmp_path / "package", layout="sentence-transformers")
    embed_notes(tmp_path / "package", read_note_table(release.source), tmp_path / "packaged", "image", dim=5)
    for folder in ("export/text", "packaged"):
        assert read_embeddings(tmp_path / folder).weights_id == main_id is not None


def test_a_build_below_the_target_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 bits for 16 numbers find a tenth of the neighbours."""
    vectors = np.random.default_rng(0).normal(size=(400, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.table({"note_id": pa.array(range(400)), "embedding": pa.array(list(vectors), pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "e.parquet")
    build = ["index", "build", "--embeddings", str(tmp_path / "e.parquet"), "--out", str(tmp_path / "index")]
    main([*build, "--factory", "PQ2x4"])
    printed = capsys.readouterr()
    built = json.loads(printed.out)
    assert set(built["recall"]) == set(built["latency_ms"]) == {"1", "10", "100"} and built["recall"]["10"] < 50
    assert "warning: recall@10 is" in printed.err and "below --target-recall 0.95: PQ2x4" in printed.err
    main([*build, "--factory", "HNSW32", "--search-k", "20", "--target-recall", "0.9"])
    printed = capsys.readouterr()
    built = json.loads(printed.out)
    assert set(built["recall"]) == {"1", "10", "20", "100"} and built["recall"]["20"] >= 90
    assert "warning: recall" not in printed.err
