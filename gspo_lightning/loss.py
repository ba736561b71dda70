"""The loss of one micro-batch, from tensors: policy loss, entropy bonus, KL penalty, value loss.

Decides what is added up. Called by the update, by the check of a gradient before a run and by the
replay of a faulty step, so that all three compute the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gspo_lightning.kl import check_loss_kind, kl_estimate
from gspo_lightning.mismatch import Mismatch
from gspo_lightning.objectives import Objective, PolicyLoss, policy_loss
from gspo_lightning.rollout import Rollout


@dataclass(frozen=True)
class LossChoices:
    """What a loss is made of.

    Args:
        objective: Ratio, surrogate, aggregation and clip range of the policy loss.
        kl_estimator: ``k3`` (forward-KL gradient), ``k2`` (reverse-KL gradient) or
            ``k3_corrected`` (that also off the policy).
        kl_coef: Coefficient of the KL penalty in the loss, >= 0; 0 computes none.
        entropy_coef: Coefficient of the entropy bonus; 0 computes none.
        mismatch: How rows are weighed that the policy itself would not have drawn as often.

    Raises:
        ValueError: If the estimator has no gradient that trains.
    """

    objective: Objective = field(default_factory=Objective)
    kl_estimator: Literal["k2", "k3", "k3_corrected"] = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    mismatch: Mismatch = field(default_factory=Mismatch)

    def __post_init__(self) -> None:
        check_loss_kind(self.kl_estimator)


class LossParts(NamedTuple):
    """The terms of a loss, () each, already times their coefficients; 0 where there is none."""

    policy: Tensor
    entropy: Tensor
    kl: Tensor


class MicroLoss(NamedTuple):
    """A micro-batch's share of the loss of its mini-batch.

    Attributes:
        total: The sum of all terms, (), attached to the graph.
        parts: The terms.
        clip: Ratio and clip fractions of the policy loss.
        old: Log-probs that the ratio is taken to, nats, (b, T).
    """

    total: Tensor
    parts: LossParts
    clip: PolicyLoss
    old: Tensor

    def detach(self) -> MicroLoss:
        """The same numbers without their graph, which holds the activations of a whole pass."""
        return MicroLoss(
            self.total.detach(),
            LossParts(*(part.detach() for part in self.parts)),
            self.clip._replace(loss=self.clip.loss.detach()),
            self.old,
        )


def micro_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    micro: Rollout,
    weights: Tensor,
    choices: LossChoices,
    value: Tensor | None = None,
) -> MicroLoss:
    """Compute the loss of a micro-batch.

    Args:
        logprobs: Log-probs of the completion tokens under the policy as it is, with their graph,
            nats, (b, T).
        entropy: Entropy of the distributions they were drawn from, nats, (b, T), or ``None`` where
            ``choices`` ask for none.
        micro: b rows of a rollout. In rows whose ``old_known`` is False ``logprobs`` themselves,
            detached, are the old log-probs: their ratio is exactly 1.
        weights: This micro-batch's part of ``objectives.token_weights``, made for the whole
            mini-batch, (b, T).
        choices: What the loss is made of.
        value: Loss of a critic, (), added as it is, or ``None`` without a critic.

    Returns:
        The loss and what it was computed from. Losses of micro-batches add up to that of the
        mini-batch.

    Source:
        GSPO, arXiv:2507.18071, equation 5, for the defaults of ``choices``.
    """
    old = micro.old_logprobs
    if micro.old_known is not None:
        old = torch.where(micro.old_known[:, None], old, logprobs.detach())
    # Only the policy loss is corrected for a sampler that is not the policy.
    shares = weights if micro.mismatch_weights is None else weights * micro.mismatch_weights
    rows = micro.advantages, micro.mask, shares
    policy = policy_loss(logprobs, old, *rows, choices.objective, micro.picked)
    entropy_loss = kl_loss = policy.loss.new_zeros(())
    if entropy is not None and choices.entropy_coef != 0:
        entropy_loss = -choices.entropy_coef * (weights * entropy).sum()
    if micro.ref_logprobs is not None and choices.kl_coef > 0:
        kl = kl_estimate(logprobs, micro.ref_logprobs, choices.kl_estimator, old)
        kl_loss = choices.kl_coef * (weights * kl).sum()
    total = policy.loss + entropy_loss + kl_loss
    if value is not None:
        total = total + value
    return MicroLoss(total, LossParts(policy.loss, entropy_loss, kl_loss), policy, old)
