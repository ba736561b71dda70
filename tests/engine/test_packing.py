"""Packed rows: every token once, no padding, and the values and gradients of each text alone."""

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.engine import packed_attention, probe
from gspo_lightning.engine.attention import open_attention
from gspo_lightning.engine.packing import pack
from gspo_lightning.engine.probe import reading
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import PolicyConfig, checkpoint_activations, load_policy
from support.passes import inputs, tokens_of_passes

# windows, capped scores, sinks; scaled logits; experts; learned positions
PACKED = (
    *("qwen3", "llama", "gpt2", "gemma2", "mistral"),
    *("qwen3_moe", "cohere", "granite", "gpt_oss"),
)


@pytest.fixture
def float64(monkeypatch):
    """The models ask for float32 in their norms, rotations and softmax; here that is float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def double(model):
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    return model.double()


def opened(model):
    assert open_attention(model)
    return model


def everything(model, rollout, **options):
    """Both results, and the gradient of a function of both by every parameter."""
    model.zero_grad()
    result = completion_logprobs(model, *inputs(rollout), with_entropy=True, **options)
    (result.logprobs.exp().sum() + (result.entropy**2).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result, gradients


def assert_same(found, expected, tolerance):
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() < tolerance * largest, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_give_values_and_gradients_of_padded_ones_to_the_last_bits(
    float64, make_model, make_rollout, architecture, checkpointing
):
    rollout = make_rollout()
    # eager: a window's rows of padding, which see nothing, are NaN in float64 under sdpa
    plain = double(make_model(architecture, attn_implementation="eager"))
    expected = everything(plain, rollout, temperature=0.7)
    packed = double(opened(make_model(architecture))).train()
    if checkpointing:
        checkpoint_activations(packed)
    found = everything(packed, rollout, temperature=0.7)
    assert found[0].logprobs.dtype == torch.float64
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("similar", [0.0, 1.0])
def test_how_attention_pads_changes_nothing(
    float64, monkeypatch, make_model, make_rollout, architecture, similar
):
    """All completions of a group in one block, or every length in its own."""
    model, rollout = double(opened(make_model(architecture))), make_rollout()
    expected = everything(model, rollout)
    monkeypatch.setattr(packed_attention, "SIMILAR", similar)
    assert_same(everything(model, rollout), expected, 1e-11)


def test_each_prompt_goes_through_the_model_once_and_padding_never(make_model, make_rollout):
    """Prompts of 4 and 2 tokens; completions of 5, 3, 1, 4, 2 and 5, the last token never read."""
    model, rollout = opened(make_model("qwen3")), make_rollout()
    once = 4 + (4 + 2 + 0) + 2 + (3 + 1 + 4)
    assert tokens_of_passes(model, rollout, group_size=3) == [once]
    # rows find their neighbours' prompt by themselves: parts of groups share it, too
    assert tokens_of_passes(model, rollout.select(torch.tensor([1, 2, 3, 4]))) == [4 + 2 + 2 + 4]
    checkpoint_activations(model.train())
    assert tokens_of_passes(model, rollout, group_size=3) == [once]


def test_no_padding_goes_through_any_linear_layer(make_model, make_rollout):
    model, rollout = opened(make_model("qwen3")), make_rollout()
    tokens_of_passes(model, rollout)
    seen = set()
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[:-1].numel()))
    completion_logprobs(model, *inputs(rollout))
    assert seen == {20}


def test_a_row_by_hand():
    """Two completions of one prompt, one of another; the middle token of the first is no target."""
    prompts = torch.tensor([[0, 7, 8], [0, 7, 8], [4, 5, 6]])
    completions = torch.tensor([[11, 12, 13], [14, 15, 0], [16, 0, 0]])
    context = completions > 0
    keep = context.clone()
    keep[0, 1] = False
    row = pack(prompts, prompts > 0, completions, context, keep)
    assert row.ids.tolist() == [[7, 8, 11, 12, 14, 4, 5, 6]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    # 11 and 14 follow the prompt's last token, 13 follows 12, 15 follows 14, 16 follows 6
    assert row.source.tolist() == [1, 3, 1, 4, 7]
    assert row.target.tolist() == [0, 2, 3, 4, 6]
    assert row.attend.sequences == [(0, 2, 0, 0), (2, 2, 0, 2), (4, 1, 0, 2), (5, 3, 0, 0)]


def test_rows_without_a_completion_cost_nothing(make_model, make_rollout):
    """Masked out as truncated: not even their prompt is read, unless nothing else is left."""
    model, rollout = opened(make_model("qwen3", tie_word_embeddings=False)), make_rollout()
    ids, mask, completion_ids, keep = inputs(rollout)
    keep = keep.clone()
    keep[:3] = False
    completion_logprobs(model, ids, mask, completion_ids, keep)
    count = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: count.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    completion_logprobs(model, ids, mask, completion_ids, keep)
    nothing = completion_logprobs(model, ids, mask, completion_ids, keep & False, with_entropy=True)
    assert count == [2 + 3 + 1 + 4, 4]
    assert (nothing.logprobs == 0).all() and (nothing.entropy == 0).all()
    nothing.logprobs.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())  # none is missing


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_no_grad_gives_the_same_bits(make_model, make_rollout, architecture):
    """Fact 18: the pass for old log-probs and the update's own."""
    model, rollout = opened(make_model(architecture)), make_rollout()
    with torch.no_grad():
        frozen = completion_logprobs(model, *inputs(rollout), with_entropy=True)
    live = completion_logprobs(model, *inputs(rollout))
    assert torch.equal(frozen.logprobs, live.logprobs)
    assert live.logprobs.requires_grad and not frozen.logprobs.requires_grad


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt_oss"])
def test_half_precision_is_as_far_from_float32_as_padded_rows_are(
    make_model, make_rollout, architecture, mixed
):
    def run(model):
        model = model if mixed else model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return everything(model, rollout)

    rollout = make_rollout()
    exact, exact_gradients = everything(make_model(architecture), rollout)
    padded, padded_gradients = run(make_model(architecture))
    model = opened(make_model(architecture))
    packed, packed_gradients = run(model)
    assert reading(model, torch.device("cpu")) == "packed"
    assert packed.logprobs.dtype == torch.float32
    error = (packed.logprobs - exact.logprobs).norm()
    assert 0 < error < 2 * (padded.logprobs - exact.logprobs).norm() + 0.02
    for name, gradient in packed_gradients.items():
        assert gradient.dtype == padded_gradients[name].dtype
    together = [
        torch.cat([g.float().flatten() for g in gradients.values()])
        for gradients in (packed_gradients, exact_gradients)
    ]
    assert torch.cosine_similarity(*together, dim=0) > 0.99


# --- models that cannot be packed ----------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_next"])
def test_models_with_other_layers_are_padded_and_that_is_said_once(
    caplog, make_model, make_rollout, architecture
):
    model, rollout = make_model(architecture), make_rollout()
    open_attention(model)
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        assert tokens_of_passes(model, rollout, group_size=3) == [2 * 3, 6 * 8]
    said = [message for message in caplog.messages if "rows are padded, not packed" in message]
    assert len(said) == 1 and type(model).__name__ in said[0]


def test_a_model_that_computes_something_else_on_packed_and_padded_rows_runs_them_one_by_one(
    caplog, monkeypatch, make_model, make_rollout
):
    """Here: positions that it counts through the row, padding included."""
    model, rollout = opened(make_model("gpt2")), make_rollout()
    forward = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids, **kwargs: forward(*args, **kwargs)
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        count = tokens_of_passes(model, rollout, group_size=3)
    assert count == [4 + 4, 4 + 2, 4, 2 + 3, 2 + 1, 2 + 4]
    for way in ("packed", "shared", "padded"):
        assert f"{probe.KINDS[way]} give other values" in caplog.text


def test_a_model_that_refuses_packed_rows_is_padded(caplog, make_model, make_rollout):
    model, rollout = opened(make_model("qwen3")), make_rollout()
    forward = model.model.forward

    def refuse(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("no masks of four dimensions")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = refuse
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        assert tokens_of_passes(model, rollout, group_size=3) == [6, 30]
    assert "cannot be run on packed rows (ValueError: no masks of four dimensions)" in caplog.text


# --- a GPU's kernel for unequal lengths ----------------------------------------------------------


def by_loop(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """What ``torch.nn.attention.varlen.varlen_attn`` computes, written out; (tokens, heads, d)."""
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    outputs = []
    for i in range(len(cu_q) - 1):
        a, b = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]]
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        position = torch.arange(len(b))
        distance = position[len(b) - len(a) :, None] - position  # aligned at the end
        left, right = window_size
        seen = distance >= -right
        if left >= 0:
            seen &= distance <= left
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[cu_k[i] : cu_k[i + 1]]))
    return torch.cat(outputs)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gpt2"])
def test_a_kernel_for_unequal_lengths_is_given_the_same_problem(
    monkeypatch, float64, make_model, make_rollout, architecture
):
    model, rollout = double(opened(make_model(architecture))), make_rollout()
    expected = everything(model, rollout)
    calls = []
    monkeypatch.setattr(packed_attention, "_has_varlen", lambda query: True)
    monkeypatch.setattr(
        packed_attention, "varlen_attn", lambda *a, **k: calls.append(1) or by_loop(*a, **k)
    )
    assert_same(everything(model, rollout), expected, 1e-11)
    assert len(calls) == 2  # one a layer


class Saving(torch.autograd.Function):
    """A kernel that keeps its inputs for backward, as the real one does; grouped heads or not."""

    @staticmethod
    def forward(ctx, options, q, k, v, *borders):
        ctx.save_for_backward(q, k, v)
        ctx.rest = options, borders
        return Saving.compute(options, q, k, v, *borders)

    @staticmethod
    def compute(options, q, k, v, *borders):
        if options.pop("enable_gqa", False):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return by_loop(q, k, v, *borders, **options)

    @staticmethod
    def backward(ctx, gradient):
        options, borders = ctx.rest
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = Saving.compute(dict(options), *inputs, *borders)
        return (None, *torch.autograd.grad(output, inputs, gradient), *[None] * len(borders))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_a_prompt_is_not_kept_for_each_of_its_completions(
    monkeypatch, float64, make_model, make_rollout, grouped, recomputed
):
    model, rollout = double(opened(make_model("qwen3"))), make_rollout()
    expected = everything(model, rollout)
    made = []

    def kernel(q, k, v, *borders, **options):
        assert ("enable_gqa" in options) == grouped
        made.extend(map(weakref.ref, (k, v)))
        return Saving.apply(dict(options), q, k, v, *borders)

    def plain(q, k, v, *borders, scale, window_size):
        return kernel(q, k, v, *borders, scale=scale, window_size=window_size)

    def with_groups(q, k, v, *borders, scale, window_size, enable_gqa):
        options = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
        return kernel(q, k, v, *borders, **options)

    alive = []
    monkeypatch.setattr(packed_attention, "_has_varlen", lambda query: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", with_groups if grouped else plain)
    if recomputed:
        checkpoint_activations(model.train())
    backward = torch.Tensor.backward

    def look(self, *arguments, **options):
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in made))
        return backward(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", look)
    assert_same(everything(model, rollout), expected, 1e-11)
    assert alive == [0] and len(made) == (8 if recomputed else 4)


def test_written_out_attention_goes_piece_by_piece(monkeypatch, float64, make_model, make_rollout):
    """No matrix of all scores is kept, which would be a gigabyte a layer for 4,096 tokens."""
    for architecture in ("gemma2", "gpt_oss"):
        model, rollout = double(opened(make_model(architecture))), make_rollout()
        expected = everything(model, rollout)
        sizes = []
        monkeypatch.setattr(packed_attention, "AT_ONCE", 2)
        whole = packed_attention._attend_explicitly
        monkeypatch.setattr(
            packed_attention,
            "_attend_explicitly",
            lambda q, *rest, of=whole, seen=sizes: seen.append(q.shape[2]) or of(q, *rest),
        )
        assert_same(everything(model, rollout), expected, 1e-11)
        assert max(sizes) == 2
        monkeypatch.undo()


def test_the_kernel_for_unequal_lengths_is_not_given_heads_that_it_refuses():
    for size, taken in {64: True, 36: False, 256: True, 320: False}.items():
        query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 3, size))
        assert packed_attention._has_varlen(query) == taken


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_on_a_gpu_are_those_of_the_cpu(make_model, make_rollout, architecture, dtype):
    """In bfloat16 by the kernel for unequal lengths, where there is no cap and no sink."""
    rollout = make_rollout()
    exact, gradients = everything(make_model(architecture), rollout)
    model = opened(make_model(architecture)).to("cuda", dtype)
    found, found_gradients = everything(model, rollout.to("cuda"))
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(found.logprobs.cpu(), exact.logprobs, atol=tolerance, rtol=0)
    for name, gradient in gradients.items():
        similar = torch.cosine_similarity(
            found_gradients[name].float().cpu().flatten(), gradient.flatten(), dim=0
        )
        assert similar > 0.95 or gradient.abs().max() < 1e-6, name


def test_policies_and_references_are_run_packed(model_dir, make_rollout):
    """And so are warm starts, which load their policy the same way."""
    rollout, config = make_rollout(), PolicyConfig(str(model_dir))
    assert tokens_of_passes(load_policy(config).model, rollout) == [20]
    reference = ReferencePolicy(device="cpu")
    reference.load(config, torch.device("cpu"))
    assert tokens_of_passes(reference.model, rollout) == [20]


def test_a_call_may_ask_for_padded_rows(make_model, make_rollout):
    """The same numbers with other rounding, to see what rounding does."""
    model, rollout = opened(make_model("qwen3")), make_rollout()
    assert tokens_of_passes(model, rollout, group_size=3, packed=False) == [6, 30]
