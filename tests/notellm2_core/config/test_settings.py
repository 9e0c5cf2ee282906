"""Every configuration in the repository loads. A wrong one is refused in one sentence that names the setting."""

from pathlib import Path

import pytest
import yaml

from notellm2_core.config.data import FilterSettings, PairSettings, ScoringSettings
from notellm2_core.config.load import ConfigError, load_config
from notellm2_core.config.methods import METHODS
from notellm2_core.config.settings import Config
from notellm2_core.config.training import PARTS
from notellm2_core.config.unused import unused_settings

CONFIGS = sorted(Path("pipelines/configs").rglob("*.yaml"), key=lambda p: (len(p.parts), p))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem and unused_settings(config) == []


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("paper_")], ids=lambda p: p.stem)
def test_the_defaults_are_the_papers(path: Path) -> None:
    """The defaults are those of Table 8 and section 2.3; all that the paper does not have is off."""
    config = load_config(path)
    training, pairs = config.training, config.pairs
    assert (training.learning_rate, training.weight_decay, training.betas, training.epsilon) == (
        3e-6, 1e-3, (0.9, 0.999), 1e-8,
    )  # fmt: skip
    assert (training.num_steps, training.batch_pairs, training.warmup_ratio, training.max_grad_norm) == (
        7956, 128, 0.1, 1,
    )  # fmt: skip
    assert (training.precision, training.zero_stage, training.alpha) == ("bf16", 3, 9)
    assert (pairs.low, pairs.up, pairs.top_t, pairs.popularity_power) == (0.01, 30, 3, 0)
    assert (config.text.title_words, config.text.content_words, config.text.short_tokens, config.text.long_tokens) == (
        20, 80, 50, 165,
    )  # fmt: skip
    assert (config.window.train_days, config.window.test_days, config.split.validation_share) == (14, 7, 0.1)
    assert (config.model.connector.num_queries, config.model.projection_dim, config.model.temperature) == (16, 64, 3)
    start = config.model.init
    assert (start.pca_projector, start.fusion_scale, start.gate_bias, start.visual_token_gain) == (False, None, 0, None)
    assert (config.model.lora, config.model.matryoshka_dims, config.training.trainable) == (None, (), None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training: {num_step: 3}", "training.num_step: no such setting$"),
        ("training: {parts: [llm]}", "training.parts: no such setting; it is called training.trainable now"),
        (
            "model: {llm: {name: tiny}, start: {gate_bias: 1}}",
            "model.start: no such setting; it is called model.init now",
        ),
        ("training: {num_steps: many}", "training.num_steps"),
        (
            "training: {num_steps: 5, num_epochs: 2}",
            "training.num_steps = 5 and training.num_epochs = 2 are two ways to say how long to train: set one of them",
        ),
        ("training: {num_steps: null}", "training.num_steps = None and training.num_epochs = None are two ways"),
        ("pairs: {low: 3, up: 1}", "low = 3.0 is above up = 1.0"),
        ("pairs: {bounds: quantile, low: 0.1, up: 30}", "shares in"),
        ("pairs: {low: .nan}", "low = nan and up = 30.0 have to be numbers"),
        ("pairs: {swing_alpha: .inf}", "pairs.swing_alpha: Input should be a finite number"),
        ("window: {test_days: null}", "needs split.by = hash"),
        ("split: {by: user}", "split.by: Input should be 'time' or 'hash'"),
        ("training: {batch_pairs: 9, num_ranks: 2}", "not a multiple"),
        ("training: {batch_pairs: 6, num_nodes: 4, hostfile: x}", "not a multiple of training.num_ranks = 1 x 4 nodes"),
        ("training: {batch_pairs: 6, num_nodes: 2}", "several nodes need one of them"),
        ("training: {rendezvous: 'a:1'}", "a single one needs none"),
        (
            "training: {num_nodes: 2, rendezvous: 'a:1', hostfile: x}",
            "two ways to start several nodes: set one of them",
        ),
        ("training: {num_nodes: 2, rendezvous: a}", "training.rendezvous"),
        (
            "model: {llm: {name: tiny}, method: notelm}",
            "model.method: Value error, unknown method 'notelm'; choose one of basic, micl, late_fusion, notellm2, ",
        ),
        ("model: {llm: {name: tiny}, method: 2}", "model.method: Input should be a valid string"),
        ("source: {ignored_events: [share, click]}", "click is in ignored_events and in"),
        ("evaluation: {saliency_pairs: 1}", "a single pair has no negatives"),
        ("training: {trainable: []}", "training.trainable: Tuple should have at least 1 item"),
        (
            "training: {trainable: [llm, words]}",
            "training.trainable.1: Input should be 'llm', 'word_embeddings', 'connector'",
        ),
        ("model: {llm: {name: tiny}, lora: {rank: 0}}", "model.lora.rank: Input should be greater than 0"),
        ("model: {llm: {name: tiny}, lora: {ranks: 8}}", "model.lora.ranks: no such setting"),
        ("model: {llm: {name: tiny}, temperature: 5}", "model.temperature: Input should be less than or equal to 4.6"),
        ("model: {llm: {name: tiny}, temperature: .nan}", "model.temperature: Input should be"),
        ("model: {llm: {name: tiny}, matryoshka_dims: [8, 8]}", "names a number twice"),
        ("seed: [", "is not YAML"),
        ("on: 1", "Keys should be strings"),  # YAML reads `on` as true
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    model = "" if line.startswith("model") else "model: {llm: {name: tiny}}\n"
    path.write_text(f"name: c\n{model}{line}\n")
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_win() -> None:
    config = load_config(CONFIGS[0], {"source.path": "/data", "training.num_steps": 3})
    assert (config.source.path, config.training.num_steps) == ("/data", 3)


def test_a_group_is_cut_out_of_its_section() -> None:
    """The group has its values in the section, and none of the section's other settings."""
    pairs = PairSettings(low=0.5, score="swing")
    filters = FilterSettings.of(pairs)
    assert type(filters) is FilterSettings and filters == FilterSettings(low=0.5)
    assert not hasattr(filters, "score") and ScoringSettings.of(pairs) == ScoringSettings(score="swing")


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_a_method_does_not_read(method: str) -> None:
    """The switches of METHODS decide which settings have no effect."""
    switches = METHODS[method]
    config = Config(
        name="c",
        model={"llm": {"name": "tiny"}, "method": method, "init": {"gate_bias": -1, "visual_token_gain": 1}},
        training={"alpha": 3},
    )
    idle = {sentence.split()[0] for sentence in unused_settings(config)}
    assert ("model.init.gate_bias" in idle) == (not switches.late_fusion)
    assert ("model.init.visual_token_gain" in idle) == (not switches.visual_prompt)
    assert ("training.alpha" in idle) == ("visual" not in switches.losses)


def test_sizes_that_no_connector_reads() -> None:
    """`linear` reads no size of a Q-Former, `only_late_fusion` has no connector. No setting measures notes."""
    sizes = {"num_layers": 2, "hidden_size": 96, "num_heads": 4}
    for method, cause in (("basic", "model.connector.kind = linear"), ("only_late_fusion", "model.method = only_late")):
        connector = {"kind": "linear" if method == "basic" else "qformer", **sizes}
        model = {"llm": {"name": "tiny"}, "method": method, "connector": connector, "init": {"num_pca_notes": 9}}
        warnings = unused_settings(Config(name="c", model=model))  # type: ignore[arg-type]
        assert [warning.split()[0].rpartition(".")[2] for warning in warnings] == ["num_pca_notes", *sizes]
        assert all(cause in warning for warning in warnings[1:])
    centred = unused_settings(Config(name="c", model=model, training={"centre_embeddings": True}))  # type: ignore[arg-type]
    assert len(centred) == len(sizes)  # num_pca_notes is read


def test_centred_embeddings_do_not_go_with_every_method() -> None:
    model = {"llm": {"name": "tiny"}, "vision": {"name": "tiny"}, "method": "omni_retrieval"}
    with pytest.raises(ValueError, match=r"centre_embeddings = true does not go with model\.method = omni_retrieval"):
        Config(name="c", model=model, training={"centre_embeddings": True})  # type: ignore[arg-type]


def test_a_setting_without_effect_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    model = "model: {llm: {name: tiny}, method: basic, init: {gate_bias: -1}}"
    training = "training: {hard_negatives: {model: earlier}}"
    path.write_text(f"name: c\nsplit: {{pool_share: 0.2}}\n{model}\n{training}\n")
    assert unused_settings(load_config(path)) == [
        "split.pool_share has no effect with split.by = time",
        "model.init.gate_bias has no effect with model.method = basic",
        "training.hard_negatives.model has no effect with training.hard_negatives.num = 0",
    ]


def test_settings_that_swing_does_not_read() -> None:
    order = {"pairs.max_minutes": 30, "pairs.half_life_days": 7, "source.event_weights": {"click": 2}}
    assert unused_settings(load_config(CONFIGS[0], order)) == []
    assert unused_settings(load_config(CONFIGS[0], order | {"pairs.score": "swing"})) == [
        f"{name} has no effect with pairs.score = swing" for name in order
    ]
    for weights in ({"source.columns": {"weight": "price"}}, {"source.events": {"columns": {"weight": "price"}}}):
        assert unused_settings(load_config(CONFIGS[0], weights | {"pairs.score": "swing"})) == [
            "source.columns.weight has no effect with pairs.score = swing"
        ]


def test_hard_negatives_of_ones_own_need_no_mining(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: c\nmodel: {llm: {name: tiny}}\ntraining: {hard_negatives: {num: 1, file: mine.csv, first_rank: 3}}\n"
    )
    assert unused_settings(load_config(path)) == [
        "training.hard_negatives.first_rank has no effect with training.hard_negatives.file = mine.csv"
    ]


def test_epochs_replace_the_default_number_of_steps(tmp_path: Path) -> None:
    """A configuration that is written out in full, as for a command, can be read again."""
    path = tmp_path / "c.yaml"
    path.write_text("name: c\nmodel: {llm: {name: tiny}}\ntraining: {num_epochs: 3}\n")
    config = load_config(path)
    assert (config.training.num_steps, config.training.num_epochs) == (None, 3)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_which_parts_are_trained() -> None:
    """All parts are trained by default, with LoRA all except the word embeddings. Named parts have a fixed order."""
    assert load_config(CONFIGS[0], {"training.trainable": None}).trainable_parts == PARTS
    with_lora = load_config(CONFIGS[0], {"training.trainable": None, "model.lora": {}})
    assert with_lora.trainable_parts == tuple(part for part in PARTS if part != "word_embeddings")
    named = load_config(
        CONFIGS[0], {"training.trainable": ["projector", "word_embeddings", "projector"], "model.lora": {}}
    )
    assert named.trainable_parts == named.training.trainable == ("word_embeddings", "projector")


def test_parts_without_effect_are_reported() -> None:
    parts = {"training.trainable": ["connector", "fusion"], "training.temperature_learning_rate": 1e-3}
    config = load_config(CONFIGS[0], {"model.method": "basic", "model.init": {}, "model.lora": {}, **parts})
    assert unused_settings(config) == [
        "model.lora has no effect: training.trainable does not name llm",
        "training.temperature_learning_rate has no effect: training.trainable does not name temperature",
        "fusion in training.trainable has no effect with model.method = basic",
    ]
    rates = {"training.trainable": ["llm"], "training.temperature_learning_rate": None}
    assert unused_settings(load_config(CONFIGS[0], rates)) == [
        "training.new_module_learning_rate has no effect: training.trainable does not name connector or fusion or "
        "projector"
    ]
