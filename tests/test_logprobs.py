"""Log-probs and entropy of completions."""

import math

import pytest
import torch

from gspo_lightning.logprobs import completion_logprobs
from support.passes import inputs, loop, tokens_of_passes

ARCHITECTURES = ("qwen3", "llama", "gpt2", "gemma2")


class Norm(torch.nn.Module):
    """RMS norm in the input's own precision: the models' own one computes in float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def exact(model):
    """Make every operation of a model float64, so that tolerances can be tight."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "variance_epsilon"):
                setattr(module, name, Norm(child))
    return model.double()


def everything(model, rollout, **arguments):
    """Values and the gradient of a function of both results."""
    model.zero_grad()
    result = completion_logprobs(model, *inputs(rollout), with_entropy=True, **arguments)
    (result.logprobs.exp().sum() + (result.entropy**2).sum()).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.stack([result.logprobs, result.entropy]).detach(), grads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_log_prob_is_log_softmax_of_logits_over_temperature(
    make_model, make_rollout, architecture, temperature
):
    """Facts 16 and 38; gemma2 caps its logits, gpt2 has absolute positions."""
    model, rollout = make_model(architecture), make_rollout()
    result = completion_logprobs(
        model, *inputs(rollout), temperature=temperature, with_entropy=True
    )
    logprobs, entropy = loop(model, rollout, temperature)
    # the models compute in float32
    torch.testing.assert_close(result.logprobs.double(), logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.entropy.double(), entropy, atol=1e-5, rtol=0)


def test_results_are_float32_also_for_a_model_in_bfloat16(make_model, make_rollout):
    """Fact 16: the softmax is taken of float32 values, so the probabilities add up to 1."""
    model = make_model("qwen3").bfloat16()
    prompt = torch.tensor([[5, 6, 7]]).expand(32, -1)
    every_token = torch.arange(32)[:, None]
    on = torch.ones_like
    result = completion_logprobs(
        model, prompt, on(prompt).bool(), every_token, on(every_token).bool()
    )
    assert result.logprobs.dtype == torch.float32
    assert result.logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group_size", [1, 3])
def test_left_padding_changes_nothing(make_model, make_rollout, architecture, group_size):
    """Fact 17: a longer prompt in the batch puts 7 more pads before all the others."""
    model, rollout = make_model(architecture), make_rollout()
    ids, mask, completion_ids, keep = inputs(rollout)
    alone = completion_logprobs(model, ids, mask, completion_ids, keep, group_size=group_size)
    long_ids = torch.randint(3, 20, (3, 11), generator=torch.Generator().manual_seed(1))
    long_ids[:] = long_ids[:1]
    pad = torch.nn.functional.pad
    together = completion_logprobs(
        model,
        torch.cat([pad(ids, (7, 0)), long_ids]),
        torch.cat([pad(mask, (7, 0)), torch.ones(3, 11, dtype=torch.bool)]),
        torch.cat([completion_ids, completion_ids[:3]]),
        torch.cat([keep, keep[:3]]),
        group_size=group_size,
    )
    torch.testing.assert_close(together.logprobs[:6], alone.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_a_shared_prompt_gives_the_same_values_and_gradients(
    make_model, make_rollout, architecture
):
    model, rollout = exact(make_model(architecture)), make_rollout()
    values, grads = everything(model, rollout)
    shared_values, shared_grads = everything(model, rollout, group_size=3)
    torch.testing.assert_close(shared_values, values, atol=1e-10, rtol=0)
    torch.testing.assert_close(shared_grads, grads, atol=1e-10, rtol=0)
    assert grads.abs().max() > 1e-2


def test_a_shared_prompt_may_be_longer_than_the_sliding_window(make_model, make_rollout):
    """In float32: with float64 this architecture's softmax of empty rows is NaN."""
    model, rollout = make_model("gemma2"), make_rollout()
    values, grads = everything(model, rollout)
    shared_values, shared_grads = everything(model, rollout, group_size=3)
    torch.testing.assert_close(shared_values, values, atol=1e-5, rtol=0)
    torch.testing.assert_close(shared_grads, grads, atol=1e-5, rtol=1e-4)


def test_a_shared_prompt_is_computed_once(make_model, make_rollout):
    """Padded rows: 2 * 3 + 6 * 5 tokens instead of 6 * (4 + 4)."""
    model, rollout = make_model("qwen3"), make_rollout()
    assert tokens_of_passes(model, rollout, group_size=3) == [6, 30]
    assert tokens_of_passes(model, rollout) == [48]


def test_a_shared_prompt_of_one_token_works(make_model, make_rollout):
    model, rollout = exact(make_model("qwen3")), make_rollout()
    _, _, completion_ids, mask = inputs(rollout)
    prompt = torch.full((6, 1), 7)
    arguments = (model, prompt, prompt > 0, completion_ids, mask)
    shared = completion_logprobs(*arguments, group_size=3).logprobs
    torch.testing.assert_close(shared, completion_logprobs(*arguments).logprobs)


def test_gradient_checkpointing_gives_the_same_with_a_shared_prompt(make_model, make_rollout):
    """Models drop their cache while they checkpoint, so completions would lose their prompt."""
    model, rollout = exact(make_model("qwen3")).train(), make_rollout()
    values, grads = everything(model, rollout, group_size=3)
    # renamed in newer versions of transformers
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again_values, again_grads = everything(model, rollout, group_size=3)
    torch.testing.assert_close(again_values, values, atol=1e-10, rtol=0)
    torch.testing.assert_close(again_grads, grads, atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 7, 30])
def test_chunks_change_nothing(make_model, make_rollout, chunk_size):
    model, rollout = exact(make_model("qwen3")), make_rollout()
    values, grads = everything(model, rollout)
    chunk_values, chunk_grads = everything(model, rollout, chunk_size=chunk_size)
    torch.testing.assert_close(chunk_values, values, atol=1e-14, rtol=0)
    torch.testing.assert_close(chunk_grads, grads, atol=1e-12, rtol=0)


class FixedLogits(torch.nn.Module):
    """Returns the last rows of given logits, (B, S, V): a stand-in for a model."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache):
        self.seen = input_ids
        return LogitsOutput(self.logits[:, : input_ids.shape[1]])


class LogitsOutput:
    def __init__(self, logits):
        self.logits = logits


def test_no_float32_copy_of_all_logits_is_kept_for_backward():
    """What autograd saves between forward and backward stays in the model's own precision."""
    model = FixedLogits(torch.zeros(2, 9, 64, dtype=torch.bfloat16))
    prompt = torch.full((2, 3), 5)
    completion = torch.full((2, 6), 4)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_logprobs(
            model, prompt, prompt > 0, completion, completion > 0, chunk_size=4, with_entropy=True
        )
    assert not [t for t in saved if t.dtype == torch.float32 and t.numel() >= 4 * 64]


def test_nan_logits_in_padding_reach_neither_value_nor_gradient():
    """Fact 5: the row ends after one token; its other logits are NaN."""
    logits = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 2:] = float("nan")
    model = FixedLogits(logits)
    prompt, completion = torch.tensor([[3, 4]]), torch.tensor([[1, 0, 0, 0]])
    mask = torch.tensor([[True, False, False, False]])
    wide = torch.cat([mask, mask])  # another row keeps the columns
    wide[1] = True
    model = FixedLogits(torch.cat([logits, torch.zeros_like(logits)]))
    result = completion_logprobs(
        model,
        prompt.expand(2, -1),
        torch.ones(2, 2, dtype=torch.bool),
        completion.expand(2, -1),
        wide,
        with_entropy=True,
    )
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert result.logprobs.isfinite().all() and (result.logprobs[0, 1:] == 0).all()
    assert result.entropy.isfinite().all() and (result.entropy[0, 1:] == 0).all()
    assert model.logits.grad.isfinite().all()


def test_ids_in_padding_may_lie_outside_the_vocabulary(make_model, make_rollout):
    model, rollout = make_model("qwen3"), make_rollout()
    ids, mask, completion_ids, keep = inputs(rollout)
    clean = completion_logprobs(model, *inputs(rollout)).logprobs
    ids, completion_ids = ids.masked_fill(~mask, -100), completion_ids.masked_fill(~keep, 10**6)
    assert torch.equal(completion_logprobs(model, ids, mask, completion_ids, keep).logprobs, clean)


def test_a_token_that_does_not_count_is_still_context(make_model, make_rollout):
    """Leaving a token out of the loss must not take it out of the text."""
    model, rollout = make_model("qwen3"), make_rollout()
    ids, mask, completion_ids, keep = inputs(rollout)
    holes = keep.clone()
    holes[:, 1] = False
    result = completion_logprobs(model, ids, mask, completion_ids, holes).logprobs
    full = completion_logprobs(model, ids, mask, completion_ids, keep).logprobs
    assert torch.equal(result, full.masked_fill(~holes, 0))


def test_padding_shared_by_all_rows_is_cut_off():
    model = FixedLogits(torch.zeros(2, 20, 8))
    prompt = torch.tensor([[0, 0, 0, 3, 4], [0, 0, 0, 0, 4]])
    completion = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0]])
    result = completion_logprobs(model, prompt, prompt > 0, completion, completion > 0)
    assert model.seen.tolist() == [[3, 4, 5, 6], [0, 4, 5, 6]]
    assert result.logprobs.shape == (2, 4)  # as asked


def test_with_all_rows_masked_the_graph_is_kept(make_model, make_rollout):
    """Fact 15: backward must find the parameters also then."""
    model, rollout = make_model("qwen3"), make_rollout()
    ids, mask, completion_ids, keep = inputs(rollout)
    for group_size in (1, 3):
        result = completion_logprobs(
            model, ids, mask, completion_ids, keep & False, group_size=group_size
        )
        assert (result.logprobs == 0).all() and result.entropy is None
        model.zero_grad()
        result.logprobs.sum().backward()
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in model.parameters())


def test_entropy_of_equal_logits_is_the_log_of_the_vocabulary():
    """Fact 38; exact, not a sampled estimate."""
    model = FixedLogits(torch.zeros(1, 3, 8))
    on = torch.ones(1, 2, dtype=torch.bool)
    result = completion_logprobs(
        model, torch.tensor([[3, 4]]), on, torch.tensor([[5, 6]]), on, with_entropy=True
    )
    torch.testing.assert_close(result.entropy, torch.full((1, 2), math.log(8)))


def test_entropy_has_its_gradient():
    """Fact 38: dH / dlogit_v = -p_v (log p_v + H)."""
    logits = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    model = FixedLogits(logits)
    on = torch.ones(1, 2, dtype=torch.bool)
    result = completion_logprobs(
        model, torch.tensor([[3, 4]]), on, torch.tensor([[5, 6]]), on, with_entropy=True
    )
    result.entropy.sum().backward()
    logp = logits.log_softmax(-1)
    expected = -logp.exp() * (logp - (logp.exp() * logp).sum(-1, keepdim=True))
    torch.testing.assert_close(model.logits.grad[:, 1:], expected[:, 1:])


def test_no_grad_gives_the_same_values_without_a_graph(make_model, make_rollout):
    """Fact 18: the pass for old log-probs uses the same kernels."""
    model, rollout = make_model("qwen3"), make_rollout()
    for group_size in (1, 3):
        with torch.no_grad():
            frozen = completion_logprobs(model, *inputs(rollout), group_size=group_size).logprobs
        live = completion_logprobs(model, *inputs(rollout), group_size=group_size).logprobs
        assert torch.equal(frozen, live) and not frozen.requires_grad and live.requires_grad


def test_a_wrapper_that_hides_its_arguments_still_gets_position_ids(make_model, make_rollout):
    """As adapters do: forward(*args, **kwargs) and get_base_model()."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_base_model(self):
            return self.inner

        def forward(self, **kwargs):
            self.names = set(kwargs)
            return self.inner(**kwargs)

    model, rollout = make_model("gpt2"), make_rollout()
    wrapper = Wrapper(model)
    result = completion_logprobs(wrapper, *inputs(rollout)).logprobs
    assert torch.equal(result, completion_logprobs(model, *inputs(rollout)).logprobs)
    assert {"position_ids", "logits_to_keep"} <= wrapper.names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 token, got 0"),
        ({"group_size": 4}, "group_size must divide the 6 rows, got 4"),
    ],
)
def test_a_bad_argument_is_named(make_model, make_rollout, arguments, message):
    with pytest.raises(ValueError, match=message):
        completion_logprobs(make_model("qwen3"), *inputs(make_rollout()), **arguments)


def test_prompts_padded_on_the_right_are_refused(make_model, make_rollout):
    ids, mask, completion_ids, keep = inputs(make_rollout())
    with pytest.raises(ValueError, match="prompts are left-padded"):
        completion_logprobs(make_model("qwen3"), ids, mask.flip(1), completion_ids, keep)
