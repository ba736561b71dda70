"""The value model of PPO, and advantages from it."""

from gspo_lightning.critic.critic import Critic, CriticConfig, check_critic, fit_critic, load_critic
from gspo_lightning.critic.gae import ValueLoss
