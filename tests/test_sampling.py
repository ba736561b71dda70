"""The sampler, against transformers' generate and the distribution it claims to draw from."""

import inspect

import pytest
import torch

from gspo_lightning.policy.policy import Policy, checkpoint_activations
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler
from support.passes import tried
from support.prompts import PROMPTS, batch_of

EVERY = (
    *("qwen3", "llama", "gpt2", "gemma2", "mistral", "qwen3_moe", "cohere", "granite", "gpt_oss"),
    *("qwen3_next", "lfm2"),
)


@pytest.fixture(params=["qwen3", "gpt2", "gemma2", "llama"])
def policy(request, make_model, tokenizer):
    return Policy(make_model(request.param), tokenizer)


@pytest.mark.parametrize("architecture", EVERY)
def test_greedy_completions_are_those_of_generate(make_model, tokenizer, architecture):
    policy = Policy(make_model(architecture), tokenizer)
    batch = batch_of(PROMPTS)
    samples = GroupSampler(1, 12, temperature=0.0).sample(policy, batch, seed=0)
    expected = policy.model.generate(
        batch.prompt_ids,
        attention_mask=batch.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
    )[:, batch.prompt_ids.shape[1] :]
    assert torch.equal(
        samples.completion_ids[samples.mask], expected[:, : samples.mask.shape[1]][samples.mask]
    )
    ended = (expected == 1).any(1)
    assert torch.equal(samples.finished, ended)


def test_a_row_does_not_depend_on_its_batch(policy):
    batch = batch_of(PROMPTS)
    whole = GroupSampler(3, 12).sample(policy, batch, seed=7)
    for batch_size in (1, 2, 5):
        cut = GroupSampler(3, 12, batch_size=batch_size).sample(policy, batch, seed=7)
        assert cut.texts == whole.texts


def test_left_padding_changes_no_completion(policy):
    # fact 17: positions come from the mask
    short = batch_of(PROMPTS)
    ids = torch.nn.functional.pad(short.prompt_ids, (7, 0), value=3)
    mask = torch.nn.functional.pad(short.prompt_mask, (7, 0))
    padded = PromptBatch(ids, mask, short.rows)
    sampler = GroupSampler(3, 12)
    assert (
        sampler.sample(policy, padded, seed=1).texts == sampler.sample(policy, short, seed=1).texts
    )


def test_the_seed_decides(policy):
    batch, sampler = batch_of(PROMPTS), GroupSampler(3, 12)
    first = sampler.sample(policy, batch, seed=1)
    torch.manual_seed(99)  # the global generator has no say
    assert sampler.sample(policy, batch, seed=1).texts == first.texts
    assert sampler.sample(policy, batch, seed=2).texts != first.texts


def test_rows_and_prompts_are_repeated_group_by_group(policy):
    samples = GroupSampler(3, 4).sample(policy, batch_of(PROMPTS), seed=0)
    assert [row["i"] for row in samples.rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert samples.prompt_ids[4][samples.prompt_mask[4]].tolist() == PROMPTS[1]
    assert samples.group_size == 3


def test_completions_stop_at_every_end_of_sequence_id(policy):
    # fact 22: a list of ids
    batch, sampler = batch_of(PROMPTS), GroupSampler(8, 20)
    policy.eos_ids = [1, 4, 9]
    samples = sampler.sample(policy, batch, seed=3)
    last = samples.mask.sum(1) - 1
    ends = samples.completion_ids.gather(1, last[:, None])[:, 0]
    assert set(ends[samples.finished].tolist()) == {1, 4, 9}
    before = samples.mask & (torch.arange(samples.mask.shape[1]) < last[:, None])
    assert not torch.isin(samples.completion_ids[before], torch.tensor([1, 4, 9])).any()
    assert (samples.mask.sum(1)[~samples.finished] == 20).all()


def test_padding_token_may_be_the_end_of_sequence_token(policy):
    # fact 23
    policy.pad_id = 1
    samples = GroupSampler(8, 20).sample(policy, batch_of(PROMPTS), seed=3)
    ends = (samples.completion_ids == 1) & samples.mask
    assert torch.equal(ends.sum(1), samples.finished.long())  # the one that ended it counts


def test_gradient_checkpointing_keeps_the_cache_in_rollouts(policy):
    plain = GroupSampler(2, 8).sample(policy, batch_of(PROMPTS), seed=0)
    checkpoint_activations(policy.model)
    policy.train()
    again = GroupSampler(2, 8).sample(policy, batch_of(PROMPTS), seed=0)
    assert again.texts == plain.texts
    assert policy.model.training  # the mode is given back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "sampler.group_size must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "sampler.max_new_tokens must be >= 1"),
        ({"batch_size": 0}, "sampler.batch_size must be >= 1"),
        ({"temperature": -1.0}, "sampler.temperature must be >= 0, got -1.0"),
    ],
)
def test_the_constructor_names_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        GroupSampler(**options)


@pytest.mark.parametrize("name", ["top_p", "top_k", "repetition_penalty"])
def test_other_shapes_of_the_distribution_are_not_offered(name):
    # fact 21
    with pytest.raises(TypeError, match=name):
        GroupSampler(**{name: 0.9})


def test_decoding_stops_when_every_row_has_ended_by_any_id(policy, monkeypatch):
    policy.eos_ids = list(range(32))
    calls = []
    forward = tried(policy.model).forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(policy.model, "forward", counted)
    samples = GroupSampler(4, 20).sample(policy, batch_of(PROMPTS), seed=0)
    assert samples.mask.shape[1] == 1 and len(calls) == 1  # the prompts, and nothing after them
