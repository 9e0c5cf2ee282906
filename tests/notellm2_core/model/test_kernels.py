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


def states_and_gradients(llm: PreTrainedModel, num_tokens: int = 40) -> dict[str, Tensor]:
    llm.zero_grad(set_to_none=True)
    ids = torch.arange(2 * num_tokens).view(2, num_tokens).to(llm.device) % 64
    states = llm(input_ids=ids, use_cache=False).last_hidden_state.float()
    (states * torch.linspace(-1, 1, states.shape[-1], device=llm.device)).sum().backward()
    return {"states": states.detach(), **{n: p.grad.float() for n, p in llm.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("kind", "options", "device"), [("llama", {}, CPU), ("gpt2", {}, GPU), ("llama", {"hidden_act": "gelu"}, GPU)]
)
def test_cpus_and_decoders_without_kernels_keep_their_own_code(
    kind: str, options: dict[str, str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_lacking", lambda: "")
    monkeypatch.setattr(kernels, "apply_liger_kernel", lambda *_: pytest.fail("kernels were applied"))
    assert not fuse_kernels(decoder(kind, **options), device)


@pytest.mark.parametrize("lacking", ["liger-kernel", "C compiler"])
def test_a_missing_kernel_library_on_a_gpu_is_named(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: lacking != "liger-kernel")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.warns(UserWarning, match=lacking):
        assert not fuse_kernels(decoder("llama"), GPU)


def test_replacements_for_the_whole_process_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that replaces the same attributes as Liger stands in for it. A model on a CPU computes as before."""

    def replace(*_: object) -> None:
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = None
        modeling_llama.apply_rotary_pos_emb = lambda *_: pytest.fail("a kernel ran on a CPU")

    monkeypatch.setattr(kernels, "_lacking", lambda: "")
    monkeypatch.setattr(kernels, "apply_liger_kernel", replace)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # restored
    expected = states_and_gradients(decoder("llama"))["states"]
    for _ in range(2):
        assert fuse_kernels(decoder("llama"), GPU)
        once = modeling_llama.apply_rotary_pos_emb
    assert torch.equal(states_and_gradients(decoder("llama"))["states"], expected)
    assert fuse_kernels(decoder("llama"), GPU) and modeling_llama.apply_rotary_pos_emb is once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_tokens", [40, 4500])  # many norms of short heads run in another kernel
@pytest.mark.parametrize("kind", sorted(kernels.KINDS))
def test_fused_kernels_compute_what_the_decoder_does(kind: str, num_tokens: int) -> None:
    """In fp32 the states and all gradients agree; in bf16 they are as near to fp32 as those of the decoder's code."""
    plain = decoder(kind).to(GPU)
    exact = states_and_gradients(plain, num_tokens)
    own = states_and_gradients(decoder(kind).to(GPU, torch.bfloat16), num_tokens)
    assert fuse_kernels(plain, GPU)
    in_bf16 = decoder(kind).to(GPU, torch.bfloat16)
    assert fuse_kernels(in_bf16, GPU)
    fused, half = states_and_gradients(plain, num_tokens), states_and_gradients(in_bf16, num_tokens)

    def error(values: dict[str, Tensor], name: str) -> float:
        return float((values[name] - exact[name]).norm() / exact[name].norm())

    for name in exact:
        assert error(fused, name) < 1e-4, name
        assert error(half, name) < 2 * error(own, name) + 1e-3, name

    on_cpu = decoder(kind)  # built after transformers' module was changed
    assert error({"states": states_and_gradients(on_cpu, num_tokens)["states"].to(GPU)}, "states") < 1e-4
    assert modeling_llama.LlamaRMSNorm.__name__ == "LlamaRMSNorm"
