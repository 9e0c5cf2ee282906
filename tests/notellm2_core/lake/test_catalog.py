"""The fingerprints of a configuration's datasets, what changes them, and the days of a window."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from notellm2_core.config.docs import sections, settings
from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.lake.catalog import Catalog, MissingDataset
from notellm2_core.lake.ledger import Subject
from notellm2_core.lake.lineage import STAGES
from notellm2_core.lake.window import first_day_of_week, last_complete_week_end

TINY = Path("pipelines/configs/tiny.yaml")


def _catalog(lake: Path, **overrides: object) -> Catalog:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return Catalog(load_config(TINY, {"lake": str(lake), "window.end": "2025-01-26", **changes}))


def _changed(a: Catalog, b: Catalog) -> set[str]:
    return {name for name in STAGES if a.fingerprint(name) != b.fingerprint(name)}


def _downstream(*names: str) -> set[str]:
    stages = set(names)
    while more := {n for n, s in STAGES.items() if set(s.inputs) & stages} - stages:
        stages |= more
    return stages


def test_a_setting_changes_its_stage_and_all_after_it_and_nothing_else(tmp_path: Path) -> None:
    base = _catalog(tmp_path)
    assert _changed(base, _catalog(tmp_path)) == set()
    assert _changed(base, _catalog(tmp_path, pairs__top_t=5)) == _downstream("related_pairs")
    assert _changed(base, _catalog(tmp_path, training__alpha=3)) == _downstream("checkpoint")
    assert _changed(base, _catalog(tmp_path, training__trainable=["llm"])) == _downstream("checkpoint")
    # Adapters do not change the initial model.
    assert _changed(base, _catalog(tmp_path, model__lora={"rank": 4})) == _downstream("checkpoint")
    less_memory = {"training__micro_batch_tokens": 99, "training__gradient_checkpointing": True}
    assert _changed(base, _catalog(tmp_path, **less_memory)) == set()  # a training run resumes with them
    assert _changed(base, _catalog(tmp_path, index__factory="HNSW8")) == _downstream("faiss_index")
    assert _changed(base, _catalog(tmp_path, window__end="2025-01-19")) == _downstream("interactions")
    assert _changed(base, _catalog(tmp_path, spark__driver_memory="3g")) == set()


def test_a_null_setting_that_was_added_later_changes_no_fingerprint(tmp_path: Path) -> None:
    base, names = _catalog(tmp_path), {"click_events": ["click"], "event_weights": {"click": 2}}
    for null in ("pairs__max_minutes", "pairs__half_life_days", "source__event_weights"):
        setting = null.replace("__", ".")
        assert all(setting not in base.settings(name) for name in STAGES)
        assert _changed(base, _catalog(tmp_path, **{null: None})) == set()
    assert _changed(base, _catalog(tmp_path, pairs__max_minutes=30)) == _downstream("interactions")
    assert _changed(base, _catalog(tmp_path, pairs__half_life_days=7)) == _downstream("cooccurrence")
    weights = {f"source__{key}": value for key, value in names.items()}
    assert _changed(base, _catalog(tmp_path, **weights)) == _downstream("interactions")
    assert _changed(base, _catalog(tmp_path, source__columns={"weight": "price"})) == (
        _downstream("raw_events") | _downstream("notes")
    )
    of_events = {"source__events": {"columns": {"weight": "price"}}}
    assert _changed(base, _catalog(tmp_path, **of_events)) == _downstream("raw_events")


def test_every_row_of_the_lineage_names_settings_or_sections() -> None:
    known = {*settings(), *(name for name, _ in sections())}
    assert {key for stage in STAGES.values() for key in stage.settings} <= known


def test_without_hard_negatives_training_does_not_depend_on_the_initial_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprints(num: int) -> dict[str, str]:
        catalog = _catalog(tmp_path, training__hard_negatives__num=num)
        return {name: catalog.fingerprint(name) for name in STAGES}

    without, with_negatives = fingerprints(0), fingerprints(1)
    monkeypatch.setitem(STAGES, "initial_model", replace(STAGES["initial_model"], version=99))  # type: ignore[arg-type]
    assert {name for name, key in fingerprints(0).items() if key != without[name]} == {
        "initial_model", "initial_embeddings", "eval_recall", "verdict", "release", "offline_replay"
    }  # fmt: skip
    changed = {name for name, key in fingerprints(1).items() if key != with_negatives[name]}
    assert changed == _downstream("initial_model")
    assert _catalog(tmp_path, training__hard_negatives__num=0).inputs("hard_negatives") == {}


def test_another_source_changes_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "notes.parquet").write_text("a")
    (source / "events.csv").write_text("a")
    before = _catalog(tmp_path, source__path=str(source))
    before_all = {name: before.fingerprint(name) for name in STAGES}
    (source / "notes.parquet").write_text("ab")
    (source / "events.csv").write_text("ab")
    after = _catalog(tmp_path, source__path=str(source))
    assert all(after.fingerprint(name) != before_all[name] for name in STAGES)


def test_new_events_do_not_change_the_notes_nor_a_run_that_has_begun(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "events").mkdir(parents=True)
    (source / "notes.parquet").write_text("a")
    (source / "gone.jpg").symlink_to("nowhere")

    def catalog(run_id: str | None = None) -> Catalog:
        config = _catalog(tmp_path / "lake", source__path=str(source)).config
        return Catalog(config, run_id=run_id)

    before, in_run = catalog(), catalog("run-1")
    assert before.fingerprint("raw_events") == in_run.fingerprint("raw_events")
    assert _changed(before, in_run) == set()
    (source / "events" / "part-1.parquet").write_text("new")
    assert _changed(before, catalog()) == _downstream("raw_events")
    assert _changed(before, catalog("run-1")) == set()
    assert _changed(before, catalog("run-2")) == _downstream("raw_events")


def test_a_configuration_without_any_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the configuration tiny has no source: set source.path, or SOURCE="):
        _catalog(tmp_path, source__demo=None).fingerprint("notes")


def test_a_setting_that_is_not_read_makes_nothing_stale(tmp_path: Path) -> None:
    """Validations decide which weights are saved only with `select: best` or `patience`. Written out in the default's
    words, a setting changes nothing; and the fingerprints are those of before the settings were there.
    """
    base = _catalog(tmp_path)
    defaults = {"training__select": "last", "training__patience": None, "training__num_epochs": None}
    assert _changed(base, _catalog(tmp_path, **defaults)) == set()
    assert _changed(base, _catalog(tmp_path, training__validate_every_steps=5)) == set()
    assert "training.num_epochs" not in base.settings("checkpoint")
    for name, value in (("select", "best"), ("patience", 3)):
        chosen = _catalog(tmp_path, **{f"training__{name}": value})
        assert _changed(base, chosen) == _downstream("checkpoint")
        every = {f"training__{name}": value, "training__validate_every_steps": 5}
        assert _changed(chosen, _catalog(tmp_path, **every)) == _downstream("checkpoint")
    epochs = _catalog(tmp_path, training__num_steps=None, training__num_epochs=2)
    assert _changed(base, epochs) == _downstream("checkpoint")


def test_hard_negatives_of_ones_own_are_known_by_their_content(tmp_path: Path) -> None:
    """Neither the file's name nor its time counts, nor the model that would mine."""
    file = tmp_path / "mine.csv"
    file.write_text("note_id,negative_id\n1,2\n")

    def given(path: Path, **more: object) -> Catalog:
        return _catalog(tmp_path, training__hard_negatives={"num": 1, "file": str(path)}, **more)

    before = given(file)
    assert _changed(_catalog(tmp_path), before) == _downstream("hard_negatives")
    assert set(before.settings("hard_negatives")) == {"training.hard_negatives.file"}
    assert before._inputs("hard_negatives") == ("pair_datasets", "note_split")
    assert _changed(before, given(file.rename(tmp_path / "moved.csv"))) == set()
    file.write_text("note_id,negative_id\n1,3\n")
    assert _changed(before, given(file)) == _downstream("hard_negatives")
    with pytest.raises(ValueError, match=r"training.hard_negatives.file = .*/none.csv cannot be read: No such file"):
        given(tmp_path / "none.csv").fingerprint("hard_negatives")


def test_other_weights_of_the_same_name_are_other_datasets(tmp_path: Path) -> None:
    """A rewritten folder or file, or another package version, changes fingerprints; a model of a hub is not checked."""
    llm, vision = tmp_path / "llm", tmp_path / "vision.pt"
    llm.mkdir()
    (llm / "model.safetensors").write_text("a")
    vision.write_text("a")
    changes = {"model__llm__name": str(llm), "model__vision__pretrained": str(vision)}
    before = {name: _catalog(tmp_path, **changes).fingerprint(name) for name in STAGES}

    def changed() -> set[str]:
        return {n for n in STAGES if _catalog(tmp_path, **changes).fingerprint(n) != before[n]}

    assert changed() == set()
    (llm / "model.safetensors").write_text("ab")
    assert changed() == _downstream("note_tokens")
    vision.write_text("ab")
    assert changed() == _downstream("vision_features", "note_tokens")
    by_name = {"model__vision__library": "transformers", "model__vision__name": str(llm)}  # the name is a folder
    before = {name: _catalog(tmp_path, **(changes := by_name)).fingerprint(name) for name in STAGES}
    (llm / "model.safetensors").write_text("abc")
    assert changed() == _downstream("vision_features")
    assert "weights" not in _catalog(tmp_path, model__llm__name="org/name").settings("checkpoint")
    assert _catalog(tmp_path, model__llm__name="package:smollm2").settings("checkpoint")["weights"]["model.llm"]


def test_a_package_that_reads_more_images_makes_the_features_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notellm2_core.lake.catalog.optional_formats", list)
    before = _catalog(tmp_path)
    assert _changed(before, _catalog(tmp_path)) == set()
    monkeypatch.setattr("notellm2_core.lake.catalog.optional_formats", lambda: ["HEIF"])
    assert _changed(before, _catalog(tmp_path)) == _downstream("vision_features")


def test_a_missing_dataset_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDataset, match="^note_embeddings has not been made yet .* run: make recall"):
        _catalog(tmp_path).inputs("eval_recall")
    with pytest.raises(ValueError, match=r"source.path .*/nowhere is not a folder"):
        _catalog(tmp_path, source__path=str(tmp_path / "nowhere")).fingerprint("notes")


def test_weeks_run_from_sunday_and_only_a_covered_week_is_complete() -> None:
    """2025-01-05 is a Sunday. A week is complete if its Saturday is covered."""
    assert first_day_of_week(date(2025, 1, 5)) == date(2025, 1, 5)
    assert first_day_of_week(date(2025, 1, 11)) == date(2025, 1, 5)
    friday, saturday, sunday = date(2025, 1, 10), date(2025, 1, 11), date(2025, 1, 12)
    assert last_complete_week_end(friday) == date(2025, 1, 5)
    assert last_complete_week_end(saturday) == last_complete_week_end(sunday) == sunday


def test_windows(tmp_path: Path) -> None:
    """The test days end the window, the training days precede them. A named week ends the window with its Saturday."""
    window = _catalog(tmp_path).window
    assert (window.test.start, window.test.end) == (date(2025, 1, 19), date(2025, 1, 26))
    assert (window.train.start, window.train.end) == (date(2025, 1, 5), date(2025, 1, 19))
    named = Catalog(load_config(TINY, {"lake": str(tmp_path)}), week=date(2025, 1, 15)).window
    assert named.test.end == date(2025, 1, 19)
    one = Catalog(load_config(TINY, {"window.end": "2025-01-26", "window.test_days": None, "split.by": "hash"})).window
    assert one.train == one.test


def test_datasets_under_earlier_names_are_reported_in_one_sentence(tmp_path: Path) -> None:
    assert _catalog(tmp_path).warnings() == []
    (tmp_path / "events" / "0123").mkdir(parents=True)
    (tmp_path / "start_model").mkdir()
    (sentence,) = _catalog(tmp_path).warnings()
    assert sentence.endswith("not read: events (interactions now), start_model (initial_model now)")
    assert str(tmp_path) in sentence and "\n" not in sentence


def _promote(catalog: Catalog, release: str, week: str, model: str = "", lift: float = 3.0) -> None:
    catalog.lake.path("release", release).mkdir(parents=True, exist_ok=True)
    catalog.ledger.decide("promoted", Subject(release, model or release, week), "", figures={"image_lift": lift})


def test_rivals_and_the_start_are_those_of_the_run_and_of_earlier_weeks(tmp_path: Path) -> None:
    """The window ends with the week of 2025-01-19."""
    warm = {"training__start_from": "champion"}
    assert (_catalog(tmp_path).rivals, _catalog(tmp_path, **warm).start) == ({}, None)
    cold_checkpoint = _catalog(tmp_path).fingerprint("checkpoint")
    running = Catalog(_catalog(tmp_path).config, run_id="r")
    assert running.rivals == {}
    _promote(running, "first", "2025-01-12", lift=2.0)
    _promote(running, "second", "2025-01-19", lift=4.0)
    now = _catalog(tmp_path)
    assert now.rivals == {"champion": "second", "anchor": "first"} and now.past("image_lift") == [2.0, 4.0]
    assert now.fingerprint("checkpoint") == cold_checkpoint and "start" not in now.settings("checkpoint")
    assert Catalog(now.config, run_id="r").rivals == {}  # the run sees the ledger as it was
    assert _catalog(tmp_path, **warm).start == "first"  # of an earlier week
    assert _catalog(tmp_path, **warm).settings("checkpoint")["start"] == "first"


def test_a_champion_whose_folder_is_gone_stops_a_run_with_what_helps(tmp_path: Path) -> None:
    catalog = _catalog(tmp_path)
    catalog.require_champion()  # there is none yet
    _promote(catalog, "first", "2025-01-12")
    _catalog(tmp_path).require_champion()
    catalog.lake.path("release", "first").rmdir()
    with pytest.raises(ValueError, match="first, is no longer at .*restore it from a backup, or make another one live"):
        _catalog(tmp_path).require_champion()


def test_a_champion_is_no_rival_of_its_own_model(tmp_path: Path) -> None:
    """A week that is run again after its promotion has the addresses of its first run."""
    catalog = _catalog(tmp_path)
    _promote(catalog, "first", "2025-01-12")
    before = _catalog(tmp_path).fingerprint("release")
    _promote(catalog, "second", "2025-01-19", model=catalog.fingerprint("checkpoint"))
    assert _catalog(tmp_path).rivals == {"champion": "first"}
    assert _catalog(tmp_path).fingerprint("release") == before


def _ingested(lake: Path, first_day: str, covered_until: str, **overrides: object) -> Config:
    config = load_config(TINY, {"lake": str(lake), **overrides})
    catalog = Catalog(config)
    with catalog.lake.publish("raw_events", catalog.fingerprint("raw_events"), {}, {}) as draft:
        draft.metrics |= {"first_day": first_day, "covered_until": covered_until}
    return config


def test_the_window_ends_with_the_partition_of_the_run(tmp_path: Path) -> None:
    config = _ingested(tmp_path, "2025-01-05", "2025-02-05")
    assert Catalog(config).window.test.end == date(2025, 2, 2)  # the last complete week
    catalog = Catalog(config, partition="2025-01-19")
    assert (catalog.window.test.start, catalog.window.test.end) == (date(2025, 1, 19), date(2025, 1, 26))
    assert catalog.window.last_week == date(2025, 1, 19) and catalog.command().endswith(" WEEK=2025-01-25")
    for partition in ("2025-02-02", "2024-12-22", "2026-11-22"):  # it is arriving; before and after the log
        with pytest.raises(
            ValueError, match=f"the log has no complete week {partition}: it reaches from 2025-01-05 to"
        ):
            _ = Catalog(config, partition=partition).window
    assert Catalog(config, week=date(2025, 1, 20), partition="2025-01-19").window == catalog.window
    with pytest.raises(ValueError, match="week = 2025-01-26 is not in 2025-01-19, the partition of this run"):
        Catalog(config, week=date(2025, 1, 26), partition="2025-01-19")


def test_a_fixed_window_fits_one_partition(tmp_path: Path) -> None:
    config = _ingested(tmp_path, "2025-01-05", "2025-02-05", **{"window.end": "2025-01-26"})
    assert Catalog(config, partition="2025-01-19").window.test.end == date(2025, 1, 26)
    with pytest.raises(ValueError, match="window.end = 2025-01-26 is not in 2025-01-12, the partition of this run"):
        _ = Catalog(config, partition="2025-01-12").window


def test_a_year_ends_with_its_last_complete_week(tmp_path: Path) -> None:
    config = _ingested(tmp_path, "2023-03-01", "2025-02-05", **{"source.partition": "year"})
    assert Catalog(config, partition="2024-01-01").window.test.end == date(2025, 1, 1)
    assert Catalog(config, partition="2025-01-01").window.test.end == date(2025, 2, 2)
