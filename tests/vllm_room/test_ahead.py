"""Sampling one rollout ahead: whose weights draw, what overlaps, what a checkpoint keeps."""

import copy
import gzip
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy

from gspo_lightning import FSDP2, AsyncSampler, GroupSampler, Mismatch, RolloutCheckpoint
from gspo_lightning.compare.lag import AtOnce
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.environments.games import GuessNumber
from gspo_lightning.rollout import stream_seed
from gspo_lightning.run.tracing import RolloutProfile
from gspo_lightning.sampling import Sampler
from support.apart import ForkedSampler
from support.forked import on_ranks
from support.observers import Outputs
from support.steps import replace_model
from support.tiny_run import make_module, make_trainer, run, write_prompts

MISMATCH = Mismatch("sequence", cap=2.0)


class Policies(Callback):
    """A copy of the policy before each rollout, and the prompts."""

    def __init__(self):
        self.all, self.batches = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.all.append(replace_model(module.policy, copy.deepcopy(module.policy.model)))
        self.batches.append(batch)


def fit(root, model_dir, num_rollouts, callbacks=(), ckpt=None, trainer=None, **options):
    root.mkdir(exist_ok=True)
    options = {"sampler": AsyncSampler(ForkedSampler()), "mismatch": MISMATCH} | options
    module = make_module(model_dir, **options)
    path = write_prompts(root / "prompts.jsonl")
    data = PromptData(str(path), prompts_per_rollout=4, num_rollouts=num_rollouts)
    callbacks = [*callbacks, RolloutCheckpoint(every_n_rollouts=1, keep_last=9)]
    settings = {"callbacks": callbacks, "enable_checkpointing": True, **(trainer or {})}
    make_trainer(root, **settings).fit(module, data, ckpt_path=ckpt)
    return module


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model_dir):
    """Four rollouts: folder, module, outputs, policies."""
    root, outputs, policies = tmp_path_factory.mktemp("straight"), Outputs(), Policies()
    return root, fit(root, model_dir, 4, [outputs, policies]), outputs.all, policies


def test_each_rollout_is_drawn_by_the_policy_of_the_rollout_before(straight):
    _, _, outputs, policies = straight
    sampler = GroupSampler(group_size=4, max_new_tokens=6)
    for index, (output, batch) in enumerate(zip(outputs, policies.batches, strict=True)):
        drew = policies.all[max(0, index - 1)]
        seed = stream_seed(0, index, 0, "sample/0")
        samples, rollout = sampler.sample(drew, batch, seed=seed), output["rollout"]
        assert torch.equal(samples.completion_ids, rollout.completion_ids)
        assert torch.equal(samples.logprobs, rollout.logprobs)
        assert samples.rows == rollout.rows
        figures = output["metrics"]
        assert figures["sampler/version_lag"] == (index > 0)
        assert (figures["sampler/kl"] > 1e-4) == (index > 0)
        assert figures["time/sync"] > 0
    assert outputs[0]["metrics"]["sampler/ess"] == pytest.approx(1, abs=1e-5)
    assert outputs[2]["metrics"]["sampler/ess"] < 0.99


def test_a_run_that_goes_on_has_the_completions_that_were_under_way(straight, tmp_path, model_dir):
    root, module, outputs, _ = straight
    again = Outputs()
    checkpoint = root / "checkpoints" / "rollout=000002.ckpt"
    resumed = fit(tmp_path / "run", model_dir, 4, [again], ckpt=checkpoint)
    assert [output["metrics"]["sampler/version_lag"] for output in again.all] == [1, 1]
    for mine, other in zip(again.all, outputs[2:], strict=True):
        assert torch.equal(mine["rollout"].completion_ids, other["rollout"].completion_ids)
        assert torch.equal(mine["ratios"], other["ratios"])
    for left, right in zip(resumed.policy.parameters(), module.policy.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(straight, tmp_path, model_dir):
    _, _, outputs, _ = straight
    root, again = tmp_path / "run", Outputs()
    fit(root, model_dir, 1)
    checkpoint = root / "checkpoints" / "rollout=000001.ckpt"
    fit(root, model_dir, 2, [again], ckpt=checkpoint)
    (output,) = again.all
    assert torch.equal(output["rollout"].completion_ids, outputs[1]["rollout"].completion_ids)


def test_completions_that_failed_cost_no_checkpoint_and_end_the_next_rollout(tmp_path, model_dir):
    root = tmp_path / "run"
    with pytest.raises(EOFError):  # what the engine ended with
        fit(root, model_dir, 3, sampler=AsyncSampler(ForkedSampler(broken=True)))
    (checkpoint,) = (root / "checkpoints").glob("*.ckpt")
    outputs = Outputs()
    fit(root, model_dir, 2, [outputs], ckpt=checkpoint)
    assert [output["metrics"]["sampler/version_lag"] for output in outputs.all] == [0]


class Waiting(AtOnce):
    """Has its completions only once an optimizer step is taken, which is behind the call."""

    def __init__(self, step):
        super().__init__(group_size=4, max_new_tokens=6)
        self.step = step

    def begin(self, policy, batch, *, seed):
        self.step.clear()
        done = super().begin(policy, batch, seed=seed)

        def result():
            assert self.step.wait(timeout=60), "nothing was updated while completions were drawn"
            return done.result()

        return SimpleNamespace(result=result)


@pytest.mark.slow
def test_a_trace_shows_sampling_beside_the_update(tmp_path, model_dir):
    step = threading.Event()
    told = LambdaCallback(on_before_optimizer_step=lambda *_: step.set())
    run(tmp_path, model_dir, 2, [RolloutProfile(1), told], sampler=AsyncSampler(Waiting(step)))
    (path,) = (tmp_path / "profile").glob("*.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = ("sync", "ahead", "optimise")
    # before the rollout nothing is sent, as it was drawn ahead
    (_, sync), (ahead,), (update,) = ([e for e in events if e.get("name") == n] for n in names)
    # The thread may begin before the call that started it is back.
    assert sync["ts"] < ahead["ts"] < update["ts"] < ahead["ts"] + ahead["dur"]
    assert sync["tid"] == update["tid"] != ahead["tid"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDPStrategy, FSDP2])
def test_two_ranks_share_one_mean_of_weights_and_go_on_each_with_its_own(
    tmp_path, model_dir, strategy
):
    def train(rank, name, ckpt=None):
        outputs = Outputs()
        settings = {"devices": 2, "strategy": strategy(process_group_backend="gloo")}
        options = {"sampler": AsyncSampler(AtOnce(group_size=4, max_new_tokens=6))}
        settings["use_distributed_sampler"] = False
        fit(tmp_path / name, model_dir, 3, [outputs], ckpt, settings, **options)
        return [
            (out["metrics"], out["rollout"].completion_ids.tolist(), out["ratios"].tolist())
            for out in outputs.all
        ]

    first, second = on_ranks(train, "straight", seconds=100)
    for (figures, ids, _), (others, other_ids, _) in zip(first, second, strict=True):
        assert figures["sampler/weight_mean"] == pytest.approx(1, abs=1e-6)  # over both ranks
        assert figures["sampler/ess"] == others["sampler/ess"]
        assert ids != other_ids
    assert first[1][0]["sampler/ess"] < 0.999
    checkpoint = tmp_path / "straight" / "checkpoints" / "rollout=000001.ckpt"
    again = on_ranks(train, "again", checkpoint, seconds=100)
    for straight, resumed in zip((first, second), again, strict=True):
        assert [rest for _, *rest in resumed] == [rest for _, *rest in straight[1:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"inner": GroupSampler()},
            r"sampler.inner: GroupSampler samples in this process",
        ),
        ({"inner": ForkedSampler(), "lag": 2}, r"sampler.lag must be 0 or 1, got 2"),
        (
            {"inner": GroupSampler(environment=GuessNumber()), "lag": 0},
            r"sampler.inner.environment: AsyncSampler keeps no episodes; take",
        ),
    ],
)
def test_what_cannot_be_ahead_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AsyncSampler(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_flat_groups": True}, "drop_flat_groups draws prompts by their rewards"),
        ({"old_logprobs": "sampler"}, "old_logprobs cannot be sampler with"),
    ],
)
def test_what_does_not_go_with_it_is_refused(model_dir, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(model_dir, sampler=AsyncSampler(ForkedSampler()), **options)
    make_module(model_dir, sampler=AsyncSampler(GroupSampler(), lag=0), **options)


def test_a_config_may_name_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampler", type=Sampler)
    inner = {"class_path": "gspo_lightning.GroupSampler", "init_args": {"group_size": 3}}
    asked = {"class_path": "gspo_lightning.AsyncSampler", "init_args": {"inner": inner, "lag": 0}}
    made = parser.instantiate(parser.parse_object({"sampler": asked})).sampler
    assert isinstance(made, AsyncSampler) and made.group_size == 3
