"""The model card, the README.md beside the weights: plain text, rendered from its fields. Imports no torch.

The fields are saved in the model's folder (card.json), so that the card can be rendered again later: the recall on
held-out notes comes after training, and a package may have another layout.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from notellm2_core import __version__
from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config

CARD, CARD_FIELDS = "README.md", "card.json"
Layout = Literal["huggingface", "sentence-transformers"]
PAPER = "https://doi.org/10.1145/3690624.3709440"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/model; no ./model and no ../model

_NOTE = '{"title": "Red kite", "topics": ["toys"], "content": "Flies well.", "image": "kite.jpg"}'
_USE: dict[Layout, str] = {
    "huggingface": f"""\
from notellm2_core.inference.embedder import Embedder

embedder = Embedder.from_pretrained("FOLDER")  # or a hub name
vectors = embedder.embed([{_NOTE}])  # [1, {{dim}}], unit length""",
    "sentence-transformers": f"""\
from notellm2_core.inference.sentence_transformer import sentence_transformer

model = sentence_transformer("FOLDER")  # a SentenceTransformer
vectors = model.encode([{_NOTE}, "a text is a note's content"])  # [2, {{dim}}]
scores = model.similarity(vectors, vectors)""",
}
_LIBRARY: dict[Layout, tuple[str, str]] = {  # library_name and pipeline_tag of the hub
    "huggingface": ("transformers", "feature-extraction"),
    "sentence-transformers": ("sentence-transformers", "sentence-similarity"),
}


@dataclass(frozen=True)
class Architecture:
    """The sizes of a built model, read from its modules, because every decoder's config.json has names of its own."""

    encoder_id: str  # of the vision encoder
    num_patches: int  # L
    vision_width: int  # h_v
    num_visual_words: int  # L_c; 0 if the prompt has no image
    num_layers: int  # of the LLM
    llm_width: int  # h_t, of its last states
    projection_dim: int  # d


def card_fields(
    config: Config,
    architecture: Architecture,
    sizes: Mapping[str, int],
    train_days: Sequence[str] | None,
    training: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The fields of the card, as JSON-able values. sizes: how many numbers each parameter has, by name.

    train_days: first day and (exclusive) end of the log; None: unknown. training: the metrics of the run; None for an
    untrained, initial model.
    """
    model, vision = config.model, config.model.vision
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        parts[name.partition(".")[0]] += size
    encoder_hub_name = vision.name.removeprefix("hf-hub:")
    return {
        "name": config.name,
        "version": __version__,
        "license": model.license,
        "method": {"name": model.method, **asdict(get_method(model.method))},
        "llm": {"name": model.llm.name, "num_layers": architecture.num_layers},
        "vision": {
            **vision.model_dump(exclude={"batch_size"}),
            "encoder_id": architecture.encoder_id,
            "trained": training is not None and config.trains_vision,
        },
        "base_model": [n for n in (model.llm.name, encoder_hub_name) if HUB_NAME.fullmatch(n) and not Path(n).exists()],
        "shapes": {
            "patches per image": architecture.num_patches,
            "vision width": architecture.vision_width,
            "visual tokens": architecture.num_visual_words,
            "LLM width": architecture.llm_width,
            "embedding": architecture.projection_dim,
        },
        "parameters": dict(parts),
        "text": {key: value for key, value in config.text.model_dump().items() if key.endswith("_words")},
        "train_days": list(train_days) if train_days else None,
        "training": dict(training) if training else None,
    }


def read_card_fields(model: Path) -> dict[str, Any]:
    """The card's fields from a model's folder. Raises ValueError if card.json is missing or damaged."""
    try:
        fields: dict[str, Any] = json.loads((model / CARD_FIELDS).read_text())
    except OSError as e:
        raise ValueError(f"{model} holds no {CARD_FIELDS}; give the folder that the training command wrote.") from e
    except ValueError as e:
        raise ValueError(f"{model / CARD_FIELDS} is not readable as JSON ({e}); copy the model again.") from e
    return fields


def model_card(fields: Mapping[str, Any], recall: str | None = None, layout: Layout = "huggingface") -> str:
    """The card in the format of the hub. `fields`: see `card_fields`; `recall`: the report's table, in Markdown."""
    training = fields["training"]
    sections = {
        "Use": _use(fields, layout),
        "Method": _method(fields),
        "Sizes": _table(
            {**fields["shapes"], **{f"{k}, parameters": f"{v:,}" for k, v in fields["parameters"].items()}}
        ),
        "Training data": _data(fields),
        "Training": _table(training) if training else "None: this is the model before its first step.",
        "Recall on held-out notes": recall
        or "Not measured here; `eval_recall` and `notellm2 package --report` add it.",
        "Licence": _licence(fields["license"]),
    }
    text = "\n\n".join(f"## {title}\n\n{body.strip()}" for title, body in sections.items())
    return f"---\n{_front_matter(fields, layout)}---\n\n# {fields['name']}\n\n{_summary(fields)}\n\n{text}\n"


def write_card(model: Path, license: str | None, recall: Path, out: Path) -> None:
    """Write the card of the model in the folder `model` to `out`, with `license` and the table in the file `recall`."""
    out.write_text(model_card(read_card_fields(model) | {"license": license}, recall.read_text()))


def _front_matter(fields: Mapping[str, Any], layout: Layout) -> str:
    library, pipeline = _LIBRARY[layout]
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline}
    front |= {"license": fields["license"]} if fields["license"] else {"license": "other", "license_name": "not-stated"}
    if fields["base_model"]:
        front["base_model"] = fields["base_model"]
    front["tags"] = ["notellm2", fields["method"]["name"], "multimodal", "item-to-item", "retrieval", "recommendation"]
    return yaml.safe_dump({**front, "tags": list(dict.fromkeys(front["tags"]))}, sort_keys=False)


def _summary(fields: Mapping[str, Any]) -> str:
    return (
        f"Embeddings of multimodal notes (title, topics, content, image) for item-to-item recall, after "
        f"[NoteLLM-2]({PAPER}). {fields['shapes']['embedding']} numbers, compared by cosine."
    )


def _use(fields: Mapping[str, Any], layout: Layout) -> str:
    code = _USE[layout].replace("{dim}", str(fields["shapes"]["embedding"]))
    what = "`pip install` notellm2-pipeline first. An image is a path, bytes, a PIL image or None."
    return f"```python\n{code}\n```\n\n{what} `notellm2 embed --model FOLDER --notes PATH --out DIR` embeds tables."


def _method(fields: Mapping[str, Any]) -> str:
    method, vision = fields["method"], fields["vision"]
    switches = {k: ", ".join(v) if isinstance(v, list | tuple) else v for k, v in method.items() if k != "name"}
    state = "trained" if vision.get("trained") else "frozen"
    encoder = f"{vision['library']} {vision['name']}" + (f" ({vision['pretrained']})" if vision["pretrained"] else "")
    return _table(
        {
            "method": method["name"],
            **{k.replace("_", " "): v for k, v in switches.items()},
            "LLM": f"{fields['llm']['name']}, {fields['llm']['num_layers']} layers",
            f"vision encoder ({state})": f"{encoder}, checksum {vision['encoder_id']}",
            **{f"{k.replace('_', ' ')} read": v for k, v in fields["text"].items()},
        }
    )


def _data(fields: Mapping[str, Any]) -> str:
    days = fields["train_days"]
    window = (
        f"Logs from {days[0]} to {days[1]} (exclusive, UTC)." if days else "The days of the logs were not recorded."
    )
    pairs = fields["training"] or {}
    if (start := pairs.get("start")) is not None:
        weeks = ", ".join(start["weeks"])
        window += f" Trained on from release {start['release']}, whose lineage trained on the weeks {weeks}."
    if "num_train_pairs" not in pairs:
        return window
    return (
        f"{window} {pairs['num_train_pairs']:,} pairs of {pairs['num_train_notes']:,} notes, and "
        f"{pairs['num_validation_pairs']:,} pairs for validation."
    )


def _licence(name: str | None) -> str:
    stated = f"`{name}` for the trained weights." if name else "None is stated for the trained weights."
    return f"{stated} The licences of the LLM and of the vision encoder that they were made from apply as well."


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|")

    return "\n".join(["| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items())])
