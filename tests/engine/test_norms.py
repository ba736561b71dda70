"""Norms in one kernel: which take it, and that nothing changes off a card."""

import copy

import pytest
import torch
from torch import nn

from gspo_lightning.engine.norms import Fused, fuse_norms


@pytest.mark.parametrize(
    ("architecture", "fused"),
    [("qwen3", True), ("llama", True), ("mistral", True), ("gemma2", False), ("gpt2", False)],
)
def test_norms_that_are_plain_are_fused_and_compute_the_same_here(make_model, architecture, fused):
    """Gemma multiplies by 1 + weight; GPT-2's norms take off the mean."""
    model = make_model(architecture)
    names, ids = list(model.state_dict()), torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = model(ids).logits
        count = fuse_norms(model)
        assert bool(count) == fused and fuse_norms(model) == 0  # once is enough
        assert torch.equal(model(ids).logits, expected)
        other = copy.deepcopy(model)  # as an average of the weights is made
        other.load_state_dict({k: v + 1 for k, v in other.state_dict().items()})
        assert torch.equal(model(ids).logits, expected)
    assert list(model.state_dict()) == names
    assert sum(isinstance(m, Fused) for m in model.modules()) == count


def test_a_norm_of_another_kind_keeps_its_own_code():
    class OtherRMSNorm(nn.Module):
        def __init__(self, eps=1e-6):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), eps

        def forward(self, x):
            return self.weight * x / (x.norm(dim=-1, keepdim=True) / 8**0.5 + self.eps)

    class GatedRMSNorm(OtherRMSNorm):
        def forward(self, x, gate=None):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return x if gate is None else x * gate

    class PlainRMSNorm(OtherRMSNorm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    parts = [OtherRMSNorm(0.5), GatedRMSNorm(), PlainRMSNorm(), nn.LayerNorm(8)]
    assert fuse_norms(nn.ModuleList(parts)) == 1
    assert [isinstance(part, Fused) for part in parts] == [False, False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_a_fused_norm_is_at_least_as_exact(make_model, dtype):
    norm = make_model("qwen3").model.norm.to("cuda", dtype)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(7, len(norm.weight), device="cuda", dtype=dtype, requires_grad=True)
    exact = nn.functional.rms_norm(
        x.double(), norm.weight.shape, norm.weight.double(), norm.variance_epsilon
    )
    written_out = norm(x)
    assert fuse_norms(norm) == 1
    errors = [(y.double() - exact).abs().max().item() for y in (norm(x), written_out)]
    assert errors[0] <= errors[1] * 1.5 + 1e-7
    norm(x).sum().backward()
    assert norm.weight.grad.isfinite().all() and x.grad.isfinite().all()
