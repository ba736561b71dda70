"""GSPO, Group Sequence Policy Optimization (arXiv:2507.18071), for PyTorch Lightning."""

from gspo_lightning.callbacks.files import AdaptiveKL, CurvePlot, HFExport, SampleTable
from gspo_lightning.callbacks.predictions import PredictionWriter
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from gspo_lightning.critic.critic import CriticConfig
from gspo_lightning.data.prompts import PreferenceData, PromptData, SFTData
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen.models import ReferencePolicy, RewardModel
from gspo_lightning.module import GSPOModule
from gspo_lightning.objectives import Objective
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.run.progress import RolloutProgress, RunSummary
from gspo_lightning.run.tracing import RolloutProfile
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.supervised.reward_model import RewardModelModule
from gspo_lightning.supervised.sft import SFTModule

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
