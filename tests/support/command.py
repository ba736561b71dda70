"""Commands of `train.py` in this process: run in a folder of their own, or only instantiated."""

import os
from pathlib import Path

import train
from gspo_lightning.run.command import GSPOCLI, Watch
from gspo_lightning.run.one_line import quiet

DUMMY = """
seed_everything: 0
trainer:
  accelerator: cpu
  enable_progress_bar: false
  val_check_interval: 3
  callbacks: [{class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 2}}]
model: {class_path: support.dummies.DummyModule}
data: {class_path: support.dummies.DummyData, init_args: {num_rollouts: 6}}
"""
REAL = """
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: policy}
    sampler: {class_path: gspo_lightning.GroupSampler, init_args: {group_size: 4}}
    rewards:
      correct: {fn: {class_path: gspo_lightning.rewards.terms.MarkedAnswer}, weight: 2.0}
data: {class_path: gspo_lightning.PromptData, init_args: {path: prompts.jsonl}}
"""


class Dry(GSPOCLI):
    """Instantiates everything and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


def instantiated(*arguments):
    """The command line of `fit` with all objects that it makes."""
    with quiet():
        return Dry(["fit", *map(str, arguments)], Watch())


def enter(folder, monkeypatch):
    """Work in a folder that holds the two configs, without the variables of other runs."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GSPO_TRACEBACK", raising=False)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    Path("dummy.yaml").write_text(DUMMY)
    Path("real.yaml").write_text(REAL)


def run(capsys, command):
    """Exit code and the two streams of one command."""
    code = train.main(command.split())
    return code, *capsys.readouterr()


def refused(capsys, command):
    """The one line with which a command is refused."""
    code, out, err = run(capsys, command)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err[len("error: ") : -1]


def checkpoints(folder="runs/default"):
    return sorted(os.listdir(Path(folder, "checkpoints")))
