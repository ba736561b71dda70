"""Attention to a cache by torch's kernel: where it reads, what it is asked, how two parts meet."""

import copy

import pytest
import torch

from gspo_lightning.engine import flash
from gspo_lightning.engine.attention import open_attention
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import Policy
from gspo_lightning.sampling import GroupSampler
from support.prompts import PROMPTS, batch_of


def written_out(query, keys, values, ends, starts, most, seen, *_, scale, seqused_k):
    """What the kernel computes, text by text: grouped heads, all is seen."""
    assert seqused_k.max() <= seen and ends.dtype == starts.dtype == seqused_k.dtype == torch.int32
    outputs, totals = [], []
    for i, used in enumerate(seqused_k.tolist()):
        q = query[ends[i] : ends[i + 1]].transpose(0, 1)
        assert q.shape[1] == most and used >= 1
        part = slice(starts[i], starts[i] + used)
        repeats = len(q) // keys.shape[1]
        k, v = (x[part].repeat_interleave(repeats, 1).transpose(0, 1) for x in (keys, values))
        scores = (q @ k.mT * scale).float()
        totals.append(scores.logsumexp(-1))
        outputs.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs), torch.cat(totals, 1)


@pytest.fixture
def on_any_device(monkeypatch):
    """Let the kernel be asked on the CPU, in float32, and count how often it is."""
    calls = []

    def kernel(*args, **options):
        calls.append(args)
        return written_out(*args, **options)

    def fits(query, window, seen, softcap=None, s_aux=None, **_):
        return softcap is None and s_aux is None and (window is None or window >= seen)

    monkeypatch.setattr(flash, "kernel", kernel)
    monkeypatch.setattr(flash, "fits", fits)
    return calls


def test_two_parts_of_a_text_meet_in_one_softmax():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 4, 8, generator=generator)
    keys, values = torch.randn(2, 3, 2, 5, 8, generator=generator)  # three slots, room for five
    used = torch.tensor([1, 5, 3], dtype=torch.int32)
    whole = flash.attend  # by the kernel written out, two tokens a slot
    expected = []
    for slot, length in enumerate(used.tolist()):
        q = query[2 * slot : 2 * slot + 2].transpose(0, 1)
        k, v = (x[slot, :, :length].repeat_interleave(2, 0) for x in (keys, values))
        expected.append(((q @ k.mT * 0.5).softmax(-1) @ v).transpose(0, 1))
    try:
        kept, flash.kernel = flash.kernel, written_out
        output, total = whole(query, keys, values, 2, used, 5, 0.5)
        torch.testing.assert_close(output, torch.cat(expected))
        # the same keys in two parts
        first, last = keys[:, :, :1].contiguous(), keys[:, :, 1:].contiguous()
        parts = [
            whole(query, k, v.contiguous(), 2, n.int(), 5, 0.5)
            for k, v, n in (
                (first, values[:, :, :1], torch.ones(3)),
                (last, values[:, :, 1:], torch.full((3,), 4)),
            )
        ]
        everything = whole(query, keys, values, 2, torch.full((3,), 5, dtype=torch.int32), 5, 0.5)
        torch.testing.assert_close(flash.meet(*parts), everything[0])
    finally:
        flash.kernel = kept
    assert total.shape == (4, 6)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [7, None])
def test_the_kernel_draws_what_the_softmax_written_out_draws(
    make_model, tokenizer, monkeypatch, on_any_device, architecture, batch_size
):
    """Rows that end, move and come in later; caps are left to the softmax."""
    model = make_model(architecture)
    assert open_attention(model)
    policy = Policy(model, tokenizer)
    policy.eos_ids = [1, 5, 9, 13]
    batch = batch_of([*PROMPTS, list(range(3, 12))])
    sampler = GroupSampler(3, 20, batch_size=batch_size)
    samples = sampler.sample(policy, batch, seed=7)
    assert bool(on_any_device) == (architecture != "gemma2")  # which caps its scores
    monkeypatch.setattr(flash, "fits", lambda *_, **__: False)
    expected = sampler.sample(policy, batch, seed=7)
    assert torch.equal(samples.completion_ids, expected.completion_ids)
    torch.testing.assert_close(samples.logprobs, expected.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "window", "options"),
    [
        ({"dtype": torch.float32}, None, {}),
        ({}, 9, {}),
        ({}, None, {"softcap": 5.0}),
        ({}, None, {"s_aux": torch.zeros(1)}),
        ({"size": 12}, None, {}),
        ({"size": 264}, None, {}),
        ({"is_cuda": False}, None, {}),
    ],
)
def test_what_the_kernel_does_not_compute_is_left_to_the_softmax(change, window, options):
    class Query:
        def __init__(self, dtype=torch.bfloat16, size=64, is_cuda=True):
            self.dtype, self.shape, self.is_cuda = dtype, (1, 1, 1, size), is_cuda

    assert flash.fits(Query(), None, 10) and flash.fits(Query(), 10, 10, scaling=0.1)
    assert not flash.fits(Query(**change), window, 10, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("heads", [(16, 8), (4, 4), (8, 1)])
def test_on_a_card_the_kernel_is_as_exact_as_its_numbers(dtype, tokens, heads):
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    query = torch.randn(5 * tokens, heads[0], 64, **options)
    keys, values = torch.randn(2, 7, heads[1], 40, 64, **options)
    used = torch.tensor([1, 40, 3, 17, 40], dtype=torch.int32, device="cuda")
    arguments = (tokens, used, 40, 0.125)
    output, total = flash.attend(query, keys, values, *arguments)
    exact, kept = [x.double() for x in (query, keys, values)], flash.kernel
    try:
        flash.kernel = written_out
        expected, expected_total = flash.attend(*exact, *arguments)
    finally:
        flash.kernel = kept
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(total, expected_total.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_on_a_card_in_half_precision_the_sampled_logprobs_are_the_models(
    make_model, tokenizer, caplog, architecture, graphs
):
    model = make_model(architecture)
    exact = copy.deepcopy(model)
    assert open_attention(model)
    policy = Policy(model.to("cuda", torch.bfloat16), tokenizer)
    policy.eos_ids = [1, 5, 9, 13]
    batch = batch_of([*PROMPTS, list(range(3, 12))]).to("cuda")
    sampler = GroupSampler(3, 20, batch_size=7, cuda_graphs=graphs)
    samples = sampler.sample(policy, batch, seed=7).to("cpu")
    parts = samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.mask
    expected = completion_logprobs(exact, *parts, temperature=1.0).logprobs
    assert (samples.logprobs - expected).abs().max() < 0.1
    assert not [record for record in caplog.records if "one by one" in record.message]
