"""Log-probs from hidden states: the values and gradients of all logits, without all logits."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_lightning.engine.attention import open_attention
from gspo_lightning.engine.head import Head, find_head, token_logprobs
from gspo_lightning.logprobs import completion_logprobs
from support.passes import inputs

N, D, V = 11, 5, 17


def cap(logits):
    return 2 * torch.tanh(logits / 2)


def problem(dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Linear(D, V, bias=bias).to(dtype)
    with torch.no_grad():
        for p in embedding.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    return embedding, hidden, torch.randint(V, (N,), generator=generator)


def results(embedding, hidden, function):
    """Log-probs, entropy, and gradients of a function of the wanted ones."""
    embedding.zero_grad()
    hidden.grad = None
    logprobs, entropy = function()
    loss = (logprobs * torch.arange(N)).sum()
    if entropy is not None:
        loss = loss + (entropy**2).sum()
    loss.backward()
    return [logprobs, entropy, hidden.grad, *(p.grad for p in embedding.parameters())]


@pytest.mark.parametrize("chunk_size", [1, 4, N, None])
@pytest.mark.parametrize("finish", [None, cap])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_chunks_give_the_log_softmax_of_all_logits_and_its_gradients(
    chunk_size, finish, bias, with_entropy
):
    embedding, hidden, ids = problem(bias=bias)

    def at_once():
        logits = embedding(hidden)
        logits = logits if finish is None else finish(logits)
        distribution = (logits / 0.7).log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1) if with_entropy else None
        return distribution[torch.arange(N), ids], entropy

    def in_chunks():
        head = SimpleNamespace(embedding=embedding, finish=finish)
        return token_logprobs(
            hidden,
            ids,
            head,
            temperature=0.7,
            with_entropy=with_entropy,
            chunk_size=chunk_size,
        )

    expected, found = results(embedding, hidden, at_once), results(embedding, hidden, in_chunks)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_an_output_embedding_that_is_more_than_a_matrix_is_called():
    """An adapter on it, or a hook: then its own forward runs, chunk by chunk."""
    embedding, hidden, ids = problem()
    calls = []
    head = SimpleNamespace(embedding=embedding, finish=None)
    head.logits = lambda states: calls.append(len(states)) or embedding(states)
    options = {"temperature": 1.0, "with_entropy": True, "chunk_size": 4}
    plain = results(embedding, hidden, lambda: token_logprobs(hidden, ids, head, **options))
    assert not calls
    embedding.register_forward_hook(lambda *_: None)
    hooked = results(embedding, hidden, lambda: token_logprobs(hidden, ids, head, **options))
    assert calls == [4, 4, 3, 3, 4, 4]  # and once more in the backward pass
    for a, b in zip(hooked, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on():
    embedding, hidden, ids = problem()
    embedding.requires_grad_(False)
    head = SimpleNamespace(embedding=embedding, finish=None)
    token_logprobs(hidden, ids, head, temperature=1.0, with_entropy=False)[0].sum().backward()
    assert embedding.weight.grad is None and hidden.grad.abs().max() > 0


@pytest.mark.parametrize("mixed", [False, True])
def test_logits_have_the_dtype_of_the_model_and_the_softmax_is_float32(mixed):
    """bfloat16 weights, and float32 weights under autocast: the model's logits are bfloat16."""
    embedding, hidden, ids = problem(torch.float32 if mixed else torch.bfloat16)
    head = SimpleNamespace(embedding=embedding, finish=None)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = results(
            embedding,
            hidden,
            lambda: token_logprobs(
                hidden, ids, head, temperature=1.0, with_entropy=True, chunk_size=4
            ),
        )
        expected = results(
            embedding,
            hidden,
            lambda: (embedding(hidden).float().log_softmax(-1)[torch.arange(N), ids], None),
        )
    assert found[0].dtype == torch.float32 and found[3].dtype == embedding.weight.dtype
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.size = max(self.size, output.numel())
        return output


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_is_as_large_as_a_chunk_of_logits(make_model, make_rollout, architecture, packed):
    """Of 20 completion tokens and 4096 ids; the weights themselves are 16 wide."""
    model, rollout = make_model(architecture, vocab_size=4096), make_rollout()
    if packed:
        open_attention(model)
    completion_logprobs(model, *inputs(rollout))
    with Largest() as largest:
        result = completion_logprobs(
            model, *inputs(rollout), chunk_size=4, with_entropy=True, group_size=3
        )
        (result.logprobs.sum() + result.entropy.sum()).backward()
    assert largest.size == 16 * 4096  # chunks are 4 x 4096, all logits would be 20 x 4096


def test_nothing_of_the_size_of_logits_is_kept_for_backward(make_model, make_rollout):
    model, rollout = make_model("gemma2", vocab_size=512), make_rollout()
    saved = []
    completion_logprobs(model, *inputs(rollout))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        completion_logprobs(model, *inputs(rollout), with_entropy=True)
    assert not [shape for shape in saved if shape[-1:] == (512,)]


@pytest.mark.parametrize(
    ("architecture", "finished"),
    [("qwen3", False), ("gpt2", False), ("gemma2", True), ("granite", True), ("cohere", True)],
)
def test_what_a_model_does_to_its_logits_is_its_own_doing(make_model, architecture, finished):
    """Caps and scales are run, not copied: any function of the logits is right."""
    model = make_model(architecture)
    head = find_head(model, torch.tensor([[3, 4, 5]]))
    assert isinstance(head, Head) and (head.finish is not None) == finished
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with head.caught() as states:
        model(input_ids=ids)
    expected = model(input_ids=ids).logits[0]
    torch.testing.assert_close(head.logits(states[0][0]), expected, atol=1e-6, rtol=0)
    assert find_head(model, ids) is head  # tried once


def test_logits_that_need_more_than_the_embedding_come_from_the_model(
    caplog, make_model, make_rollout
):
    """Here: a term that is made of hidden states beside the embedding."""
    model, rollout = make_model("qwen3"), make_rollout()
    decode = model.model.forward

    def forward(input_ids, attention_mask=None, position_ids=None, **options):
        output = decode(input_ids, attention_mask, position_ids, **options)
        hidden = model.model(input_ids, attention_mask, position_ids, **options)[0]
        return SimpleNamespace(
            logits=model.lm_head(hidden) + hidden[..., :1] * torch.arange(32), past_key_values=None
        ) if output else None  # fmt: skip

    model.forward = forward
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        found = completion_logprobs(model, *inputs(rollout), with_entropy=True)
        completion_logprobs(model, *inputs(rollout))
    assert sum("in memory at once" in message for message in caplog.messages) == 1
    ids = torch.cat([rollout.prompt_ids[0], rollout.completion_ids[0]])
    expected = forward(ids[None], use_cache=False).logits[0].log_softmax(-1)[3:-1]
    expected = expected.gather(1, rollout.completion_ids[0][:, None])[:, 0]
    torch.testing.assert_close(found.logprobs[0], expected, atol=1e-5, rtol=0)
