import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.llama import modeling_llama

from notellm2_core.model import kernels
from notellm2_core.model.kernels import fuse_kernels

SIZES = {
    "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512,
}  # fmt: skip
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def decoder(kind: str, **options: str) -> PreTrainedModel:
    torch.manual_seed(0)
    llm = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES | options))
    for name, weight in llm.named_parameters():
        if "norm" in name:  # else all are 1
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return llm


def states_and_gradients(llm: PreTrainedModel) -> dict[str, Tensor]:
    llm.zero_grad(set_to_none=True)
    ids = torch.arange(2 * 40).view(2, 40).to(llm.device) % 64
    states = llm(input_ids=ids, use_cache=False).last_hidden_state.float()
    (states * torch.linspace(-1, 1, states.shape[-1], device=llm.device)).sum().backward()
    return {"states": states.detach(), **{n: p.grad.float() for n, p in llm.named_parameters() if p.grad is not None}}


def test_a_cpu_keeps_the_decoders_own_code() -> None:
    llm = decoder("llama")
    expected = states_and_gradients(llm)["states"]
    assert not fuse_kernels(llm, CPU)
    assert torch.equal(states_and_gradients(llm)["states"], expected)


@pytest.mark.parametrize(("kind", "options"), [("gpt2", {}), ("llama", {"hidden_act": "gelu"})])
def test_what_no_kernel_is_known_for_keeps_its_own_code(kind: str, options: dict[str, str]) -> None:
    assert not fuse_kernels(decoder(kind, **options), GPU)


def test_without_liger_a_gpu_is_told_of_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    with pytest.warns(UserWarning, match="liger-kernel"):
        assert not fuse_kernels(decoder("llama"), GPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", sorted(kernels.KINDS))
def test_fused_kernels_compute_what_the_decoder_does(kind: str) -> None:
    """In fp32, states and the gradient of every weight; in bf16 as near to fp32 as the decoder's own code."""
    plain = decoder(kind).to(GPU)
    exact = states_and_gradients(plain)
    own = states_and_gradients(decoder(kind).to(GPU, torch.bfloat16))
    assert fuse_kernels(plain, GPU)
    in_bf16 = decoder(kind).to(GPU, torch.bfloat16)
    assert fuse_kernels(in_bf16, GPU)
    fused, half = states_and_gradients(plain), states_and_gradients(in_bf16)

    def error(of: dict[str, Tensor], name: str) -> float:
        return float((of[name] - exact[name]).norm() / exact[name].norm())

    for name in exact:
        assert error(fused, name) < 1e-4, name
        assert error(half, name) < 2 * error(own, name) + 1e-3, name

    on_cpu = decoder(kind)  # made after transformers' file was touched
    assert error({"states": states_and_gradients(on_cpu)["states"].to(GPU)}, "states") < 1e-4
    assert modeling_llama.LlamaRMSNorm.__name__ == "LlamaRMSNorm"
