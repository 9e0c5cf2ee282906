import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from notellm2_core.config.model import ConnectorSettings
from notellm2_core.model.connector import Connector, QFormer

BASE, BIGG = ConnectorSettings(), ConnectorSettings(hidden_size=1536)


@pytest.mark.parametrize(("settings", "vision_width", "expected"), [(BASE, 768, 49_620_480), (BIGG, 1664, 142_869_504)])
def test_parameter_counts_are_the_papers(settings: ConnectorSettings, vision_width: int, expected: int) -> None:
    """Table 9 counts all parameters except the queries (16 h). With width h, inner width f and encoder width e:

    self-attention     4 (h h + h) + 2 h                    h = 768: 2,363,904     h = 1536:  9,446,400
    cross-attention    2 (h h + h) + 2 (e h + h) + 2 h      e = 768: 2,363,904     e = 1664:  9,839,616
    feed-forward       (h f + f) + (f h + h) + 2 h         f = 3072: 4,723,968     f = 3072:  9,444,864
    6 layers, cross-attention in 0, 2 and 4: 6 x (2,363,904 + 4,723,968) + 3 x 2,363,904 = 49,618,944, and
    6 x (9,446,400 + 9,444,864) + 3 x 9,839,616 = 142,866,432; the normalisation of the queries adds 2 h.
    """
    with torch.device("meta"):
        qformer = QFormer(settings, vision_width)
    assert sum(p.numel() for p in qformer.parameters()) - qformer.queries.numel() == expected
    assert qformer.queries.numel() == 16 * settings.hidden_size


def test_parity_with_blip2() -> None:
    """The same weights in transformers' Q-Former give the same output and the same gradients."""
    torch.manual_seed(0)
    sizes = {"num_queries": 5, "num_layers": 3, "hidden_size": 24, "num_heads": 4, "intermediate_size": 48}
    ours = QFormer(ConnectorSettings(**sizes), vision_width=10)
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            cross_attention_frequency=2, encoder_hidden_size=10, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, use_qformer_text_input=False,
        )
    )  # fmt: skip
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for n, p in ours.named_parameters()) - 5 * 24
    pairs = {"layernorm": "norm"}
    for i in range(3):
        for part in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            mine = {"attention": "self_attention", "crossattention": "cross_attention"}[part]
            base = f"encoder.layer.{i}.{part}"
            for name in ("query", "key", "value"):
                pairs[f"{base}.attention.{name}"] = f"layers.{i}.{mine}.{name}"
            pairs[f"{base}.output.dense"] = f"layers.{i}.{mine}.output"
            pairs[f"{base}.output.LayerNorm"] = f"layers.{i}.{mine}.norm"
        pairs[f"encoder.layer.{i}.intermediate_query.dense"] = f"layers.{i}.feed_forward.intermediate"
        pairs[f"encoder.layer.{i}.output_query.dense"] = f"layers.{i}.feed_forward.output"
        pairs[f"encoder.layer.{i}.output_query.LayerNorm"] = f"layers.{i}.feed_forward.norm"
    torch.nn.init.normal_(ours.norm.weight)
    weights = {
        f"{t}.{k}": ours.get_parameter(f"{o}.{k}").detach().clone()
        for t, o in pairs.items()
        for k in ("weight", "bias")
    }
    theirs.load_state_dict(weights)

    patches = torch.randn(2, 7, 10)
    target = torch.randn(2, 5, 24)
    mine = ours(patches)
    reference = theirs.eval()(
        query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=patches
    ).last_hidden_state
    torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
    (mine * target).sum().backward()
    (
        theirs(query_embeds=ours.queries.detach().expand(2, -1, -1), encoder_hidden_states=patches).last_hidden_state
        * target
    ).sum().backward()
    for t, o in pairs.items():
        torch.testing.assert_close(
            theirs.get_parameter(f"{t}.weight").grad, ours.get_parameter(f"{o}.weight").grad, atol=1e-4, rtol=1e-4
        )


def test_queries_differ_and_the_order_of_patches_does_not_matter() -> None:
    """The queries are drawn from N(0, 0.02): 16 x 768 draws have a standard deviation within 2 % of it."""
    torch.manual_seed(0)
    connector = Connector(ConnectorSettings(num_layers=1, intermediate_size=64), vision_width=8, llm_width=32)
    assert connector.qformer.queries.std().item() == pytest.approx(0.02, rel=0.02)
    patches = torch.randn(1, 9, 8)
    out = connector(patches)
    assert out.shape == (1, 16, 32)
    assert torch.pdist(out[0]).min() > 0
    torch.testing.assert_close(connector(patches.flip(1)), out, atol=1e-6, rtol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    sizes = {"num_queries": 2, "num_layers": 2, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16}
    settings = ConnectorSettings(**sizes, cross_attention_every=1, dropout=0.5)
    connector = Connector(settings, vision_width=4, llm_width=8)
    patches = torch.randn(1, 3, 4)
    assert not torch.equal(connector(patches), connector(patches))
    connector.eval()
    assert torch.equal(connector(patches), connector(patches))
