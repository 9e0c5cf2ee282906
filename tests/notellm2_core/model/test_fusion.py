import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.model.fusion import LateFusion


def test_worked_example() -> None:
    """Eq. 7 with h_t = 2: W = [[1, 0, 0, 1], [0, 0, 0, 0]], b = [0, ln 3], v = [2, 4], n = [-1, -2].

    First dimension: 1 * v_1 + 1 * n_2 + 0 = 0, z = 1/2, n^ = (2 - 1) / 2 = 0.5.
    Second: ln 3, z = 3/4, n^ = 0.75 * 4 + 0.25 * -2 = 2.5.
    """
    fusion = LateFusion(vision_width=3, llm_width=2)
    with torch.no_grad():
        fusion.gate.weight.copy_(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]]))
        fusion.gate.bias.copy_(torch.tensor([0, math.log(3)]))
    fused, z = fusion(torch.tensor([[2.0, 4.0]]), torch.tensor([[-1.0, -2.0]]))
    torch.testing.assert_close(z, torch.tensor([[0.5, 0.75]]))
    torch.testing.assert_close(fused, torch.tensor([[0.5, 2.5]]))


@given(n=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 10_000), scale=st.floats(0, 30))
@settings(max_examples=40)
def test_equals_a_loop_over_the_dimensions(n: int, width: int, seed: int, scale: float) -> None:
    """The reference is Eq. 7 per note and dimension in plain Python. Large weights, up to 30, saturate gates too."""
    torch.manual_seed(seed)
    fusion = LateFusion(vision_width=2, llm_width=width)
    with torch.no_grad():
        for p in fusion.gate.parameters():
            p.normal_(std=scale)
    v, state = torch.randn(n, width), torch.randn(n, width)
    fused, gate = fusion(v, state)
    weight, bias = fusion.gate.weight.tolist(), fusion.gate.bias.tolist()
    for i in range(n):
        joined = v[i].tolist() + state[i].tolist()
        for d in range(width):
            x = sum(w * u for w, u in zip(weight[d], joined, strict=True)) + bias[d]
            z = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
            assert gate[i, d].item() == pytest.approx(z, abs=1e-4)
            assert fused[i, d].item() == pytest.approx(z * v[i, d].item() + (1 - z) * state[i, d].item(), abs=1e-3)


def test_a_closed_gate_keeps_the_llms_state() -> None:
    fusion = LateFusion(vision_width=3, llm_width=4)
    torch.nn.init.constant_(fusion.gate.bias, -100.0)
    v, n = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(fusion(v, n)[0], n)
    torch.nn.init.constant_(fusion.gate.bias, 100.0)
    torch.testing.assert_close(fusion(v, n)[0], v)


def test_sizes_are_the_papers() -> None:
    """The gate is 2 x 4,096 -> 4,096 with bias, v's linear layer 768 -> 4,096."""
    with torch.device("meta"):
        fusion = LateFusion(768, 4096)
    assert sum(p.numel() for p in fusion.gate.parameters()) == 2 * 4096 * 4096 + 4096
    assert sum(p.numel() for p in fusion.visual.parameters()) == 768 * 4096 + 4096
