"""GSPO, Group Sequence Policy Optimization (arXiv:2507.18071), for PyTorch Lightning."""

from gspo_lightning.callbacks import AdaptiveKL, CurvePlot, HFExport, SampleTable
from gspo_lightning.checkpoint import RolloutCheckpoint
from gspo_lightning.critic import CriticConfig
from gspo_lightning.data import PreferenceData, PromptData, SFTData
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen import ReferencePolicy, RewardModel
from gspo_lightning.lora import LoRAConfig
from gspo_lightning.module import GSPOModule
from gspo_lightning.objectives import Objective
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy import PolicyConfig
from gspo_lightning.predictions import PredictionWriter
from gspo_lightning.progress import RolloutProgress, RunSummary
from gspo_lightning.reward_model import RewardModelModule
from gspo_lightning.rewards import RewardTerm
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.sft import SFTModule
from gspo_lightning.tracing import RolloutProfile

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
