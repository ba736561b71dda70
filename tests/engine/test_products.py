"""Products in float32 on a CPU: oneDNN's where it is faster, the same numbers either way."""

import logging
import os
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gspo_lightning.engine import products
from gspo_lightning.engine.linear_logprobs import LinearLogprobs
from gspo_lightning.engine.products import Linear, filled, linear, ordered_weights, speed_up, whole
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import LoRAPolicy, Policy
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler


@pytest.fixture
def onednn(monkeypatch):
    """Let oneDNN multiply, whatever the CPU; the shapes of the rows that it got."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    calls = []
    own = products._onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(products, "_onednn", lambda *x: calls.append(x[0].shape) or own(*x))
    return calls


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, bias=None):
    """In float64, and so by another library."""
    bias = None if bias is None else bias.double()
    return nn.functional.linear(x.double(), weight.double(), bias)


@contextmanager
def multiplying(enabled):
    """Use the switch of torch; its context manager sets others as well, which warns."""
    before = torch.backends.mkldnn.set_flags(_enabled=enabled)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*before[:2])


@pytest.mark.parametrize("rows", [8, 13, 63, 64, 100, 583, (3, 5), (2, 4, 50)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_and_gradients_are_those_of_float64(onednn, rows, with_bias):
    shape = rows if isinstance(rows, tuple) else (rows,)
    x = numbers(*shape, 24).requires_grad_()
    weight = numbers(40, 24, seed=1).requires_grad_()
    bias = numbers(40, seed=2).requires_grad_() if with_bias else None
    upstream = numbers(*shape, 40, seed=3)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]

    y = linear(x, weight, bias)
    found = torch.autograd.grad(y, leaves, upstream)
    assert len(onednn) == 3

    expected = exact(x, weight, bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        found, torch.autograd.grad(expected, leaves, upstream.double()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [13, 64, 100, (4, 16)])
def test_results_may_be_written_into(onednn, rows):
    shape = rows if isinstance(rows, tuple) else (rows,)
    x, weight = numbers(*shape, 24), numbers(40, 24, seed=1).requires_grad_()
    y = linear(x, weight)
    y[..., 0] = 0
    y.mul_(2).sum().backward()
    expected = 2 * x.flatten(0, -2).sum(0).expand(40, 24).clone()
    expected[0] = 0
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_nothing_needs_are_not_computed(onednn):
    x, weight = numbers(64, 24), numbers(40, 24, seed=1).requires_grad_()
    linear(x, weight).sum().backward()
    assert len(onednn) == 2
    onednn.clear()
    linear(x.requires_grad_(), weight.detach()).sum().backward()
    assert len(onednn) == 2


def test_no_row_that_is_missing_comes_in(onednn):
    """Behind 61 rows stand 3 of zeros, of whose bias nothing may be seen."""
    model = Linear(24, 40)
    x = numbers(61, 24)
    with torch.no_grad(), ordered_weights(model):
        found = model(x)
    assert onednn == [(64, 24)]
    assert found.shape == (61, 40)
    torch.testing.assert_close(
        found.double(), exact(x, model.weight, model.bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("count", "below", "above"),
    [(3, 0, 4), (4, 4, 4), (13, 12, 16), (31, 28, 32), (33, 32, 40), (64, 64, 64), (583, 576, 640)],
)
def test_there_are_few_sizes(count, below, above):
    assert (whole(count), filled(count)) == (below, above)


def test_between_powers_of_two_there_are_at_most_16_sizes():
    for power in range(6, 14):
        sizes = {whole(count) for count in range(2**power + 1, 2 ** (power + 1) + 1)}
        assert len(sizes) <= 17
        assert all(count - whole(count) <= count / 8 for count in range(2**power, 2 ** (power + 1)))


def test_what_is_not_float32_on_a_cpu_is_torchs(onednn):
    weight = numbers(40, 24)
    for dtype in (torch.float64, torch.bfloat16):
        x = numbers(64, 24).to(dtype)
        assert torch.equal(linear(x, weight.to(dtype)), nn.functional.linear(x, weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(numbers(64, 24), weight).dtype == torch.bfloat16
    with torch.device("meta"):
        assert linear(torch.empty(64, 24), torch.empty(40, 24)).shape == (64, 40)
    assert onednn == []


def test_few_rows_small_weights_and_huge_ones_are_torchs(onednn, monkeypatch):
    linear(numbers(7, 24), numbers(40, 24))
    monkeypatch.setattr(products, "SMALLEST_WEIGHT", 40 * 24 + 1)
    linear(numbers(64, 24), numbers(40, 24))
    monkeypatch.setattr(products, "SMALLEST_WEIGHT", 40 * 24)
    monkeypatch.setattr(products, "LARGEST_WEIGHT", 40 * 24 - 1)
    linear(numbers(64, 24), numbers(40, 24))
    assert onednn == []


def test_torchs_own_switch_leaves_all_to_mkl(onednn):
    with multiplying(False):
        linear(numbers(64, 24), numbers(40, 24))
        model = Linear(24, 40)
        with torch.no_grad(), ordered_weights(model):
            assert model.ordered is None
    assert onednn == []


def test_a_model_keeps_its_names_and_weights(onednn):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), Own(40, 8))
    x, before = numbers(64, 24), {name: w.clone() for name, w in model.state_dict().items()}
    expected = model(x)
    speed_up(model)
    assert type(model[0]) is Linear and type(model[2]) is Own
    assert isinstance(model[0], nn.Linear)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(onednn) == 1


def test_ordered_weights_are_gone_afterwards_also_of_an_error(onednn):
    model = nn.Sequential(Linear(24, 40))
    with pytest.raises(RuntimeError, match="in between"), ordered_weights(model):
        assert model[0].ordered is not None
        raise RuntimeError("in between")
    assert model[0].ordered is None
    with torch.no_grad():
        model[0].weight.add_(1)
        torch.testing.assert_close(
            model(numbers(64, 24)).double(),
            exact(numbers(64, 24), model[0].weight, model[0].bias),
            rtol=1e-5,
            atol=1e-5,
        )


def test_log_probs_of_a_head_are_those_of_mkl(onednn):
    """583 tokens: two chunks of 256 and a rest of odd size; weight and bias are trained."""
    ids = torch.randint(40, (583,), generator=torch.Generator().manual_seed(4))
    found = []
    for enabled in (True, False):
        leaves = [
            numbers(583, 24).requires_grad_(),
            numbers(40, 24, seed=1).requires_grad_(),
            numbers(40, seed=2).requires_grad_(),
        ]
        with multiplying(enabled):
            logprobs, entropy = LinearLogprobs.apply(*leaves, ids, None, 0.7, True, 256)
            grads = torch.autograd.grad((logprobs - 0.1 * entropy).square().sum(), leaves)
        found.append([logprobs, entropy, *grads])
    # logits twice and both gradients; the rest's last rows beside
    assert len(onednn) == 3 * 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_it_is_a_matter_of_the_cpu(monkeypatch, capability, vendor, expected):
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch multiplies without MKL")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "cpu_vendor", lambda: vendor)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    state = torch.get_rng_state()
    assert products.onednn_is_faster.__wrapped__() is expected
    assert torch.equal(torch.get_rng_state(), state)
    # bounded where it is used and nobody has said otherwise
    bound = os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    assert bound == (str(products.KEPT) if expected else None)
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"


@pytest.mark.parametrize("broken", ["gone", "other numbers"])
def test_a_torch_without_the_operation_multiplies_with_mkl_and_says_so(monkeypatch, caplog, broken):
    def product(*_):
        if broken == "gone":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute 'x'")
        return torch.zeros(9, 3)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "_product", product)
    with caplog.at_level(logging.WARNING):
        assert products.onednn_is_faster.__wrapped__() is False
    assert "MKL multiplies, oneDNN would be faster but cannot be asked" in caplog.text


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt_oss"])
def test_a_rollout_draws_the_same_tokens(onednn, make_model, tokenizer, architecture):
    """64 rows, of which few run in the end, with ordered weights and without oneDNN."""
    batch = PromptBatch(
        prompt_ids=torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]]),
        prompt_mask=torch.tensor([[False, True, True, True], [True] * 4]),
        rows=[{}, {}],
    )
    policy = Policy(make_model(architecture), tokenizer)
    sampler = GroupSampler(group_size=32, max_new_tokens=24)
    found = []
    for enabled in (True, False):
        with multiplying(enabled):
            found.append(sampler.sample(policy, batch, seed=0))
        assert all(m.ordered is None for m in policy.model.modules() if isinstance(m, Linear))
    assert len({shape[0] for shape in onednn}) >= 5  # rows leave
    one, other = found
    assert torch.equal(one.completion_ids, other.completion_ids)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


def test_adapters_and_their_weights_are_multiplied_alike(onednn, make_model, tokenizer):
    pytest.importorskip("peft")
    policy = LoRAPolicy(make_model("qwen3"), tokenizer, LoRAConfig(rank=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # which starts at 0, so that nothing would be seen of it
            parameter.data = numbers(*parameter.shape)
    ids = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for enabled in (True, False):
        with multiplying(enabled):
            logits = policy.model(input_ids=ids).logits
            trained = [p for p in policy.parameters() if p.requires_grad]
            found.append([logits, *torch.autograd.grad(logits.square().mean(), trained)])
    assert len(onednn) > 2 * 7 * 3  # layers, their matrices, the weight and its two adapters
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
