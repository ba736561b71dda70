"""Fact 42 where a critic, a reference that follows, a draw or more prompts belong to a run."""

from pathlib import Path

import pytest
import torch

import train
from support.demo_run import arguments, killed
from support.run_folder import assert_same, curves, state

pytestmark = pytest.mark.usefixtures("at_the_root")

SMALL = """
trainer:
  limit_val_batches: 0
  num_sanity_val_steps: 0
  val_check_interval: 1.0
  check_val_every_n_epoch: 1
  enable_progress_bar: false
  callbacks: [{class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 2}}]
model:
  init_args:
    sampler: {init_args: {group_size: 4, max_new_tokens: 24}}
    num_minibatches: 2
    optimizer: {schedule: linear, learning_rate: 1.0e-3}
data: {init_args: {prompts_per_rollout: 4, num_rollouts: 6}}
"""
PPO = """
model:
  init_args:
    objective: {ratio: token, aggregation: token_mean, clip_low: 0.2, clip_high: 0.2}
    advantages: gae
    critic: {learning_rate_ratio: 2.0}
    reference: {device: cpu, sync: {mixup: 0.5, every: 5}}
    kl_coef: 0.05
"""
FLAT_GROUPS_OUT = """
model:
  init_args:
    drop_flat_groups: true
    max_draws: 6
    objective: {ratio: token, pick: clip_cov, pick_share: 0.1, cov_low: 1.0e-3}
"""
KINDS = {"ppo": [PPO], "dynamic": [FLAT_GROUPS_OUT], "both": [PPO, FLAT_GROUPS_OUT]}


@pytest.fixture
def stack(request, tmp_path):
    """The first overlay as a file, and the options that put the others on top of it."""
    files = []
    for i, text in enumerate([SMALL, *KINDS[request.param]]):
        files.append(tmp_path / f"{i}.yaml")
        files[-1].write_text(text)
    return files[0], [part for file in files[1:] for part in ("--config", str(file))]


def figures(folder):
    """Everything that was counted and is not a time."""
    return {tag: values for tag, values in curves(folder).items() if not tag.startswith("time/")}


def assert_same_end(left, right):
    checkpoints = [state(folder, 6) for folder in (left, right)]
    for checkpoint in checkpoints:
        checkpoint["callbacks"].pop("RunSummary", None)  # seconds
    assert_same(*checkpoints)
    assert_same(figures(left), figures(right))
    return checkpoints[0]


@pytest.mark.parametrize("stack", ["ppo", "dynamic"], indirect=True)
def test_a_stopped_run_continues_bit_for_bit(stack, tmp_path):
    small, options = stack
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main(arguments(small, straight, *options)) == 0
    stopper = ["--trainer.callbacks+=support.dummies.Stopper", "--trainer.callbacks.after=3"]
    assert train.main(arguments(small, stopped, *options, *stopper)) == 0
    assert train.main(arguments(small, stopped, *options, "--ckpt_path=last")) == 0
    checkpoint = assert_same_end(stopped, straight)
    if "critic" in Path(options[1]).read_text():
        assert "critic.head.weight" in checkpoint["state_dict"]
        trained = [name for name in checkpoint["state_dict"] if "lm_head" not in name]  # tied
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained)
        start = state(straight, 2)["gspo"]["reference"]  # 4 steps: it moves after the fifth
        moved = checkpoint["gspo"]["reference"]
        assert any(not torch.equal(moved[name], start[name]) for name in moved)
    else:
        drawn = [value for _, value in figures(straight)["rollout/prompts_drawn"]]
        assert max(drawn) > 4  # else nothing was drawn beyond the rollouts' own prompts


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["both"], indirect=True)
def test_a_killed_run_continues_bit_for_bit(stack, tmp_path):
    small, options = stack
    straight, broken = tmp_path / "straight", tmp_path / "killed"
    assert train.main(arguments(small, straight, *options)) == 0
    killed(small, broken, 3, *options)
    assert train.main(arguments(small, broken, *options, "--ckpt_path=last")) == 0
    checkpoint = assert_same_end(broken, straight)
    assert "critic.head.weight" in checkpoint["state_dict"]
    drawn = [value for _, value in figures(straight)["rollout/prompts_drawn"]]
    assert max(drawn) > 4


@pytest.mark.parametrize("stack", ["ppo"], indirect=True)
def test_a_checkpoint_with_a_critic_is_evaluated_without_and_continued_only_with_it(
    stack, tmp_path, capsys
):
    small, options = stack
    run = ["--data.num_rollouts=2"]
    assert train.main(arguments(small, tmp_path, *options, *run)) == 0
    plain = ["--config", "configs/arithmetic.yaml", "--config", str(small)]
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    validate = ["validate", *plain, *folder, "--trainer.limit_val_batches=1", "--ckpt_path=last"]
    assert train.main(validate) == 0  # no critic, and none in the way
    assert train.main([*validate, *options]) == 0  # with the settings of the run: not loaded
    capsys.readouterr()
    assert train.main(arguments(small, tmp_path, "--ckpt_path=last")) != 0
    assert (
        "model.critic: the checkpoint holds a critic, this run has none" in capsys.readouterr().err
    )
