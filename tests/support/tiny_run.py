"""A whole run small enough for the fast suite: tiny policy, ten prompts, real Trainer."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.module import GSPOModule
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sampling import GroupSampler
from support.observers import Outputs, Steps
from support.reward_functions import digits


def write_prompts(path: Path, count: int = 10) -> Path:
    rows = [{"prompt": "+".join(str(d) for d in range(1, 2 + i % 4)) + "="} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_module(model_dir: Path, **options: Any) -> GSPOModule:
    """A module with group size 4 and completions of at most 6 tokens."""
    settings: dict[str, Any] = {
        "policy": PolicyConfig(str(model_dir)),
        "rewards": {"digits": RewardTerm(digits)},
        "sampler": GroupSampler(group_size=4, max_new_tokens=6),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "num_minibatches": 2,
    }
    return GSPOModule(**(settings | options))


def make_trainer(root: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(settings | options))


def run(
    root: Path, model_dir: Path, num_rollouts: int = 1, callbacks: Any = None, **options: Any
) -> GSPOModule:
    """Train for some rollouts and give the module back."""
    os.environ["PL_GLOBAL_SEED"] = "0"
    module = make_module(model_dir, **options)
    path = write_prompts(root / "prompts.jsonl")
    data = PromptData(str(path), prompts_per_rollout=4, num_rollouts=num_rollouts)
    make_trainer(root, callbacks=callbacks).fit(module, data)
    return module


def outputs_of(tmp_path, model_dir, **options):
    keep = Outputs()
    run(tmp_path, model_dir, callbacks=[keep], **options)
    return keep.all


def gradients_of(tmp_path, model_dir, **options):
    keep = Steps()
    run(tmp_path, model_dir, callbacks=[keep], **options)
    return keep.gradients
