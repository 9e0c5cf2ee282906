"""Warns of settings that were changed and that nothing reads, before a run and not after it."""

from functools import reduce

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.config.training import MiningSettings, Part


def unused_settings(config: Config) -> list[str]:
    """One sentence for each setting that differs from its default and that nothing reads."""
    model, method, kind = config.model, get_method(config.model.method), config.model.connector.kind
    by_method, by_score = f" with model.method = {model.method}", f" with pairs.score = {config.pairs.score}"
    measuring = model.init.pca_projector, model.init.fusion_scale, model.init.visual_token_gain
    measures_notes = any(measuring) or config.training.centre_embeddings
    negatives = config.training.hard_negatives

    def untrained(*parts: Part) -> str:
        is_trained = not {*parts}.isdisjoint(config.trainable_parts)
        return "" if is_trained else f": training.trainable does not name {' or '.join(parts)}"

    # The end of the sentence "... has no effect": why a setting is not read; "" if it is read.
    no_fusion = "" if method.late_fusion else by_method
    no_connector = "" if method.visual_prompt else by_method
    no_qformer = no_connector or ("" if kind == "qformer" else f" with model.connector.kind = {kind}")
    no_measurement = "" if measures_notes else ": no setting that measures notes is on"
    no_swing, no_order = ("", by_score) if config.pairs.score == "swing" else (by_score, "")
    no_negatives = "" if negatives.num else f" with training.hard_negatives.num = {negatives.num}"
    no_mining = "" if negatives.file is None else f" with training.hard_negatives.file = {negatives.file}"
    causes = {
        "pairs.swing_alpha": no_swing,
        "pairs.swing_max_users": no_swing,
        "pairs.simultaneous": no_order,
        "pairs.max_minutes": no_order,
        "pairs.half_life_days": no_order,
        "source.event_weights": no_order,
        "split.pool_share": "" if config.split.by == "hash" else f" with split.by = {config.split.by}",
        "model.init.fusion_scale": no_fusion,
        "model.init.gate_bias": no_fusion,
        "model.init.visual_token_gain": no_connector,
        "model.init.num_pca_notes": no_measurement,
        **{f"model.connector.{n}": no_qformer for n in type(model.connector).model_fields if n != "kind"},
        "model.connector.kind": no_connector,
        "training.alpha": "" if "visual" in method.losses else by_method,
        "model.lora": untrained("llm"),
        **{f"training.hard_negatives.{n}": no_negatives or no_mining for n in MiningSettings.model_fields},
        "training.hard_negatives.file": no_negatives,
        "training.new_module_learning_rate": untrained("connector", "fusion", "projector"),
        "training.temperature_learning_rate": untrained("temperature"),
    }
    missing_parts: dict[Part, str] = {"fusion": no_fusion, "connector": no_connector}
    trainable = config.training.trainable or ()
    weights = ["source.columns.weight"] if no_order and config.source.has_weights else []
    return [
        *(f"{name} has no effect{no_order}" for name in weights),
        *(f"{name} has no effect{cause}" for name, cause in causes.items() if cause and _is_changed(config, name)),
        *(
            f"{part} in training.trainable has no effect{cause}"
            for part, cause in missing_parts.items()
            if cause and part in trainable
        ),
    ]


def _is_changed(config: Config, name: str) -> bool:
    """Whether the value of a setting differs from its default."""
    *sections, key = name.split(".")
    section = reduce(getattr, sections, config)
    return bool(getattr(section, key) != type(section).model_fields[key].default)
