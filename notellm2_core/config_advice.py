"""Settings that were changed and that nothing reads: what a user should hear before a run, not after it."""

from notellm2_core.config import Config
from notellm2_core.config_training import Part
from notellm2_core.model.methods import get_method


def without_effect(config: Config) -> list[str]:
    """What was changed from its default and nothing reads, one sentence each."""
    model, method, kind = config.model, get_method(config.model.method), config.model.connector.kind
    no_fusion = not method.late_fusion, f"model.method = {model.method}"
    no_connector = not method.visual_prompt, f"model.method = {model.method}"
    no_visual_loss = "visual" not in method.losses, f"model.method = {model.method}"
    no_qformer = kind != "qformer", f"model.connector.kind = {kind}"
    sizes = [name for name in type(model.connector).model_fields if name != "kind"]
    measured = (model.start.pca_projector, model.start.fusion_scale, model.start.visual_token_gain)
    no_measure = not any(measured), "model.start without anything that is measured"
    by_time = config.split.by == "time", f"split.by = {config.split.by}"
    no_swing = config.pairs.score != "swing", f"pairs.score = {config.pairs.score}"
    no_order = config.pairs.score == "swing", f"pairs.score = {config.pairs.score}"
    negatives = config.training.hard_negatives
    no_negatives = not negatives.num, f"training.hard_negatives.num = {negatives.num}"
    sections = {
        "pairs": config.pairs, "split": config.split, "model": model, "model.start": model.start,
        "model.connector": model.connector, "training": config.training, "training.hard_negatives": negatives,
    }  # fmt: skip

    def untrained(*parts: Part) -> tuple[bool, str]:
        return {*parts}.isdisjoint(config.trained_parts), f"training.parts without {', '.join(parts)}"

    idle = {
        ("pairs", "swing_alpha"): no_swing,
        ("pairs", "swing_max_users"): no_swing,
        ("pairs", "simultaneous"): no_order,
        ("split", "pool_share"): by_time,
        ("model.start", "fusion_scale"): no_fusion,
        ("model.start", "gate_bias"): no_fusion,
        ("model.start", "visual_token_gain"): no_connector,
        ("model.start", "num_pca_notes"): no_measure,
        **{("model.connector", name): no_connector if no_connector[0] else no_qformer for name in sizes},
        ("model.connector", "kind"): no_connector,
        ("training", "alpha"): no_visual_loss,
        ("model", "lora"): untrained("llm"),
        **{("training.hard_negatives", n): no_negatives for n in type(negatives).model_fields if n != "num"},
        ("training", "new_module_learning_rate"): untrained("connector", "fusion", "projector"),
        ("training", "temperature_learning_rate"): untrained("temperature"),
    }
    told = [
        f"{section}.{name} has no effect with {cause}"
        for (section, name), (holds, cause) in idle.items()
        if holds and getattr(sections[section], name) != type(sections[section]).model_fields[name].default
    ]
    lacking: tuple[tuple[Part, tuple[bool, str]], ...] = (("fusion", no_fusion), ("connector", no_connector))
    told += [
        f"{part} in training.parts has no effect with {cause}"
        for part, (holds, cause) in lacking
        if holds and part in (config.training.parts or ())
    ]
    return told
