"""The connector C_pi: patch features -> L_c visual embeddings, by a Q-Former (Table 9) and a two-layer MLP.

For ablation, `mlp` and `linear` map every patch by itself, so L_c = L (after LLaVA-1.5, Liu et al. 2023).

Q-Former after BLIP-2 (Li et al. 2023), without its text branch: learnable queries attend to each other in every
layer, and to the patches in every `cross_attention_every`-th layer, the first included. Normalisation follows each
residual sum, as in BERT.

Shapes: N notes, L patches of width h_v, L_c queries of width h_q, h_t the LLM's width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from notellm2_core.config.model import ConnectorSettings

LAYER_NORM_EPS = 1e-12  # BERT's and BLIP-2's


class Attention(nn.Module):
    """Multi-head attention from `hidden_size` to `source_size`, with its residual and normalisation."""

    def __init__(self, settings: ConnectorSettings, source_size: int) -> None:
        super().__init__()
        self.num_heads = settings.num_heads
        self.dropout = settings.dropout
        self.query = nn.Linear(settings.hidden_size, settings.hidden_size)
        self.key = nn.Linear(source_size, settings.hidden_size)
        self.value = nn.Linear(source_size, settings.hidden_size)
        self.output = nn.Linear(settings.hidden_size, settings.hidden_size)
        self.norm = nn.LayerNorm(settings.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        """hidden [N, L_c, h_q] attends to source [N, S, source_size]; returns [N, L_c, h_q]."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, length, h_q / heads]

        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            heads(self.query(hidden)), heads(self.key(source)), heads(self.value(source)), dropout_p=dropout
        )
        mixed = self.output(mixed.transpose(1, 2).flatten(2))  # [N, L_c, h_q]
        return self.norm(hidden + F.dropout(mixed, self.dropout, self.training))


class FeedForward(nn.Module):
    """The two GELU-joined linear layers of a block, with their residual and normalisation."""

    def __init__(self, settings: ConnectorSettings) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.intermediate = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.output = nn.Linear(settings.intermediate_size, settings.hidden_size)
        self.norm = nn.LayerNorm(settings.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, L_c, h_q] -> [N, L_c, h_q]."""
        mixed = self.output(F.gelu(self.intermediate(hidden)))
        return self.norm(hidden + F.dropout(mixed, self.dropout, self.training))


class QFormerLayer(nn.Module):
    """Self-attention, in some layers cross-attention to the patches, then the feed-forward part."""

    def __init__(self, settings: ConnectorSettings, vision_width: int, has_cross_attention: bool) -> None:
        super().__init__()
        self.self_attention = Attention(settings, settings.hidden_size)
        self.cross_attention = Attention(settings, vision_width) if has_cross_attention else None
        self.feed_forward = FeedForward(settings)

    def forward(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """hidden [N, L_c, h_q], patches [N, L, h_v] -> [N, L_c, h_q]."""
        hidden = self.self_attention(hidden, hidden)
        if self.cross_attention is not None:
            hidden = self.cross_attention(hidden, patches)
        return self.feed_forward(hidden)


class QFormer(nn.Module):
    """L_c learnable queries that read the patches."""

    def __init__(self, settings: ConnectorSettings, vision_width: int) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.queries = nn.Parameter(torch.empty(1, settings.num_queries, settings.hidden_size))
        self.norm = nn.LayerNorm(settings.hidden_size, eps=LAYER_NORM_EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(settings, vision_width, has_cross_attention=i % settings.cross_attention_every == 0)
            for i in range(settings.num_layers)
        )
        # Not zeros: equal queries would stay equal.
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [N, L, h_v] -> [N, L_c, h_q]."""
        hidden = F.dropout(self.norm(self.queries), self.dropout, self.training)
        hidden = hidden.expand(len(patches), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, patches)
        return hidden


class Connector(nn.Module):
    """E_v = C_pi(Z_v): the Q-Former, then h_q -> h_t -> h_t with GELU between.

    The paper does not mention the MLP; the authors' code has it, and only with it do Table 7's totals come out.
    """

    def __init__(self, settings: ConnectorSettings, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.qformer = QFormer(settings, vision_width) if settings.kind == "qformer" else None
        width = settings.hidden_size if settings.kind == "qformer" else vision_width
        self.first = None if settings.kind == "linear" else nn.Linear(width, llm_width)
        self.last = nn.Linear(width if self.first is None else llm_width, llm_width)
        self.apply(init_linear)

    def forward(self, patches: Tensor) -> Tensor:
        """Z_v [N, L, h_v] -> E_v [N, L_c, h_t]."""
        hidden = patches if self.qformer is None else self.qformer(patches)  # [N, L_c, h_q or h_v]
        return self.last(hidden if self.first is None else F.gelu(self.first(hidden)))


def init_linear(module: nn.Module) -> None:
    """Linear layers start as in BERT and BLIP-2: weights N(0, 0.02), biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
