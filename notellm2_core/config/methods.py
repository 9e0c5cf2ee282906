"""The methods of Table 4, by the paper's names, with the switches that define them. A new method is one row here."""

from dataclasses import dataclass
from typing import Literal

PromptName = Literal["basic", "micl", "text"]
InputKind = Literal["multimodal", "image", "text"]  # what the model reads of a note
LossName = Literal["multimodal", "visual", "omni"]


@dataclass(frozen=True)
class Method:
    """The switches of a method."""

    prompt: PromptName  # basic: one compressed word; micl: one for the image, one for the whole note; text: no image
    late_fusion: bool  # whether Eq. 7 mixes the global image feature into the compressed words
    losses: tuple[LossName, ...]  # multimodal: n_m (Eq. 1); visual: n_v (Eq. 8, 9); omni: each input with each

    @property
    def visual_prompt(self) -> bool:
        """Whether the prompt contains the visual embeddings E_v; without them the model needs no connector."""
        return self.prompt != "text"

    @property
    def inputs(self) -> tuple[InputKind, ...]:
        """The inputs that every note of a training batch is embedded with."""
        return ("multimodal", "image", "text") if "omni" in self.losses else ("multimodal",)


METHODS: dict[str, Method] = {
    "basic": Method(prompt="basic", late_fusion=False, losses=("multimodal",)),
    "micl": Method(prompt="micl", late_fusion=False, losses=("visual", "multimodal")),
    "late_fusion": Method(prompt="basic", late_fusion=True, losses=("multimodal",)),
    "notellm2": Method(prompt="micl", late_fusion=True, losses=("visual", "multimodal")),
    "only_late_fusion": Method(prompt="text", late_fusion=True, losses=("multimodal",)),
    "omni_retrieval": Method(prompt="basic", late_fusion=False, losses=("omni",)),
}


def get_method(name: str) -> Method:
    """The method called `name`. Raises ValueError listing the choices."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
