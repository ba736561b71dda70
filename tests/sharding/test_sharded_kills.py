"""Two ranks of FSDP2 that are killed at named places, and go on bit for bit."""

import json
import os
import signal

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from gspo_lightning.callbacks import AdaptiveKL, SampleTable
from gspo_lightning.checkpoint import io as checkpoint_io
from gspo_lightning.checkpoint import parts, rollout_checkpoint
from gspo_lightning.checkpoint.files import find_checkpoint, list_checkpoints
from gspo_lightning.checkpoint.io import AtomicCheckpointIO, damage
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.kl import MultiplicativeKL
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.sharding import FSDP2
from support.forked import exit_codes
from support.reward_functions import digits
from support.run_folder import assert_same, curves
from support.tiny_run import make_module, make_trainer, write_prompts

# Who is killed, and where in the second rollout or at the first validation of its process. Of
# ranks that are killed alone, the other one must end by itself.
DEATHS = {
    "rank 1, sampling": ("sampling", 1),
    "all, sampling": ("sampling", "all"),
    "rank 1, update": ("update", 1),
    "all, update": ("update", "all"),
    "rank 1, validation": ("validation", 1),
    "all, validation": ("validation", "all"),
    "rank 0, removing": ("removing", 0),
    "all, removing": ("removing", "all"),
    "rank 1 before its part": ("part", 1),
    "all, rank 1 in the middle of its part": ("half a part", "all"),
    "rank 0 between parts and checkpoint": ("checkpoint", 0),
    "all, rank 0 in the middle of the checkpoint": ("half a checkpoint", "all"),
}
FEW = ("all, rank 0 in the middle of the checkpoint",)


class Death(Callback):
    """Kills at a place when a rank comes there, on the second rollout of its process."""

    def __init__(self, place, victim, rank):
        self.place, self.victim, self.rollouts, self.calls = place, victim, 0, 0
        self.mine = victim in ("all", rank)
        if place in ("half a part", "checkpoint", "half a checkpoint", "removing"):
            self.mine = rank == int(place == "half a part")  # who comes there

    def at(self, place):
        due = self.rollouts == 2 or place == "validation"
        if place == self.place and self.mine and due:
            if self.victim == "all":
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, module):
        unwrapped(module.policy.model).register_forward_pre_hook(lambda *_: self.count())
        save, passed = AtomicCheckpointIO.save_checkpoint, checkpoint_io._Sealed._pass
        remove = rollout_checkpoint.remove
        now = ""

        def saved(io, checkpoint, path, storage_options=None):
            nonlocal now
            now = "checkpoint" if path.suffix == ".ckpt" else "part"
            self.at(now)
            save(io, checkpoint, path, storage_options)

        def half(sealed, data):
            passed(sealed, memoryview(data)[: len(data) // 2])
            if sealed.crc and len(data) > 99:
                sealed.file.flush()
                self.at(f"half a {now}")
            passed(sealed, memoryview(data)[len(data) // 2 :])

        def removed(path):
            path.unlink()
            self.at("removing")
            remove(path)

        AtomicCheckpointIO.save_checkpoint = saved
        checkpoint_io._Sealed._pass = half
        rollout_checkpoint.remove = removed

    def count(self):
        self.calls += 1
        if self.calls == 3:  # two tokens are drawn
            self.at("sampling")

    def on_train_batch_start(self, *_):
        self.rollouts, self.calls = self.rollouts + 1, 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.step.moved:  # half of the rollout is learned from
            self.at("update")

    def on_validation_batch_start(self, *_):
        self.at("validation")


def fit(rank, root, model_dir, num_rollouts, death=None):
    """Train a rank to the end, or to its death; from the newest checkpoint on."""
    module = make_module(
        model_dir,
        sampler=GroupSampler(group_size=2, max_new_tokens=6),
        rewards={"digits": RewardTerm(digits, whiten=True)},
        reference=ReferencePolicy(device="policy"),
        drop_flat_groups=True,
        max_draws=1,
        evaluation=Evaluation(num_samples=1, ks=(1,)),
    )
    data = PromptData(
        str(root.parent / "prompts.jsonl"),
        str(root.parent / "held_out.jsonl"),
        prompts_per_rollout=2,
        num_rollouts=num_rollouts,
        val_batch_size=2,
    )
    kl = AdaptiveKL(MultiplicativeKL(target=1e-4), initial=0.1)
    callbacks = [kl, RolloutCheckpoint(every_n_rollouts=1, keep_last=2), SampleTable()]
    trainer = make_trainer(
        root,
        callbacks=[*callbacks, *([Death(*death, rank)] if death else [])],
        devices=2,
        strategy=FSDP2(checkpoints="parts"),
        use_distributed_sampler=False,
        enable_checkpointing=True,
        val_check_interval=2,
        logger=TensorBoardLogger(root, name="", version=""),
        log_every_n_steps=1,
    )
    trainer.fit(module, data, ckpt_path=find_checkpoint(root, "auto"))


def ended(root, num_rollouts):
    """All that a run has left."""
    files = list_checkpoints(root)
    last = AtomicCheckpointIO().load_checkpoint(files[-1])
    assert last["rollouts"] == num_rollouts
    assert last.pop("event_files")
    loops = last["loops"]["fit_loop"]
    last["loops"] = {k: v for k, v in loops.items() if "val_loop" not in k}
    last.pop(parts.KEY, None)
    lines = (root / "samples.jsonl").read_text().splitlines()
    left = sorted(path.name for path in files[-1].parent.iterdir())
    return last, left, list(map(json.loads, lines)), curves(root)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="1"),
        pytest.param(tuple(DEATHS), marks=pytest.mark.kills, id="12"),
    ],
)
def test_ranks_that_are_killed_go_on_bit_for_bit(tmp_path, model_dir, names):
    write_prompts(tmp_path / "prompts.jsonl")
    write_prompts(tmp_path / "held_out.jsonl", 5)
    straight, root = tmp_path / "straight", tmp_path / "killed"
    rollouts = len(names) + 2
    run = (model_dir, rollouts)
    assert exit_codes(fit, straight, *run, logs=tmp_path) == [0, 0]
    for name in names:
        place, victim = DEATHS[name]
        codes = exit_codes(fit, root, *run, (place, victim), logs=tmp_path)
        expected = [-9, -9] if victim == "all" else [(-9, 1)[rank != victim] for rank in (0, 1)]
        assert codes == expected, name
        assert [path for path in list_checkpoints(root) if damage(path)] == [], name
    assert exit_codes(fit, root, *run, logs=tmp_path) == [0, 0]
    for one, other in zip(ended(root, rollouts), ended(straight, rollouts), strict=True):
        assert_same(one, other)
