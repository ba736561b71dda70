"""What a real engine is put through; as a program, vLLM in a process that it has for itself."""

import json

import torch

from gspo_lightning.environments import ScriptedUser
from gspo_lightning.logprobs import samples_logprobs
from gspo_lightning.policy.policy import PolicyConfig, load_policy
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.vllm.local import EngineConfig
from gspo_lightning.vllm.sampler import VLLMSampler
from support.prompts import batch_of
from support.repository import ROOT

QUICK = {"enforce_eager": True, "gpu_memory_utilization": 0.03}
FOLDER = "data/arithmetic/policy"
LONGEST = 72


def policy_of(folder=FOLDER):
    return load_policy(PolicyConfig(str(ROOT / folder)))


def prompts_of(policy, count=32):
    lines = (ROOT / "data/arithmetic/train.jsonl").read_text().splitlines()[:count]
    texts = [line.split('"')[3] for line in lines]
    return batch_of([policy.tokenizer(text)["input_ids"] for text in texts])


def greedy(policy, batch: PromptBatch):
    """The texts that transformers' own `generate` writes."""
    ids = policy.model.generate(
        batch.prompt_ids,
        attention_mask=batch.prompt_mask.long(),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=policy.eos_ids,
        pad_token_id=policy.pad_id,
    )
    return policy.tokenizer.batch_decode(ids[:, batch.prompt_ids.shape[1] :], True)


def update(policy, step):
    """One real step of AdamW, as large as those of a run."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    ids = torch.randint(2, 18, (4, 12), generator=torch.Generator().manual_seed(step))
    policy.model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def shows_its_worth(sampler):
    """Greedy texts, noise and seeds of an engine that has been reached, over three updates."""
    policy = policy_of()
    batch, agree, noise = prompts_of(policy), [], []
    for steps in range(4):
        sampler.take_weights(policy, steps)
        found = sampler.like(1, 40, 0.0).sample(policy, batch, seed=0).texts
        agree.append(sum(a == b for a, b in zip(found, greedy(policy, batch), strict=True)))
        noise.append(sampler.figures["sampler/noise_after_sync"])
        first, again = (sampler.sample(policy, batch, seed=7) for _ in range(2))
        assert torch.equal(first.completion_ids, again.completion_ids)
        assert torch.equal(first.logprobs, again.logprobs)
        update(policy, steps)
    print(f"greedy like transformers: {agree} of 32; noise {max(noise):.1e} nats")
    assert agree == [32] * 4
    assert max(noise) < 1e-5
    few = PromptBatch(batch.prompt_ids[:1], batch.prompt_mask[:1], batch.rows[:1])
    alone = sampler.sample(policy, few, seed=7)
    assert first.texts[: sampler.group_size] == alone.texts


def reads_more_than_fits_into_a_step(sampler):
    """Prompts of 9,600 tokens: vLLM's build for CPUs fails where it reads one of them in parts."""
    policy = policy_of()
    sampler.take_weights(policy, 0, anew=True)
    ids = torch.randint(2, 18, (300, 32), generator=torch.Generator().manual_seed(0))
    batch, sampler = batch_of(ids.tolist()), sampler.like(1, 4, 1.0)
    samples = sampler.sample(policy, batch, seed=7)
    few = PromptBatch(batch.prompt_ids[:2], batch.prompt_mask[:2], batch.rows[:2])
    assert samples.texts[:2] == sampler.sample(policy, few, seed=7).texts


def talks_like_the_policy(sampler):
    """Conversations with a scripted user: greedily those of the policy's own sampler."""
    policy = policy_of()
    lines = (ROOT / "data/turns/heldout.jsonl").read_text().splitlines()[:32]
    rows = [json.loads(line) for line in lines]
    ids = batch_of([policy.tokenizer(row["prompt"])["input_ids"] for row in rows])
    batch = PromptBatch(ids.prompt_ids, ids.prompt_mask, rows)
    sampler.environment, sampler.max_turns = ScriptedUser(), 4
    sampler.take_weights(policy, 0, anew=True)
    expected = GroupSampler(1, 40, 0.0, environment=ScriptedUser(), max_turns=4)
    expected = expected.sample(policy, batch, seed=0)
    found = sampler.like(1, 40, 0.0).sample(policy, batch, seed=0)
    assert found.rows == expected.rows and torch.equal(found.mask, expected.mask)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    turns = sum(len(row["episode"]["turns"]) for row in found.rows)
    assert turns > 2 * len(rows)
    first, again = (sampler.sample(policy, batch, seed=7) for _ in range(2))
    assert first.rows == again.rows and torch.equal(first.logprobs, again.logprobs)
    own = samples_logprobs(policy.model, first, 1.0).logprobs
    off = (own - first.logprobs)[first.mask].abs().max().item()
    print(f"{turns} turns in {len(rows)} conversations; log-probs off by {off:.1e} nats at most")
    assert off < 1e-4


if __name__ == "__main__":  # it leaves groups and patches behind
    sampler = VLLMSampler(4, 40, engine=EngineConfig(**QUICK))
    sampler.reach(PolicyConfig(str(ROOT / FOLDER)), LONGEST)
    shows_its_worth(sampler)
    reads_more_than_fits_into_a_step(sampler)
    talks_like_the_policy(sampler)
