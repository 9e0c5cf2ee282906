"""The methods of Table 4: a name of the paper -> the switches that make it. A new method is one row."""

from dataclasses import dataclass
from typing import Literal

from notellm2_core.notes.text import PromptName

LossName = Literal["multimodal", "visual"]


@dataclass(frozen=True)
class Method:
    """What distinguishes a method."""

    prompt: PromptName  # basic: one compressed word; micl: one for the image, one for the whole note
    late_fusion: bool  # whether Eq. 7 mixes the global image feature into the compressed words
    losses: tuple[LossName, ...]  # which representations are contrasted: n_m (Eq. 1) and n_v (Eq. 8), weighed by Eq. 9


METHODS: dict[str, Method] = {
    "basic": Method(prompt="basic", late_fusion=False, losses=("multimodal",)),
    "notellm2": Method(prompt="micl", late_fusion=True, losses=("visual", "multimodal")),
}


def get_method(name: str) -> Method:
    """The method called `name`. Raises ValueError listing the choices."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
