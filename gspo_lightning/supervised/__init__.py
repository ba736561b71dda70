"""What is trained before GSPO: a warm start on demonstrations, reward models on pairs."""

from gspo_lightning.supervised.reward_model import RewardModelModule
from gspo_lightning.supervised.sft import SFTModule
