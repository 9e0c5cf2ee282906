"""Offline replay: figures by hand, a slow reference, and releases of a lake."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from notellm2_core.cli import main as cli
from notellm2_core.config.settings import IndexSettings, ReplaySettings
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.release.golden import golden_queries
from notellm2_core.release.release import LINEAGE_FILE, NAME, open_release
from notellm2_core.retrieval.build import save_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import write_neighbours_of
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER, INTERACTIONS, NEIGHBOURS_FOLDER, TEST, TRAIN
from notellm2_core.serving.held_out import HeldOut, held_out_clicks
from notellm2_core.serving.replay import NothingToReplay, compare_hits, main, open_contest, replay, to_markdown

MONDAY = datetime(2025, 1, 20, tzinfo=UTC)
ALL = ReplaySettings(replay_clicks=1000, replay_history=50, replay_k=2)
Click = tuple[str, str, float | None]  # user, note, hours after Monday; None: only seen


def write_interactions(folder: Path, train: Sequence[Click], test: Sequence[Click]) -> None:
    for name, clicks in {TRAIN: train, TEST: test}.items():
        times = [None if hours is None else MONDAY + timedelta(hours=hours) for _, _, hours in clicks]
        rows = {
            "user_id": [user for user, _, _ in clicks],
            "note_id": [note for _, note, _ in clicks],
            "first_view": [time or MONDAY for time in times],
            "last_click": times,
            "events": [1] * len(clicks),
            "clicks": [1] * len(clicks),
        }
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table(rows, schema=INTERACTIONS), folder / name / "part-0.parquet")


def test_held_out_clicks_by_hand(tmp_path: Path) -> None:
    """u2 clicks b in both windows, and c and d at the same time; u3 has clicks in the training days alone."""
    train = [("u1", "a", -5.0), ("u1", "b", -9.0), ("u2", "b", -3.0), ("u3", "a", -1.0), ("u1", "z", None)]
    test = [("u1", "c", 4.0), ("u1", "d", 2.0), ("u2", "b", 5.0), ("u2", "c", 6.0), ("u2", "d", 6.0), ("u3", "c", None)]
    write_interactions(tmp_path, train, test)
    clicks = held_out_clicks(tmp_path, 100, 2)
    assert clicks.users.tolist() == [0, 0, 1, 1] and clicks.notes == ("d", "c", "c", "d")
    assert clicks.histories == (("a", "b"), ("d", "a"), ("b",), ("b",))  # the newest two, the newest first
    chosen = clicks.where(np.array([False, False, True, False]))
    assert (chosen.users.tolist(), chosen.notes, chosen.histories) == ([0], ("c",), (("b",),))


def test_of_random_users_all_clicks(tmp_path: Path) -> None:
    test = [(f"u{n % 40}", f"n{n}", float(n)) for n in range(200)]
    write_interactions(tmp_path, [], test)
    some = held_out_clicks(tmp_path, 50, 50)
    assert len(some.notes) == 50 and np.bincount(some.users).tolist() == [5] * 10
    assert some.notes != held_out_clicks(tmp_path, 50, 50, seed=1).notes
    assert len(held_out_clicks(tmp_path, 51, 50).notes) == 55 and len(held_out_clicks(tmp_path, 9999, 50).notes) == 200
    empty = tmp_path / "none"
    write_interactions(empty, test, [])
    assert held_out_clicks(empty, 50, 50).notes == ()


def unit(vectors: Any) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def publish(lake: Lake, release_id: str, ids: Sequence[str], vectors: np.ndarray, **inputs: str) -> None:
    """A release of these vectors, as far as a replay opens it: it needs no model."""
    with lake.publish(NAME, release_id, {"checkpoint": release_id, **inputs}, {}) as draft:
        weights = f"weights of {release_id}"
        (draft.path / "embeddings").mkdir()
        write_shard(draft.path / "embeddings" / "part.parquet", ids, vectors, {"weights": weights})
        embeddings = Embeddings(tuple(ids), vectors, weights_id=weights)
        save_index(embeddings, draft.path / INDEX_FOLDER, IndexSettings(factory="Flat"), 2)
        write_neighbours_of(draft.path / INDEX_FOLDER, draft.path / "embeddings", draft.path / NEIGHBOURS_FOLDER)
        golden = golden_queries(Index.load(draft.path / INDEX_FOLDER), ids[:2], vectors[:2])
        (draft.path / GOLDEN_FILE).write_text(json.dumps(golden))
        (draft.path / LINEAGE_FILE).write_text(json.dumps({"week": "2025-01-19"}))


def publish_week(
    lake: Lake, train: Sequence[Click], test: Sequence[Click], by_champion: Mapping[str, Sequence[float]] | None
) -> str:
    """The verdict of a week with these clicks; by_champion: the pool's vectors by the model of aaaa1111."""
    with lake.publish("interactions", "clicks", {}, {}) as draft:
        write_interactions(draft.path, train, test)
    with lake.publish("weekly_activity", "activity", {"interactions": "clicks"}, {}):
        pass
    with lake.publish("rival_embeddings", "rivals", {}, {}) as draft:
        if by_champion is not None:
            folder = draft.path / "aaaa1111" / "multimodal"  # as the export writes them
            folder.mkdir(parents=True)
            vectors = unit([*by_champion.values()])
            metadata = {"weights": "weights of aaaa1111"}
            write_shard(folder / "part.parquet", [*by_champion], vectors, metadata)
    with lake.publish("verdict", "verdict", {"weekly_activity": "activity", "rival_embeddings": "rivals"}, {}):
        pass
    return "verdict"


@pytest.fixture
def week(tmp_path: Path) -> Lake:
    """The champion knows a to e, and has embedded the new note f; e is no longer there, and it has never seen g.

    By both models, a, b and f are alike, and so are c and d. The challenger finds f nearer to a than b; the champion
    does not.
    """
    lake = Lake(tmp_path / "lake")
    train = [("u1", "a", -2.0), ("u2", "c", -2.0), ("u3", "g", -1.0)]
    test = [("u1", "f", 1.0), ("u1", "b", 2.0), ("u2", "d", 1.0), ("u2", "g", 2.0), ("u3", "a", 1.0), ("u1", "e", 9.0)]
    verdict = publish_week(lake, train, test, {"f": (0.8, 0.6, 0)})
    champion = {"a": (1, 0, 0), "b": (0.9, 0.1, 0), "c": (0, 1, 0), "d": (0, 1, 0.1), "e": (0.7, 0.7, 0)}
    challenger = {"a": (1, 0), "b": (0.9, 0.3), "c": (0, 1), "d": (0.1, 1), "f": (1, 0.1), "g": (0.5, 0.5)}
    publish(lake, "aaaa1111", [*champion], unit([*champion.values()]))
    publish(lake, "bbbb2222", [*challenger], unit([*challenger.values()]), verdict=verdict)
    return lake


def figures(lake: Lake, k: int) -> dict[str, tuple[float, float]]:
    found = replay(lake, "aaaa", "bbbb", ALL.model_copy(update={"replay_k": k}))
    assert (found.num_clicks, found.num_users, found.num_other_notes, found.num_without_history) == (3, 2, 2, 1)
    return {figure.name: (figure.champion.value, figure.challenger.value) for figure in found.figures}


def test_the_figures_by_hand(week: Lake) -> None:
    """Three clicks count: f after a, b after f and a, d after c. Both releases find a, b, c, d and f.

    k = 1: the champion answers b, b, d: two of three, and never f, which is new to it. The challenger answers f, b, d.
    Novelty: of the six hits b has 2/3 and 1/3 (mean 1/2), d 1/3 and 1/3, f 0 and 1/3.
    """
    found = figures(week, 1)
    assert found["hit rate@1"] == pytest.approx((2 / 3, 1))
    assert found["cold-note exposure"] == pytest.approx((0, 1 / 3))
    b, d, f = -np.log2([1 / 2, 1 / 3, 1 / 6])
    assert found["novelty, bits"] == pytest.approx(((2 * b + d) / 3, (b + d + f) / 3))
    assert found["coverage"] == pytest.approx((2 / 5, 2 / 5))  # b and d, of a to e
    # k = 2: the champion answers (b, f), (b, d), (d, f): f is nearer to c than a is. The challenger: (f, b), (b, d),
    # (d, b).
    found = figures(week, 2)
    assert found["hit rate@2"] == (1, 1) and found["cold-note exposure"] == pytest.approx((2 / 6, 1 / 6))
    assert "3 held-out clicks of 2 users" in to_markdown(replay(week, "aaaa", "bbbb", ALL))


def test_the_command_writes_figures_or_why_there_are_none(
    week: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "site.yaml"
    settings = {"name": "site", "lake": str(week.root), "model": {"llm": {"name": "tiny"}}}
    config.write_text(yaml.safe_dump(settings))
    both = ["--config", str(config), "--challenger", "bbbb2222", "--out", str(tmp_path / "out")]
    main([*both, "--champion", "aaaa1111"])
    written = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert written["num_clicks"] == 3 and written["figures"]["hit rate@100"]["difference"]["value"] == 0
    assert "| hit rate@100 | 1 [" in (tmp_path / "out" / "replay.md").read_text()
    cli(["experiments", "replay", "aaaa", "bbbb", "--config", str(config)])
    assert capsys.readouterr().out == (tmp_path / "out" / "replay.md").read_text()
    for options, why in (([], "no release was live"), (["--champion", "bbbb2222"], "is both the champion and")):
        main([*both, *options])
        assert why in json.loads((tmp_path / "out" / "replay.json").read_text())["nothing"]
        assert why in (tmp_path / "out" / "replay.md").read_text()
    config.write_text(yaml.safe_dump(settings | {"evaluation": {"replay_clicks": 0}}))
    main([*both, "--champion", "aaaa1111"])
    assert "replay_clicks = 0" in (tmp_path / "out" / "replay.md").read_text()


def test_what_is_not_there_is_said(week: Lake, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no longer holds the dataset verdict that release aaaa1111 comes from"):
        replay(week, "bbbb2222", "aaaa1111", ALL)
    lake = Lake(tmp_path / "other")
    verdict = publish_week(lake, [("u1", "x", -1.0)], [("u1", "b", 1.0)], None)
    for release, ids in {"aaaa1111": "ab", "bbbb2222": "bc"}.items():
        publish(lake, release, [*ids], unit(np.eye(2)), verdict=verdict)
    assert open_contest(lake, *(open_release(lake, i) for i in ("aaaa", "bbbb"))).candidates == {"b"}
    with pytest.raises(NothingToReplay, match="of 1 held-out clicks, 0 are on notes that not both releases have"):
        replay(lake, "aaaa1111", "bbbb2222", ALL)


def slow_hits(vectors: Mapping[str, np.ndarray], clicks: HeldOut, k: int) -> list[set[str]]:
    """Of each click: compare every note with every history note, and take the k best."""
    found = []
    for history in clicks.histories:
        queries = [vectors[note] for note in history if note in vectors]
        scores = {note: max(float(q @ v) for q in queries) for note, v in vectors.items() if note not in history}
        found.append(set(sorted(scores, key=lambda note: (-scores[note], note))[:k]))
    return found


def test_equals_the_slow_reference(tmp_path: Path) -> None:
    """Random vectors and clicks; the champion lacks a fifth of the notes, and has embedded half of them since."""
    rng, lake = np.random.default_rng(0), Lake(tmp_path / "lake")
    ids = [f"n{n:03d}" for n in range(150)]
    ours, theirs = (dict(zip(ids, unit(rng.normal(size=(150, width))), strict=True)) for width in (6, 4))
    clicks = [(f"u{rng.integers(20)}", ids[rng.integers(150)], float(hour)) for hour in range(-300, 300)]
    fresh, unseen = ids[120:135], ids[135:]
    verdict = publish_week(
        lake, [c for c in clicks if c[2] < 0], [c for c in clicks if c[2] >= 0], {i: ours[i] for i in fresh}
    )
    publish(lake, "aaaa1111", ids[:120], np.stack([ours[i] for i in ids[:120]]))
    publish(lake, "bbbb2222", ids[10:], np.stack([theirs[i] for i in ids[10:]]), verdict=verdict)
    contest = open_contest(lake, *(open_release(lake, release) for release in ("aaaa1111", "bbbb2222")))
    assert contest.candidates == set(ids[10:135]) and not contest.candidates & {*unseen}
    held_out = held_out_clicks(lake.path("interactions", "clicks"), 1000, 50)
    found = compare_hits(contest, held_out, 7)
    asked = held_out.where(np.array([note in contest.candidates for note in held_out.notes]))
    hit_rate = found.figures[0]
    for vectors, value in ((ours, hit_rate.champion.value), (theirs, hit_rate.challenger.value)):
        slow = slow_hits({i: vectors[i] for i in contest.candidates}, asked, 7)
        assert value == np.mean([note in notes for note, notes in zip(asked.notes, slow, strict=True)])
    assert 0 < hit_rate.champion.value < 0.5 and hit_rate.difference.low < hit_rate.difference.high
