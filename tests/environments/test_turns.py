"""Several turns in a rollout, against a plain loop that reads the whole history at each token."""

import pytest
import torch

from gspo_lightning import sampling
from gspo_lightning.engine.drawing import draw
from gspo_lightning.environments import COLUMN
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import Policy
from gspo_lightning.rollout import stream_seed
from gspo_lightning.sampling import GroupSampler
from support.environments import Talker
from support.prompts import PROMPTS, batch_of

FAST = ("qwen3", "gemma2", "qwen3_next")  # windows; a cache of its own
FURTHER = ("llama", "gpt2", "mistral", "qwen3_moe", "cohere", "granite", "gpt_oss", "lfm2")
ARCHITECTURES = (*FAST, *(pytest.param(name, marks=pytest.mark.models) for name in FURTHER))
G, T, SEED, EOS = 2, 20, 7, [1, 5, 9, 13]


def policy_of(model, tokenizer):
    policy = Policy(model, tokenizer)
    policy.eos_ids = EOS  # about one token in eight, so that turns are short
    return policy


@torch.no_grad()
def loop(policy, batch, environment, max_turns, temperature=0.7):
    """Row by row and token by token: ids, drawn or not, log-probs, what was said, finished."""
    uniform = torch.rand(
        len(batch) * G, T, generator=torch.Generator().manual_seed(SEED)
    )
    rows = []
    for i in range(len(uniform)):
        prompt = batch.prompt_ids[i // G][batch.prompt_mask[i // G]].tolist()
        episode = environment.begin(
            batch.rows[i // G], stream_seed(SEED, i // G, 0, "environment")
        )
        ids, drawn, logprobs, said, turn, reward, done = [], [], [], [], [], 0.0, False
        while len(ids) < T:
            logits = policy.model(torch.tensor([prompt + ids])).logits[:, -1]
            token, logprob = draw(logits, uniform[i, len(ids)][None], temperature)
            ids.append(int(token))
            drawn.append(True)
            logprobs.append(float(logprob))
            turn.append(ids[-1])
            if ids[-1] not in EOS:
                continue
            text = policy.tokenizer.decode(turn[:-1])
            said, turn = [*said, text], []
            answer = episode.step(text)
            reward += answer.reward
            done = answer.message is None
            if done or len(said) == max_turns:
                break
            given = policy.tokenizer(answer.message)["input_ids"]
            if len(ids) + len(given) >= T:
                break
            ids += given
            drawn += [False] * len(given)
            logprobs += [0.0] * len(given)
        if turn:
            said.append(policy.tokenizer.decode(turn))
        rows.append((ids, drawn, logprobs, said, reward, done))
    return rows


def assert_same(samples, rows):
    for i, (ids, drawn, logprobs, said, reward, done) in enumerate(rows):
        length = len(ids)
        assert samples.completion_ids[i, :length].tolist() == ids, i
        assert samples.mask[i].nonzero()[:, 0].tolist() == [t for t in range(length) if drawn[t]]
        torch.testing.assert_close(
            samples.logprobs[i, :length], torch.tensor(logprobs), atol=1e-5, rtol=0
        )
        record = samples.rows[i][COLUMN]
        assert [turn["policy"] for turn in record["turns"]] == said
        plain = "\n".join(said)
        for special in ("<pad>", "<eos>", "<unk>"):
            plain = plain.replace(special, "")
        assert (samples.special_texts[i], samples.texts[i]) == ("\n".join(said), plain)
        assert (record["reward"], bool(samples.finished[i])) == (reward, done)
        assert record["tokens"] == length - sum(drawn)
    assert samples.lengths.tolist() == [len(row[0]) for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rollout_is_that_of_a_plain_loop(make_model, tokenizer, architecture):
    """Rows that come in later, messages of several tokens that hold an end of sequence."""
    policy, batch = policy_of(make_model(architecture), tokenizer), batch_of(PROMPTS)
    expected = loop(policy, batch, Talker(), max_turns=4)
    assert max(len(row[3]) for row in expected) > 2 and any(row[5] for row in expected)
    assert not all(row[5] for row in expected)
    for batch_size in (5, None):
        sampler = GroupSampler(G, T, 0.7, batch_size, environment=Talker(), max_turns=4)
        assert_same(sampler.sample(policy, batch, seed=SEED), expected)
