import math

import torch

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


def test_a_closed_gate_keeps_the_llms_state() -> None:
    fusion = LateFusion(vision_width=3, llm_width=4)
    torch.nn.init.constant_(fusion.gate.bias, -100.0)
    v, n = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(fusion(v, n)[0], n)
    torch.nn.init.constant_(fusion.gate.bias, 100.0)
    torch.testing.assert_close(fusion(v, n)[0], v)


def test_sizes_are_the_papers() -> None:
    """Gate 2 x 4,096 -> 4,096 with bias, v's linear layer 768 -> 4,096."""
    with torch.device("meta"):
        fusion = LateFusion(768, 4096)
    assert sum(p.numel() for p in fusion.gate.parameters()) == 2 * 4096 * 4096 + 4096
    assert sum(p.numel() for p in fusion.visual.parameters()) == 768 * 4096 + 4096
