"""Where the log-probs of the sampling policy come from, and what that costs."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.objectives import Objective
from gspo_lightning.old_logprobs import OldLogProbs
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.update import Updater
from support.steps import replace_model, replace_policy_passes
from support.tiny_run import run


class Outputs(Callback):
    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.all.append(outputs)


class Telling(GroupSampler):
    """Gives log-probs that are off by a random ``noise``, or none at all."""

    def __init__(self, noise=0.0, **options):
        super().__init__(**({"group_size": 4, "max_new_tokens": 6} | options))
        self.noise = noise

    @torch.no_grad()
    def sample(self, policy, batch, *, seed):
        samples = super().sample(policy, batch, seed=seed)
        if self.noise is None:
            return replace(samples, logprobs=None)
        exact = completion_logprobs(
            policy.model,
            samples.prompt_ids,
            samples.prompt_mask,
            samples.completion_ids,
            samples.mask,
            temperature=self.temperature,
        ).logprobs
        generator = torch.Generator().manual_seed(seed)
        # the same error in all tokens of a row, so that this is the noise of log s, too
        noise = self.noise * torch.randn(len(exact), 1, generator=generator)
        told = (exact + noise).float().masked_fill(~samples.mask, 0)
        return replace(samples, logprobs=told)


def rollouts(tmp_path, model_dir, noise=0.0, count=1, **options):
    keep = Outputs()
    run(tmp_path, model_dir, count, [keep], **({"sampler": Telling(noise)} | options))
    return keep.all


@pytest.fixture
def passes(monkeypatch):
    """Rows of each forward pass of the policy, by whether it had a gradient."""
    seen = {True: [], False: []}

    def make(plain):
        def spy(model, *arguments, **options):
            seen[torch.is_grad_enabled()].append(len(arguments[0]))
            return plain(model, *arguments, **options)

        return spy

    replace_policy_passes(monkeypatch, make)
    return seen


# a clip range of 3e-4 and 4e-4: noise must stay below 1 % of 3e-4
@pytest.mark.parametrize(("noise", "sampler"), [(0.0, 1.0), (5e-7, 1.0), (3e-5, 0.0)])
def test_noise_decides_and_is_logged(tmp_path, model_dir, passes, noise, sampler):
    (outputs,) = rollouts(tmp_path, model_dir, noise)
    metrics = outputs["metrics"]
    assert metrics["policy/old_from_sampler"] == sampler
    # by four rows only, on top of what float32 itself has
    assert metrics["policy/sampler_noise"] == pytest.approx(noise, rel=0.9, abs=5e-7)
    # 16 rows in two mini-batches: a look at 4 rows; a pass, if any, over what is not the first
    assert passes[False] == ([4] if sampler else [4, 8])
    assert passes[True] == [8, 8]


def test_a_wider_clip_range_puts_up_with_more_noise(tmp_path, model_dir):
    objective = Objective(clip_low=0.05, clip_high=0.05)
    (outputs,) = rollouts(tmp_path, model_dir, 1e-4, objective=objective)
    assert outputs["metrics"]["policy/old_from_sampler"] == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_takes_the_sampler_and_bfloat16_does_not(tmp_path, model_dir, monkeypatch, dtype):
    """An engine with less rounding than the update: what differs is the policy's own precision."""
    tell = Telling.sample

    def finer(self, policy, batch, *, seed):
        model = copy.deepcopy(policy.model).double()
        model.config._attn_implementation = "sdpa"
        return tell(self, replace_model(policy, model), batch, seed=seed)

    monkeypatch.setattr(Telling, "sample", finer)
    policy = PolicyConfig(str(model_dir), dtype=dtype)
    (outputs,) = rollouts(tmp_path, model_dir, policy=policy)
    noise = outputs["metrics"]["policy/sampler_noise"]
    assert outputs["metrics"]["policy/old_from_sampler"] == (dtype == "float32")
    assert noise < 1e-6 if dtype == "float32" else noise > 1e-4


@pytest.mark.parametrize("objective", [Objective(), Objective("token", clip_low=9e-1, clip_high=9)])
def test_bfloat16_never_takes_the_sampler_of_itself(tmp_path, model_dir, objective):
    """Not even where the noise of a few rows is below 1 % of a wide range."""
    policy = PolicyConfig(str(model_dir), dtype="bfloat16")
    (outputs,) = rollouts(tmp_path, model_dir, policy=policy, objective=objective)
    assert outputs["metrics"]["policy/old_from_sampler"] == 0.0
    assert "policy/ratio_noise" in outputs["metrics"]  # the pass covers the first mini-batch, too


def test_cispo_has_an_upper_bound_only_and_takes_the_sampler(tmp_path, model_dir):
    objective = Objective("token", "cispo", "token_mean", clip_low=0.0, clip_high=4.0)
    (outputs,) = rollouts(tmp_path, model_dir, objective=objective)
    assert outputs["metrics"]["policy/old_from_sampler"] == 1.0


def test_noise_is_that_of_the_ratio_in_use(tmp_path, model_dir):
    """The same error in all n tokens of a row: n times as much in their sum."""
    objective = Objective("sequence_sum", clip_low=0.2, clip_high=0.2)
    (of_sum,) = rollouts(tmp_path, model_dir, 1e-3, objective=objective)
    (of_mean,) = rollouts(tmp_path, model_dir, 1e-3)
    mean, total = (o["metrics"]["policy/sampler_noise"] for o in (of_mean, of_sum))
    assert 2 * mean < total <= 6 * mean * 1.001  # completions of at most 6 tokens


def test_a_skipped_first_step_leaves_the_next_one_on_policy(tmp_path, model_dir, monkeypatch):
    """Its weights have not moved either, so its ratios are exactly 1."""
    update, seen = Updater.update, []

    def first_skipped(self, rollout, rows, step):
        seen.append(step.moved)
        if len(seen) == 1:
            return rollout, torch.ones(len(rows))
        return update(self, rollout, rows, step)

    monkeypatch.setattr(Updater, "update", first_skipped)
    (outputs,) = rollouts(tmp_path, model_dir, 0.1, old_logprobs="sampler")
    assert seen == [False, False]
    assert torch.equal(outputs["ratios"], torch.ones(16))


def test_the_decision_is_made_once_a_rollout(tmp_path, model_dir, monkeypatch):
    """A rank that repeats its pass for want of memory must not wait for sums with the others."""
    find, sums = OldLogProbs.find, []

    def again(self, samples, step):
        plain = step.ranks.sum

        def counted(x):
            sums.append(step.index)
            return plain(x)

        step.ranks = replace(step.ranks, sum=counted)
        first = find(self, samples, step)
        asked = len(sums)
        second = find(self, samples, step)
        assert asked > 0 and len(sums) == asked
        assert torch.equal(second.logprobs, first.logprobs)
        assert torch.equal(second.known, first.known)
        step.ranks = replace(step.ranks, sum=plain)
        return first

    monkeypatch.setattr(OldLogProbs, "find", again)
    rollouts(tmp_path, model_dir, count=2)
    assert set(sums) == {0, 1}


def test_the_samplers_log_probs_are_what_the_ratios_are_of(tmp_path, model_dir):
    """A shift by 0.5 shows in the ratios as a factor exp(-0.5), but in the first step."""

    class Shifted(Telling):
        def sample(self, policy, batch, *, seed):
            samples = super().sample(policy, batch, seed=seed)
            return replace(samples, logprobs=(samples.logprobs + 0.5) * samples.mask)

    (plain,) = rollouts(tmp_path, model_dir, old_logprobs="recompute")
    (shifted,) = rollouts(tmp_path, model_dir, sampler=Shifted(), old_logprobs="sampler")
    (checked,) = rollouts(tmp_path, model_dir, sampler=Shifted())
    first = plain["ratios"] == 1
    assert first.sum() == 8
    torch.testing.assert_close(shifted["ratios"][first], torch.ones(8), atol=0, rtol=0)
    expected = plain["ratios"][~first] * torch.tensor(-0.5).exp()
    torch.testing.assert_close(shifted["ratios"][~first], expected, atol=1e-5, rtol=0)
    # a shift has no spread; auto sees it all the same
    assert checked["metrics"]["policy/sampler_noise"] == pytest.approx(0.5, abs=1e-5)
    assert torch.equal(checked["ratios"], plain["ratios"])


def test_one_step_needs_no_log_probs_of_the_past(tmp_path, model_dir, passes):
    (outputs,) = rollouts(tmp_path, model_dir, None, num_minibatches=1)
    assert passes[False] == [] and torch.equal(outputs["ratios"], torch.ones(16))
    assert (outputs["rollout"].old_logprobs == 0).all()
    assert "policy/ratio_noise" not in outputs["metrics"]


def test_recompute_means_every_row(tmp_path, model_dir, passes):
    (outputs,) = rollouts(tmp_path, model_dir, old_logprobs="recompute", num_minibatches=4)
    assert passes[False] == [4, 4, 4, 4]
    assert outputs["metrics"]["policy/ratio_noise"] == 0.0
    rollout = outputs["rollout"]
    assert (rollout.old_logprobs[rollout.mask] < 0).all()
    assert "policy/sampler_noise" not in outputs["metrics"]


def test_a_sampler_without_log_probs_costs_a_pass(tmp_path, model_dir, passes):
    (outputs,) = rollouts(tmp_path, model_dir, None, num_minibatches=4)
    assert passes[False] == [4, 4, 4]
    assert outputs["metrics"]["policy/old_from_sampler"] == 0.0
    with pytest.raises(ValueError, match="old_logprobs is sampler, but Telling returns no"):
        rollouts(tmp_path, model_dir, None, old_logprobs="sampler")


def test_later_epochs_have_the_same_old_log_probs(tmp_path, model_dir, passes):
    """What the first step spared is then needed: all rows are computed, and no ratio is NaN."""
    (outputs,) = rollouts(tmp_path, model_dir, None, num_epochs=2)
    assert passes[False] == [8, 8]
    assert outputs["ratios"].isfinite().all() and (outputs["ratios"] != 1).all()


@pytest.mark.parametrize("options", [{}, {"num_minibatches": 1}, {"micro_batch_tokens": 40}])
def test_every_choice_gives_the_same_run(tmp_path, model_dir, options):
    """Entropy, KL and gradients of two rollouts, up to rounding; auto is without a pass here."""
    options = {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.1} | options
    found = {}
    for old in ("auto", "recompute", "sampler"):
        found[old] = rollouts(tmp_path, model_dir, count=2, old_logprobs=old, **options)
    for other in ("auto", "sampler"):
        for a, b in zip(found[other], found["recompute"], strict=True):
            torch.testing.assert_close(a["ratios"], b["ratios"], atol=1e-5, rtol=0)
            for name in ("train/kl_divergence", "policy/entropy", "policy/grad_norm"):
                assert a["metrics"][name] == pytest.approx(b["metrics"][name], rel=1e-3, abs=1e-7)


def test_recomputed_log_probs_have_the_bits_of_the_update_for_a_token_budget(tmp_path, model_dir):
    """Fact 18: the same micro-batches, although these are in an order of their own."""
    options = {"micro_batch_tokens": 25, "old_logprobs": "recompute"}
    (outputs,) = rollouts(tmp_path, model_dir, **options)
    assert outputs["metrics"]["policy/ratio_noise"] == 0.0
    assert (outputs["ratios"] == 1).sum() == 8


def test_a_token_budget_cuts_micro_batches(tmp_path, model_dir, passes):
    rollouts(tmp_path, model_dir, num_minibatches=1, micro_batch_tokens=12)
    assert len(passes[True]) > 4 and sum(passes[True]) == 16
