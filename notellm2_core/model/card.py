"""The model card: what stands in the README.md beside the weights. Pure text from facts. Imports no torch.

The facts lie in the model's folder (card.json), so that the card can be written again when more is known: the recall on
held-out notes comes after the training, and a package may have another layout.
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

CARD, CARD_FACTS = "README.md", "card.json"
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
    """The numbers of a built model. They are asked of its parts: every decoder's config.json has names of its own."""

    encoder_id: str  # of the vision encoder
    num_patches: int  # L
    vision_width: int  # h_v
    num_visual_words: int  # L_c; 0 where the prompt has no image
    num_layers: int  # of the LLM
    llm_width: int  # h_t, of its last states
    projection_dim: int  # d


def card_facts(
    config: Config,
    architecture: Architecture,
    sizes: Mapping[str, int],
    train_days: Sequence[str] | None,
    training: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the card says, JSON-able. sizes: how many numbers each parameter has, by name.

    train_days: first day and (exclusive) end of the log; None: not known. training: None for an untrained start.
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


def read_card_facts(model: Path) -> dict[str, Any]:
    """The facts in a model's folder. Raises ValueError where there are none."""
    try:
        facts: dict[str, Any] = json.loads((model / CARD_FACTS).read_text())
    except OSError as e:
        raise ValueError(f"{model} holds no {CARD_FACTS}; give the folder that the training command wrote.") from e
    except ValueError as e:
        raise ValueError(f"{model / CARD_FACTS} is not readable as JSON ({e}); copy the model again.") from e
    return facts


def model_card(facts: Mapping[str, Any], recall: str | None = None, layout: Layout = "huggingface") -> str:
    """The card in the form of the hub. `facts`: of `card_facts`; `recall`: the table of the report, in Markdown."""
    training = facts["training"]
    sections = {
        "Use": _use(facts, layout),
        "Method": _method(facts),
        "Sizes": _table({**facts["shapes"], **{f"{k}, parameters": f"{v:,}" for k, v in facts["parameters"].items()}}),
        "Training data": _data(facts),
        "Training": _table(training) if training else "None: this is the model before its first step.",
        "Recall on held-out notes": recall
        or "Not measured here; `eval_recall` and `notellm2 package --report` add it.",
        "Licence": _licence(facts["license"]),
    }
    text = "\n\n".join(f"## {title}\n\n{body.strip()}" for title, body in sections.items())
    return f"---\n{_front_matter(facts, layout)}---\n\n# {facts['name']}\n\n{_summary(facts)}\n\n{text}\n"


def write_card(model: Path, license: str | None, recall: Path, out: Path) -> None:
    """Write the card of the model in `model` to `out`, with this license and the recall table in the file `recall`."""
    out.write_text(model_card(read_card_facts(model) | {"license": license}, recall.read_text()))


def _front_matter(facts: Mapping[str, Any], layout: Layout) -> str:
    library, pipeline = _LIBRARY[layout]
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline}
    front |= {"license": facts["license"]} if facts["license"] else {"license": "other", "license_name": "not-stated"}
    if facts["base_model"]:
        front["base_model"] = facts["base_model"]
    front["tags"] = ["notellm2", facts["method"]["name"], "multimodal", "item-to-item", "retrieval", "recommendation"]
    return yaml.safe_dump({**front, "tags": list(dict.fromkeys(front["tags"]))}, sort_keys=False)


def _summary(facts: Mapping[str, Any]) -> str:
    return (
        f"Embeddings of multimodal notes (title, topics, content, image) for item-to-item recall, after "
        f"[NoteLLM-2]({PAPER}). {facts['shapes']['embedding']} numbers, compared by cosine."
    )


def _use(facts: Mapping[str, Any], layout: Layout) -> str:
    code = _USE[layout].replace("{dim}", str(facts["shapes"]["embedding"]))
    what = "`pip install` notellm2-pipeline first. An image is a path, bytes, a PIL image or None."
    return f"```python\n{code}\n```\n\n{what} `notellm2 embed --model FOLDER --notes PATH --out DIR` embeds tables."


def _method(facts: Mapping[str, Any]) -> str:
    method, vision = facts["method"], facts["vision"]
    switches = {k: ", ".join(v) if isinstance(v, list | tuple) else v for k, v in method.items() if k != "name"}
    state = "trained" if vision.get("trained") else "frozen"
    encoder = f"{vision['library']} {vision['name']}" + (f" ({vision['pretrained']})" if vision["pretrained"] else "")
    return _table(
        {
            "method": method["name"],
            **{k.replace("_", " "): v for k, v in switches.items()},
            "LLM": f"{facts['llm']['name']}, {facts['llm']['num_layers']} layers",
            f"vision encoder ({state})": f"{encoder}, checksum {vision['encoder_id']}",
            **{f"{k.replace('_', ' ')} read": v for k, v in facts["text"].items()},
        }
    )


def _data(facts: Mapping[str, Any]) -> str:
    days = facts["train_days"]
    window = (
        f"Logs from {days[0]} to {days[1]} (exclusive, UTC)." if days else "The days of the logs were not recorded."
    )
    pairs = facts["training"] or {}
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
