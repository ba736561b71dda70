"""The critic of PPO: a language model that says what reward to expect, one value per token.

Decides what the critic is made of, where its values stand and which settings it needs. Trained with
the policy, saved in checkpoints, never exported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel

from gspo_lightning.bounds import check_positive
from gspo_lightning.critic.gae import ValueLoss, gae, token_rewards, value_loss, whiten
from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.engine.states import predicting_states
from gspo_lightning.policy.folder import check_model_folder, check_model_path
from gspo_lightning.policy.policy import PolicyConfig, checkpoint_activations, make_ready
from gspo_lightning.rollout import Rollout, Samples
from gspo_lightning.start.shipped import find_data


@dataclass(frozen=True)
class CriticConfig:
    """A critic and what its values are made into; goes with ``advantages: gae``.

    Args:
        backbone: ``own``: layers of its own, which start from ``path``; ``policy``: one linear
            layer on the policy's last hidden states, through which the value loss also trains the
            policy's layers.
        path: Folder or hub name of the layers to start from, a language model or a reward model;
            ``None`` is the policy's own start. All of them are trained, in the policy's dtype, also
            where the policy has adapters.
        learning_rate_ratio: The critic's learning rate, as a multiple of the policy's.
        value_coef: Coefficient of the value loss. With ``own`` it only decides, together with
            ``max_grad_norm``, when the critic's gradient is scaled down.
        value_clip: How far a value may move from where it was when the rollout was collected, in
            units of the reward; ``None`` does not clip.
        gamma: Discount per token.
        lam: Lambda of generalized advantage estimation.
        whiten: Shift and scale the advantages of a rollout's tokens, over all ranks, to mean 0 and
            standard deviation 1.
        kl_in_reward: With a reference, the KL penalty is taken off each token's reward
            (``kl_coef`` times the log-prob's distance from the reference's); false leaves it a term
            of the loss. It is never both.

    Raises:
        ValueError: If a value is out of range, or ``path`` is given but not used.

    Source:
        PPO, arXiv:1707.06347; for language models, arXiv:1909.08593 and arXiv:2203.02155.
    """

    backbone: Literal["own", "policy"] = "own"
    path: str | None = None
    learning_rate_ratio: float = 10.0
    value_coef: float = 0.5
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    kl_in_reward: bool = True

    def __post_init__(self) -> None:
        check_positive("critic.", learning_rate_ratio=self.learning_rate_ratio)
        check_positive("critic.", value_coef=self.value_coef, value_clip=self.value_clip)
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"critic.{name} must be in [0, 1], got {value}")
        if self.path is not None:
            if self.backbone == "policy":
                raise ValueError(
                    f"critic.path {self.path} is not read with critic.backbone policy; use own, or "
                    "leave the path out"
                )
            object.__setattr__(self, "path", find_data(self.path))
            check_model_path("critic.path", self.path)


def check_critic(
    config: CriticConfig | None, advantages: str, group_size: int, drop_flat_groups: bool
) -> None:
    """Refuse settings of a module that do not go together with its critic, or with having none.

    Raises:
        ValueError: Naming the settings and the way out.
    """
    if config is None and advantages == "gae":
        raise ValueError(
            "model.advantages gae needs a critic; add --config algorithm/ppo, or model.critic"
        )
    if config is None and group_size < 2 and advantages != "reinforce_plus_plus":
        raise ValueError(
            f"sampler.group_size must be >= 2, got {group_size}: without a critic a completion is "
            "compared with the others of its group"
        )
    if config is not None and advantages != "gae":
        raise ValueError(
            f"model.critic is set, but model.advantages {advantages} does not ask it; use gae, or "
            "set model.critic to null"
        )
    if drop_flat_groups and group_size < 2:
        raise ValueError(
            "drop_flat_groups with sampler.group_size 1 would drop every prompt: a single reward "
            "has no spread; set drop_flat_groups to false"
        )


class Estimates(NamedTuple):
    """What a critic makes of a rollout, (B, T) each."""

    advantages: Tensor
    values: Tensor
    returns: Tensor  # NaN in rows without a reward


class Critic(nn.Module):
    """A value head on layers of its own, or on the policy's.

    The head starts at 0, so that the first advantages are those without a critic and every rank
    begins alike.

    Args:
        hidden_size: Width of the hidden states.
        backbone: The critic's own layers, or ``None``.
    """

    def __init__(self, config: CriticConfig, hidden_size: int, backbone: Any = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, policy: Any, samples: Samples) -> Tensor:
        """Value before each completion token: what the prompt and the tokens before it promise.

        Args:
            policy: The policy's transformers model, whose layers are used if there are no others.
            samples: B completions on the critic's device.

        Returns:
            (B, T), float32 at least, 0 under a False mask.
        """
        backbone = decoder(policy) if self.backbone is None else self.backbone
        batch = samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.mask
        states, target, _ = predicting_states(
            backbone, *batch, group_size=samples.group_size, with_head=False
        )
        # a value is compared with rewards of 1 to a few per cent: bfloat16 would round it away
        with torch.autocast(states.device.type, enabled=False):
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            weight, bias = self.head.weight.to(dtype), self.head.bias.to(dtype)
            values = nn.functional.linear(states.to(dtype), weight, bias)[:, 0]
        if len(target) == 0:  # zeros whose graph holds all parameters, as DDP waits for each
            return (values.sum() * 0).expand(samples.mask.shape)
        zeros = values.new_zeros(samples.mask.numel())
        return zeros.index_copy(0, target, values).view(samples.mask.shape)

    @torch.no_grad()
    def old_values(self, policy: Any, samples: Samples, pieces: list[Tensor]) -> Tensor:
        """The values of a rollout before its updates, (B, T), in ``micro_batch_indices``."""
        found = torch.cat([self(policy, samples.select(rows)) for rows in pieces])
        return found[torch.cat(pieces).argsort().to(found.device)]

    def estimate(
        self,
        rewards: Tensor,
        values: Tensor,
        kl: Tensor | None,
        mask: Tensor,
        kl_coef: float,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Estimates:
        """Turn rewards and values of a rollout into advantages and returns.

        Args:
            rewards: Of each completion, NaN where missing, (B,).
            values: From :meth:`old_values`, (B, T).
            kl: log policy - log reference, (B, T), or ``None`` without a reference.
            mask: Tokens that count, (B, T) bool.
            kl_coef: The coefficient that the penalty has now.
            reduce: Sums a tensor over all ranks.

        Returns:
            Rows whose reward is missing have advantages 0 and returns NaN: they teach nothing.
        """
        config, missing = self.config, rewards.isnan()[:, None]
        kl = kl if config.kl_in_reward else None
        per_token = token_rewards(rewards.nan_to_num(0).to(values.dtype), mask, kl, kl_coef)
        advantages, returns = gae(per_token, values, mask, config.gamma, config.lam)
        if config.whiten:
            advantages = whiten(advantages, mask & ~missing, reduce)
        return Estimates(
            advantages.masked_fill(missing, 0), values, returns.masked_fill(missing, math.nan)
        )

    def clip_gradient(self, max_norm: float | None) -> Tensor:
        """Measure the critic's gradient and scale it down to ``max_norm``; returns the norm before.

        Apart from the policy's, which a critic with large errors would otherwise scale down.
        """
        limit = math.inf if max_norm is None else max_norm
        return nn.utils.clip_grad_norm_(self.parameters(), limit)

    def loss(self, policy: Any, micro: Rollout, weights: Tensor) -> ValueLoss:
        """``value_coef`` times the value loss of a micro-batch, with its gradient."""
        assert micro.values is not None and micro.returns is not None
        values, clip = self(policy, micro), self.config.value_clip
        result = value_loss(values, micro.values, micro.returns, micro.mask, weights, clip)
        return result._replace(loss=self.config.value_coef * result.loss)


def decoder(model: Any) -> Any:
    """The layers of a causal language model below its output head, adapters included."""
    base = unwrapped(model)
    found = base.get_decoder()  # base_model is more than that, or the whole model, in some types
    return getattr(base, "model", base.base_model) if found is base else found


def fit_critic(state: dict[str, Any], config: CriticConfig | None, training: bool) -> None:
    """Ready a checkpoint's state dict for a module with or without a critic, in place.

    An evaluation asks no critic and drops it.

    Raises:
        ValueError: If training would continue with a critic that the checkpoint does not hold, or
            without the one that it does.
    """
    saved = [name for name in state if name.startswith("critic.")]
    if not training:
        for name in saved:
            del state[name]
    elif (config is not None) != bool(saved):
        there, here = ("no", "has one") if config else ("a", "has none")
        raise ValueError(
            f"model.critic: the checkpoint holds {there} critic, this run {here}; continue with "
            "the settings of the checkpoint, or start a new run"
        )


def load_critic(config: CriticConfig, policy_config: PolicyConfig, policy: Any) -> Critic:
    """Make the critic that ``config`` asks for.

    Args:
        policy_config: What ``path: null`` stands for, dtype, attention, gradient checkpointing.
        policy: The policy's transformers model.

    Raises:
        ValueError: If the layers cannot be read or do not fit the policy's tokens.
    """
    if config.backbone == "policy":
        return Critic(config, policy.config.get_text_config().hidden_size)
    if config.path is None and policy_config.weights == "random":
        raise ValueError(
            "critic.path: a policy with random weights is in no folder; name a folder, or set "
            "critic.backbone to policy"
        )
    path = config.path or policy_config.path
    check_model_folder("critic.path", path, policy_config.trust_remote_code)
    whole = policy_config
    if whole.load_in_4bit:  # all of a critic's weights are trained
        whole = replace(whole, load_in_4bit=False)
    backbone = whole.load("critic.path", AutoModel, config.path)
    rows = backbone.get_input_embeddings().weight.shape[0]
    needed = policy.get_input_embeddings().weight.shape[0]
    if rows < needed:
        raise ValueError(
            f"critic.path: {path} embeds {rows} tokens, the policy {needed}; the critic reads the "
            "policy's tokens, so it must be a model with the same vocabulary"
        )
    make_ready(backbone)
    if policy_config.gradient_checkpointing:
        checkpoint_activations(backbone)
    backbone.train()  # dropout is off in either mode; checkpointing works in this one alone
    return Critic(config, backbone.config.get_text_config().hidden_size, backbone)
