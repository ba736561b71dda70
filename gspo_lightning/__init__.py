"""GSPO, Group Sequence Policy Optimization (arXiv:2507.18071), for PyTorch Lightning.

A name is imported when it is first asked for: a command that needs none of them, or a part of the
package that does without torch, starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from gspo_lightning.evaluation import Evaluation
    from gspo_lightning.frozen import ReferencePolicy, RewardModel
    from gspo_lightning.module import GSPOModule
    from gspo_lightning.objectives import Objective
    from gspo_lightning.optim import OptimizerConfig
    from gspo_lightning.policy import LoRAConfig, PolicyConfig
    from gspo_lightning.rewards import RewardTerm
    from gspo_lightning.run.progress import RolloutProgress, RunSummary
    from gspo_lightning.run.tracing import RolloutProfile
    from gspo_lightning.sampling import GroupSampler
    from gspo_lightning.supervised import RewardModelModule, SFTModule

_HOMES = {
    "callbacks": (
        "AdaptiveKL",
        "CurvePlot",
        "HFExport",
        "PredictionWriter",
        "SampleTable",
    ),
    "checkpoint": ("RolloutCheckpoint",),
    "critic": ("CriticConfig",),
    "data": (
        "PreferenceData",
        "PromptData",
        "SFTData",
    ),
    "evaluation": ("Evaluation",),
    "frozen": (
        "ReferencePolicy",
        "RewardModel",
    ),
    "module": ("GSPOModule",),
    "objectives": ("Objective",),
    "optim": ("OptimizerConfig",),
    "policy": (
        "LoRAConfig",
        "PolicyConfig",
    ),
    "rewards": ("RewardTerm",),
    "run.progress": (
        "RolloutProgress",
        "RunSummary",
    ),
    "run.tracing": ("RolloutProfile",),
    "sampling": ("GroupSampler",),
    "supervised": (
        "RewardModelModule",
        "SFTModule",
    ),
}

__all__ = [
    "AdaptiveKL",
    "CriticConfig",
    "CurvePlot",
    "Evaluation",
    "GSPOModule",
    "GroupSampler",
    "HFExport",
    "LoRAConfig",
    "Objective",
    "OptimizerConfig",
    "PolicyConfig",
    "PredictionWriter",
    "PreferenceData",
    "PromptData",
    "ReferencePolicy",
    "RewardModel",
    "RewardModelModule",
    "RewardTerm",
    "RolloutCheckpoint",
    "RolloutProfile",
    "RolloutProgress",
    "RunSummary",
    "SFTData",
    "SFTModule",
    "SampleTable",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gspo_lightning.{home}"), name)
    raise AttributeError(f"module 'gspo_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
