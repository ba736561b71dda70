"""Fact 42, the promise of the project: a killed run continues as if nothing had happened."""

import json
import os
from pathlib import Path

import pytest
import torch

import train
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from support.demo_run import arguments, killed
from support.repository import ROOT
from support.run_folder import assert_same, curves, state

pytestmark = pytest.mark.usefixtures("at_the_root")

TINY = """
trainer:
  val_check_interval: 2
  limit_val_batches: 1
  enable_progress_bar: false
  callbacks:
    - class_path: gspo_lightning.AdaptiveKL
      init_args: {rule: {target: 0.001}, initial: 0.02}
    - class_path: gspo_lightning.RolloutCheckpoint
      init_args: {every_n_rollouts: 2}
    - class_path: gspo_lightning.SampleTable
    - class_path: gspo_lightning.CurvePlot
model:
  init_args:
    sampler: {init_args: {group_size: 4, max_new_tokens: 24}}
    num_minibatches: 2
    optimizer: {schedule: linear, learning_rate: 1.0e-3}
data: {init_args: {prompts_per_rollout: 4, num_rollouts: 6, val_batch_size: 4}}
"""


@pytest.fixture(scope="module")
def overlay(tmp_path_factory):
    path = tmp_path_factory.mktemp("overlay") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def straight(overlay, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    here = os.getcwd()
    os.chdir(ROOT)
    assert train.main(arguments(overlay, folder)) == 0
    os.chdir(here)
    return folder


def samples(folder):
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def assert_same_run(folder, straight):
    left, right = state(folder, 6), state(straight, 6)
    for checkpoint in (left, right):
        checkpoint["callbacks"].pop("RunSummary", None)  # seconds
    assert left["optimizer_states"][0]["state"], "nothing was compared"
    assert_same(left, right)
    assert samples(folder) == samples(straight)
    assert_same(curves(folder), curves(straight))


@pytest.mark.slow
def test_a_run_killed_between_checkpoints_continues_bit_for_bit(overlay, straight, tmp_path):
    killed(overlay, tmp_path, at=3)  # the checkpoint of two rollouts is what is left
    assert len(samples(tmp_path)) > len([s for s in samples(tmp_path) if s["rollout"] < 2])
    assert train.main(arguments(overlay, tmp_path, "--ckpt_path", "last")) == 0
    assert_same_run(tmp_path, straight)


def test_a_finished_run_made_longer_is_the_longer_run_bit_for_bit(overlay, tmp_path):
    constant = "--model.optimizer.schedule=constant"  # a fall would be spread over the new length
    short, long = tmp_path / "short", tmp_path / "long"
    assert train.main(arguments(overlay, short, constant, "--data.num_rollouts=4")) == 0
    assert train.main(arguments(overlay, short, constant, "--ckpt_path=last")) == 0
    assert train.main(arguments(overlay, long, constant)) == 0
    assert_same_run(short, long)


@pytest.mark.parametrize(
    "config", ["sft_arithmetic", pytest.param("reward_model", marks=pytest.mark.recipes)]
)
def test_a_supervised_fit_continues_bit_for_bit_over_its_epochs(tmp_path, config):
    def run(folder, *options):
        command = ["fit", "--config", f"configs/{config}.yaml", "--trainer.max_epochs=3"]
        command += ["--trainer.enable_checkpointing=true", "--trainer.enable_progress_bar=false"]
        command += ["--data.num_steps=8", f"--trainer.default_root_dir={folder}"]
        command += ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]
        assert train.main([*command, *options]) == 0

    run(tmp_path / "straight")
    for stop in (8, 11):  # at the end of the first epoch, in the second
        stopper = [
            "--trainer.callbacks+=support.dummies.Stopper",
            f"--trainer.callbacks.after={stop}",
        ]
        run(tmp_path / "stopped", "--ckpt_path=auto", *stopper)
    run(tmp_path / "stopped", "--ckpt_path=last")
    left, right = (state(tmp_path / name, 24) for name in ("stopped", "straight"))
    for checkpoint in (left, right):
        checkpoint["callbacks"].pop("RunSummary", None)  # seconds
    assert_same(left, right)
    assert_same(curves(tmp_path / "stopped"), curves(tmp_path / "straight"))


@pytest.mark.parametrize(
    "config", ["sft_arithmetic", pytest.param("reward_model", marks=pytest.mark.recipes)]
)
def test_a_supervised_fit_that_dies_right_behind_a_save_loses_no_point(
    tmp_path, monkeypatch, config
):
    """`self.log` reaches the loggers only behind the callbacks that save."""

    def run(folder, *options):
        command = ["fit", "--config", f"configs/{config}.yaml", "--data.num_steps=3"]
        command += ["--trainer.enable_checkpointing=true", "--trainer.enable_progress_bar=false"]
        command += [f"--trainer.default_root_dir={folder}", "--trainer.limit_val_batches=0"]
        command += ["--trainer.log_every_n_steps=1", "--trainer.max_epochs=1"]
        command += ["--trainer.callbacks+=gspo_lightning.RolloutCheckpoint"]
        return train.main([*command, "--trainer.callbacks.every_n_rollouts=2", *options])

    save = RolloutCheckpoint._save

    def die(self, trainer):
        save(self, trainer)
        raise KeyboardInterrupt

    assert run(tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(RolloutCheckpoint, "_save", die)
        assert run(tmp_path / "killed") == 130
    assert run(tmp_path / "killed", "--ckpt_path=last") == 0
    assert len(curves(tmp_path / "straight")["train/loss"]) == 3
    assert_same(curves(tmp_path / "killed"), curves(tmp_path / "straight"))


LORA = """
model:
  init_args:
    policy: {lora: {rank: 2, target_modules: [q_proj, v_proj]}, gradient_checkpointing: true}
    reference: {device: policy}
"""


def test_a_run_with_adapters_continues_bit_for_bit_and_keeps_nothing_else(overlay, tmp_path):
    """Also the KL, whose reference is the policy with its adapters off."""
    lora = tmp_path / "lora.yaml"
    lora.write_text(LORA)

    def run(folder, *options):
        assert train.main(arguments(overlay, folder, "--config", str(lora), *options)) == 0

    run(tmp_path / "straight")
    stopper = ["--trainer.callbacks+=support.dummies.Stopper", "--trainer.callbacks.after=3"]
    run(tmp_path / "stopped", *stopper)
    run(tmp_path / "stopped", "--ckpt_path=last")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    final = state(tmp_path / "straight", 6)
    tensors = {k for k, v in final["state_dict"].items() if isinstance(v, torch.Tensor)}
    assert len(tensors) == 2 * 2 * 2  # layers, projections, A and B
    assert all(".lora_" in name for name in tensors)
    assert len(final["optimizer_states"][0]["state"]) == len(tensors)
    assert curves(tmp_path / "straight")["train/kl_loss"][-1][1] > 0


def test_a_checkpoint_holds_the_policy_alone(straight):
    checkpoint = torch.load(straight / "checkpoints" / "rollout=000006.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names and all(name.startswith("policy.model.") for name in names)


def test_a_finished_run_has_nothing_to_do(overlay, straight, capsys):
    before = state(straight, 6)
    assert train.main(arguments(overlay, straight, "--ckpt_path", "last")) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert_same(state(straight, 6), before)
