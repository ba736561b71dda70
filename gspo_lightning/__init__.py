"""GSPO, Group Sequence Policy Optimization (arXiv:2507.18071), for PyTorch Lightning.

A name is imported when it is first asked for: a command that needs none of them, or a part of the
package that does without torch, starts at once.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and readers see
    from gspo_lightning.callbacks import (
        AdaptiveKL,
        CurvePlot,
        HFExport,
        PredictionWriter,
        SampleTable,
    )
    from gspo_lightning.checkpoint import RolloutCheckpoint
    from gspo_lightning.critic import CriticConfig
    from gspo_lightning.data import PreferenceData, PromptData, SFTData
    from gspo_lightning.environments import (
        Environment,
        EnvironmentReward,
        Episode,
        ToolEnvironment,
        Turn,
    )
    from gspo_lightning.evaluation import Evaluation
    from gspo_lightning.frozen import ReferencePolicy, RewardModel
    from gspo_lightning.mismatch import Mismatch
    from gspo_lightning.module import GSPOModule
    from gspo_lightning.objectives import Objective
    from gspo_lightning.optim import OptimizerConfig
    from gspo_lightning.policy import LoRAConfig, PolicyConfig
    from gspo_lightning.rewards import RewardTerm
    from gspo_lightning.run.from_python import train
    from gspo_lightning.run.progress import RolloutProgress, RunSummary
    from gspo_lightning.run.tracing import RolloutProfile
    from gspo_lightning.sampling import GroupSampler
    from gspo_lightning.sharding import FSDP2
    from gspo_lightning.supervised import RewardModelModule, SFTModule
    from gspo_lightning.vllm.ahead import AsyncSampler
    from gspo_lightning.vllm.sampler import VLLMSampler

HOMES = {  # of each name: where it is imported from
    "AdaptiveKL": "callbacks",
    "AsyncSampler": "vllm.ahead",
    "CriticConfig": "critic",
    "CurvePlot": "callbacks",
    "Environment": "environments",
    "EnvironmentReward": "environments",
    "Episode": "environments",
    "Evaluation": "evaluation",
    "FSDP2": "sharding",
    "GSPOModule": "module",
    "GroupSampler": "sampling",
    "HFExport": "callbacks",
    "LoRAConfig": "policy",
    "Mismatch": "mismatch",
    "Objective": "objectives",
    "OptimizerConfig": "optim",
    "PolicyConfig": "policy",
    "PredictionWriter": "callbacks",
    "PreferenceData": "data",
    "PromptData": "data",
    "ReferencePolicy": "frozen",
    "RewardModel": "frozen",
    "RewardModelModule": "supervised",
    "RewardTerm": "rewards",
    "RolloutCheckpoint": "checkpoint",
    "RolloutProfile": "run.tracing",
    "RolloutProgress": "run.progress",
    "RunSummary": "run.progress",
    "SFTData": "data",
    "SFTModule": "supervised",
    "SampleTable": "callbacks",
    "ToolEnvironment": "environments",
    "Turn": "environments",
    "VLLMSampler": "vllm.sampler",
    "train": "run.from_python",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'gspo_lightning' has no attribute {name!r}")
    return getattr(import_module(f"gspo_lightning.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
