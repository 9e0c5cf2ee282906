"""What the model reads: a note in its prompt, and a batch of notes as tensors.

Shapes: N notes, T tokens of the longest, L_c visual embeddings, L patches of width h_v, M distinct images, S input side
in pixels.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedNote:
    """A note's tokens in their prompt."""

    token_ids: np.ndarray  # [T_i] int64, with L_c placeholders in place of the image
    image_start: int  # position of the first placeholder; -1 where the prompt has none
    visual_index: int  # position of the visual compressed word, before <IMG_EMB>; -1 where the prompt has none
    reads_image: bool  # False: an image of the note is left out

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class NoteBatch:
    """N notes as the model reads them."""

    input_ids: Tensor  # [N, T] int64
    attention_mask: Tensor  # [N, T] int64, 0 on padding
    image_mask: Tensor  # [N, T] bool, True at the L_c positions of the visual embeddings
    visual_index: Tensor  # [N] int64, the position of n_v; -1 where the prompt has none
    last_index: Tensor  # [N] int64, the position of n_m: the last token of the prompt
    patches: Tensor  # [N, L, h_v] fp32, zeros without image
    global_feature: Tensor  # [N, h_v] fp32, zeros without image
    has_image: Tensor  # [N] bool
    # Where the vision encoder is trained, the features are empty until `with_features` computes them from the pixels.
    pixels: Tensor | None = None  # [M, S, S, 3] uint8, distinct images, M >= 1
    image_index: Tensor | None = None  # [N] int64, each note's row in `pixels`; -1 without image

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "NoteBatch":
        """The batch on `device`."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors |= {name: value.to(device) for name, value in tensors.items() if value is not None}
        return NoteBatch(**tensors)
