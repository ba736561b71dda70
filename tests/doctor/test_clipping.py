"""The clip advisor: its range by hand, its trial update, and how it is undone."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.doctor.clipping import Trial, clipping, trial
from gspo_lightning.doctor.examine import QUICK, Effort, effort_for
from gspo_lightning.doctor.findings import announced
from gspo_lightning.doctor.numbers import as_rollout
from gspo_lightning.objectives import Objective, clipped
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.rollout import Samples
from support.tiny_run import make_module, write_prompts


def test_the_share_counts_tokens_on_the_clipped_side():
    """Above the range with a positive advantage, or below it with a negative one."""
    done = Trial(
        log_s=torch.tensor([0.01, 0.01, -0.01, -0.01, 0.0]),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]),
        lengths=torch.tensor([1, 2, 3, 4, 10]),
    )
    assert done.clipped(0.005, 0.005).tolist() == [True, False, False, True, False]
    assert done.share(0.005, 0.005) == 5 / 20
    assert done.share(0.005, 0.02) == 4 / 20
    assert done.share(0.02, 0.02) == 0


def test_the_share_is_that_of_the_objective():
    generator = torch.Generator().manual_seed(0)
    log_s = 1e-3 * torch.randn(50, generator=generator)
    advantages = torch.randn(50, generator=generator)
    lengths = torch.randint(1, 9, (50,), generator=generator)
    mask = torch.arange(9) < lengths[:, None]
    rows = log_s[:, None].expand(50, 9)
    expected = clipped(rows, advantages, mask, Objective(clip_low=3e-4, clip_high=4e-4))
    share = Trial(log_s, advantages, lengths).share(3e-4, 4e-4)
    assert share == pytest.approx((expected.sum() / mask.sum()).item())


def test_the_range_that_is_proposed_clips_the_share_that_is_wanted():
    generator = torch.Generator().manual_seed(0)
    done = Trial(
        1e-3 * torch.randn(4000, generator=generator),
        torch.randn(4000, generator=generator),
        torch.randint(1, 9, (4000,), generator=generator),
    )
    low, high = done.range(0.15)
    assert low / high == pytest.approx(3 / 4)  # as published
    assert done.share(low, high) == pytest.approx(0.15, abs=2e-3)
    # half of the completions at most lie on the clipped side, so no range clips more of them
    assert done.range(0.9) is None


@pytest.fixture
def examined(tmp_path, model_dir, make_rollout):
    """A module whose policy is loaded, its data, and 6 completions of up to 5 tokens."""

    def make(**options):
        settings = {"num_minibatches": 3, "optimizer": OptimizerConfig(learning_rate=1e-5)}
        module = make_module(model_dir, **settings | options)
        module.configure_model()
        module.manual_backward = torch.Tensor.backward  # without a Trainer
        data = PromptData(str(write_prompts(tmp_path / "p.jsonl")), prompts_per_rollout=3)
        rollout = make_rollout()
        samples = Samples(**{f.name: getattr(rollout, f.name) for f in fields(Samples)})
        return module, data, samples

    return make


def rollout_of(module, samples):
    rollout = as_rollout(module, samples)
    return replace(rollout, old_known=torch.ones_like(rollout.finished))


def test_a_trial_moves_as_far_as_the_learning_rate_says_and_is_undone(examined):
    module, _, samples = examined()
    rollout = rollout_of(module, samples)
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    one = trial(module, rollout, 4, most=4)
    after = module.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in module.policy.parameters())
    module.optimizer_config = OptimizerConfig(learning_rate=2e-5)
    two = trial(module, rollout, 4, most=4)
    assert one.log_s[:2].abs().max() < 1e-6  # the first mini-batch is as it was sampled
    assert one.log_s[2:].abs().min() > 1e-6
    assert torch.allclose(two.log_s[2:], 2 * one.log_s[2:], rtol=0.05, atol=1e-6)


def test_fewer_mini_batches_take_longer_steps(examined):
    """Fifteen steps are in the last ratio, whether they are taken in two or in one."""
    module, _, samples = examined(num_minibatches=16)
    rollout = rollout_of(module, samples)
    ends = [trial(module, rollout, 4, most=most).log_s[-2:].abs().mean() for most in (2, 3)]
    assert 0.3 < ends[0] / ends[1] < 3
    module.num_minibatches = 2  # a single step
    assert trial(module, rollout, 4, most=2).log_s[-2:].abs().mean() < ends[0] / 5


def test_the_advice_names_the_range_and_warns_where_nothing_is_clipped(examined):
    module, data, samples = examined(optimizer=OptimizerConfig(learning_rate=1e-4))
    rewards = [torch.tensor([1.0, 0.0, 0.5, 0.0, 0.2, 1.0])]
    (found,) = clipping(module, data, samples, rewards, 64)
    low, high = found.value["proposed"]
    assert f"clip_low {low:.1g} and clip_high {high:.1g} the paper's 15%" in found.text
    assert "made up" not in found.text
    assert "rewards made up" in clipping(module, data, samples, [torch.ones(6)], 64)[0].text
    assert "rewards made up" in clipping(module, data, samples, [], 64)[0].text
    module.optimizer_config = OptimizerConfig(learning_rate=1e-7)
    (found,) = clipping(module, data, samples, rewards, 64)
    assert found.status == "warning" and "raise optimizer.learning_rate" in found.remedy
    assert found.value["clipped_tokens"] == 0


@pytest.mark.parametrize("rate", [30.0, 1e30])  # far, and beyond all numbers
def test_steps_that_no_range_can_clip_are_said_to_be_too_far(examined, rate):
    module, data, samples = examined(optimizer=OptimizerConfig(learning_rate=rate))
    (found,) = clipping(module, data, samples, [torch.tensor([1.0, 0.0, 0.5, 0.0, 0.2, 1.0])], 64)
    assert found.status == "warning" and found.remedy.endswith("lower optimizer.learning_rate")
    assert "clip_low" not in found.text and found.value["proposed"] is None


def test_where_a_sequence_is_never_clipped_there_is_no_advice(examined):
    module, data, samples = examined(num_minibatches=1)
    assert clipping(module, data, samples, [], 64) == []
    module, data, samples = examined(objective=Objective("token", clip_low=0.2, clip_high=0.2))
    assert clipping(module, data, samples, [], 64) == []


def test_a_slow_model_is_looked_at_on_less():
    """0.27 billion weights: 2 x 2.7e8 operations a token, 32 completions, 4e11 operations."""

    def module(count, device="cpu", longest=1024):
        parameters = [SimpleNamespace(numel=lambda: count)]
        return SimpleNamespace(
            policy=SimpleNamespace(parameters=lambda: parameters),
            sampler=SimpleNamespace(group_size=8, max_new_tokens=longest),
            device=torch.device(device),
        )

    slow = effort_for(module(268_098_176), thorough=False)
    assert (slow.num_prompts, slow.max_new_tokens, slow.rows) == (2, 23, QUICK.rows)
    assert effort_for(module(268_098_176), thorough=True) == Effort()
    assert effort_for(module(268_098_176, "cuda"), thorough=False) == Effort()
    assert effort_for(module(132_672), thorough=False) == Effort()
    assert effort_for(module(10**9), thorough=False).max_new_tokens == 16
    assert effort_for(module(10**9, longest=4), thorough=False).max_new_tokens == 16


def test_an_examination_is_named_as_it_begins_and_timed_as_it_ends(capsys):
    with announced("sampling"):
        assert capsys.readouterr().err == "sampling ..."
    assert capsys.readouterr().err == " 0.0 s\n"
