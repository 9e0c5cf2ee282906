"""Late fusion (Eq. 7): a gate mixes the global image feature into a compressed word, dimension by dimension."""

import torch
from torch import Tensor, nn

from notellm2_core.model.connector import init_linear


class LateFusion(nn.Module):
    """v = Linear(global image feature) and one gate, shared by n_v and n_m.

    Shapes: N notes, h_v the vision encoder's width, h_t the LLM's.
    """

    def __init__(self, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.visual = nn.Linear(vision_width, llm_width)
        self.gate = nn.Linear(2 * llm_width, llm_width)  # W and b
        self.apply(init_linear)

    def project(self, global_feature: Tensor) -> Tensor:
        """v: [N, h_v] -> [N, h_t]."""
        return self.visual(global_feature)

    def forward(self, v: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 7: z = sigmoid(W [v, n] + b); n^ = z * v + (1 - z) * n.

        v and n [N, h_t]; returns (n^ [N, h_t], z [N, h_t]).
        """
        z = torch.sigmoid(self.gate(torch.cat([v, n], dim=-1)))
        return z * v + (1 - z) * n, z
