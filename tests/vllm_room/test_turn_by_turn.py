"""Several turns by an engine apart, against a server that answers as vLLM's does."""

import pytest
import torch

from gspo_lightning import EnvironmentReward, GSPOModule, Turn
from gspo_lightning.doctor.engine import engine
from gspo_lightning.engine.texts import Ends
from gspo_lightning.environments import COLUMN
from gspo_lightning.logprobs import samples_logprobs
from gspo_lightning.policy.policy import Policy, PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.vllm.sampler import VLLMSampler
from support.environments import Says, Talker
from support.observers import Outputs
from support.prompts import PROMPTS, batch_of
from support.tiny_models import build_model
from support.tiny_run import make_module, make_trainer, run

G, T, EOS = 3, 20, [1, 5, 9, 13]
GENERATE = "/inference/v1/generate"


@pytest.fixture
def policy(tokenizer):
    policy = Policy(build_model("qwen3"), tokenizer)
    policy.eos_ids = EOS  # about one token in eight, so that turns are short
    return policy


def reached(fake, policy, model_dir, temperature=1.0, **options):
    settings = {"environment": Talker(), "max_turns": 4} | options
    sampler = VLLMSampler(G, T, temperature, fake.url, **settings)
    sampler.reach(PolicyConfig(str(model_dir)), 32)
    sampler.take_weights(policy, 0)
    return sampler


def assert_alike(found, expected):
    for name in ("completion_ids", "mask", "finished", "lengths"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.rows == expected.rows
    assert (found.texts, found.special_texts) == (expected.texts, expected.special_texts)


def test_the_most_likely_conversation_is_that_of_the_policy_itself(fake, policy, model_dir):
    """Which is held against a plain loop; messages of several tokens with ends of sequence."""
    policy.eos_ids = [1, 5, 7, 22, 25]  # what this policy is fond of
    options = {"environment": Talker(), "max_turns": 4}
    expected = GroupSampler(G, T, 0.0, **options).sample(policy, batch_of(PROMPTS), seed=7)
    found = reached(fake, policy, model_dir, 0.0).sample(policy, batch_of(PROMPTS), seed=7)
    assert_alike(found, expected)
    assert found.logprobs is None and found.waited >= 0
    assert sum(len(row[COLUMN]["turns"]) for row in found.rows) > 2 * len(found)


def test_what_is_drawn_has_the_logprobs_of_the_whole_history(fake, policy, model_dir):
    sampler, batch = reached(fake, policy, model_dir), batch_of(PROMPTS)
    samples = sampler.sample(policy, batch, seed=7)
    own = samples_logprobs(policy.model, samples, 1.0).logprobs
    torch.testing.assert_close(own, samples.logprobs, atol=1e-5, rtol=0)  # 0 of given tokens, too
    assert (samples.lengths > samples.mask.sum(1)).sum() > 4
    again = sampler.sample(policy, batch, seed=7)
    assert_alike(again, samples)
    assert torch.equal(again.logprobs, samples.logprobs)
    assert len({*samples.texts}) > len(PROMPTS)  # completions of a prompt are not one
    assert sampler.sample(policy, batch, seed=8).texts != samples.texts


def test_no_turn_draws_what_an_earlier_one_drew(fake, policy, model_dir):
    """Each request has a seed of its own: the rest of the room, and no seed twice."""
    asked = []
    fake.extra[GENERATE] = lambda body: (
        asked.append(body) or fake.complete(body["token_ids"], body["sampling_params"])
    )
    sampler = reached(fake, policy, model_dir)
    samples = sampler.draw(policy, batch_of(PROMPTS), seed=7)
    turns = sum(len(row[COLUMN]["turns"]) for row in samples.rows)
    seeds = [body["sampling_params"]["seed"] for body in asked]
    assert len(asked) == len(set(seeds)) == turns > len(samples)
    prompts = samples.prompt_mask.sum(1).tolist()
    for body in asked:
        longest = len(body["token_ids"]) + body["sampling_params"]["max_tokens"]
        assert body["sampling_params"]["n"] == 1 and longest - T in prompts


@pytest.mark.parametrize("early", [False, True])
def test_turns_end_where_the_policys_own_reader_says(fake, tokenizer, model_dir, early):
    """The server draws on behind a stop string, or stops where there is none."""
    policy = Policy(build_model("qwen3"), tokenizer)
    policy.ends = Ends(tokenizer, ["44444"])

    def three_tokens(body):
        how = body["sampling_params"] | {
            "max_tokens": min(3, body["sampling_params"]["max_tokens"])
        }
        answer = fake.complete(body["token_ids"], how)
        return {"choices": [each | {"finish_reason": "stop"} for each in answer["choices"]]}

    if early:
        fake.extra[GENERATE] = three_tokens
    options = {"environment": Says(lambda row, text: Turn("7-")), "max_turns": 4}
    expected = GroupSampler(G, T, 0.0, **options).sample(policy, batch_of(PROMPTS), seed=7)
    sampler = reached(fake, policy, model_dir, 0.0, **options)
    assert_alike(sampler.sample(policy, batch_of(PROMPTS), seed=7), expected)
    assert sum(row[COLUMN]["tokens"] for row in expected.rows) > 4


def test_probes_of_the_engine_ask_no_environment(fake, policy, model_dir):
    def never(row, text):
        raise AssertionError("asked")

    sampler = reached(fake, policy, model_dir, environment=Says(never))
    sampler.measure(policy, batch_of(PROMPTS))
    assert sampler.figures["sampler/noise_after_sync"] < 1e-5
    module = make_module(
        model_dir, sampler=sampler, rewards={"earned": RewardTerm(EnvironmentReward())}
    )
    module.policy, module.send_weights = policy, lambda: None
    finding = engine(module, [[5, 6, 7], [8, 9]])
    assert finding.status == "ok" and finding.value["same"] == 2


def test_a_run_trains_with_turns_and_its_checkpoint_names_no_server(fake, model_dir, tmp_path):
    seen, environment = Outputs(), Talker()
    sampler = VLLMSampler(4, T, server=fake.url, environment=environment, max_turns=3)
    rewards = {"earned": RewardTerm(EnvironmentReward())}
    module = run(tmp_path, model_dir, 2, callbacks=[seen], sampler=sampler, rewards=rewards)
    for outputs in seen.all:
        figures, rollout = outputs["metrics"], outputs["rollout"]
        episodes = [row[COLUMN] for row in rollout.rows]
        assert figures["env/turns"] == sum(len(e["turns"]) for e in episodes) / 16 > 1
        assert figures["policy/sampler_noise"] < 1e-5 and figures["time/environment"] > 0
        assert rollout.reward_parts["earned"].tolist() == [e["reward"] for e in episodes]
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(module)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    again = GSPOModule.load_from_checkpoint(path, rewards=rewards, weights_only=True)
    assert isinstance(again.sampler, GroupSampler)
    assert (again.sampler.max_turns, again.sampler.max_new_tokens) == (3, T)
    with pytest.raises(ValueError, match=r"support\.environments\.Talker is named here"):
        again.sampler.environment.begin({}, 0)
