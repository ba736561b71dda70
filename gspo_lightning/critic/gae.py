"""Per-token advantages from a critic: token rewards, generalized advantage estimation, value loss.

Decides where a completion's reward lands, how values become advantages and returns, and how the
value loss is clipped. A completion ends with its last selected token, whether it ended by itself or
was cut off: nothing is expected behind it. The value loss takes the token weights of the policy
loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gspo_lightning.masked import masked_mean, masked_sum


def token_rewards(
    rewards: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0
) -> Tensor:
    """Give a completion's reward to its last token, and to each token its own KL penalty.

    Args:
        rewards: Reward of each completion, NaN where missing, (B,).
        mask: True on tokens that count, (B, T) bool.
        kl: log policy - log reference of each sampled token (k1), nats, (B, T).
        kl_coef: Coefficient of the penalty.

    Returns:
        r_t = -kl_coef * kl_t + [t is the last token] * R, (B, T), 0 under a False mask.

    Source:
        InstructGPT, arXiv:2203.02155, section 3.5. arXiv:1909.08593, section 2.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[True, True, False]]))
    tensor([[0., 1., 0.]])
    """
    left = mask.flip(1).cumsum(1).flip(1)  # selected tokens from here on, this one included
    result = torch.where(mask & (left == 1), rewards[:, None], 0.0)
    if kl is not None and kl_coef:
        result = result - kl_coef * kl.masked_fill(~mask, 0)
    return result


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Estimate per-token advantages and returns: generalized advantage estimation.

    With delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, and both V and A
    0 behind the last token.

    Args:
        rewards: Per token, (B, T), from :func:`token_rewards`.
        values: V_t, what the critic expected before token t, (B, T).
        mask: True on tokens that count, (B, T) bool.
        gamma: Discount per token, in [0, 1].
        lam: 0 trusts the critic's next value alone, 1 the rewards alone, in [0, 1].

    Returns:
        Advantages and returns (advantage + value), (B, T) each, 0 under a False mask.

    Source:
        GAE, arXiv:1506.02438, eq. 16. PPO, arXiv:1707.06347, eq. 11 and 12.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2).bool(),
    ...     gamma=1.0, lam=0.5)
    (tensor([[0.1250, 0.7500]]), tensor([[0.6250, 1.0000]]))
    """
    values = values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    return advantages, advantages + values


def whiten(
    x: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None, eps: float = 1e-6
) -> Tensor:
    """Shift and scale the selected entries of all ranks to mean 0 and standard deviation 1.

    Args:
        x: (B, T).
        mask: True on entries that count, (B, T) bool.
        reduce: Sums a tensor over all ranks; None with one rank.
        eps: Added to the standard deviation.

    Returns:
        (B, T), 0 under a False mask; all 0 where the entries do not differ by more than 1e-6 of
        their mean (of 1, if that is larger): rounding is not to be blown up.
    """

    def summed(value: Tensor) -> Tensor:
        return value if reduce is None else reduce(value)

    count = summed(mask.sum().double()).clamp(min=1)
    mean = summed(masked_sum(x.double(), mask)) / count
    centred = (x.double() - mean).masked_fill(~mask, 0)
    std = (summed((centred**2).sum()) / (count - 1).clamp(min=1)).sqrt()
    flat = std <= 1e-6 * mean.abs().clamp(min=1)
    return torch.where(flat, 0.0, centred / (std + eps)).to(x.dtype)


class ValueLoss(NamedTuple):
    """What ``value_loss`` returns.

    Attributes:
        loss: Scalar with a gradient.
        clip_fraction: Of the given tokens with a return, those clipped, ().
    """

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor,
    clip: float | None = None,
) -> ValueLoss:
    """Half the squared error of the values, which may not gain by leaving the old ones.

    With ``clip``, a token's loss is the larger of the errors of V and of V held within ``clip`` of
    the old value, so that a value already moved that far has no gradient.

    Args:
        values: From the critic now, (B, T).
        old_values: From the critic when the rollout was collected, (B, T).
        returns: What the values should have been, NaN where a completion has no reward, (B, T).
        mask: True on tokens that count, (B, T) bool.
        weights: From ``objectives.token_weights`` of the whole mini-batch, (B, T).
        clip: Half-width of the range, in units of the reward; None does not clip.

    Returns:
        Loss and clip fraction; 0 with the graph kept where no return is there.

    Source:
        PPO, arXiv:1707.06347, eq. 9 (the squared error); the clipping is that of OpenAI's
        baselines, described in arXiv:2005.12729.
    """
    valid = mask & ~returns.isnan()
    # masked before any arithmetic: NaN * 0 is NaN, in the gradient, too
    values, old_values, returns = (
        x.masked_fill(~valid, 0) for x in (values, old_values.detach(), returns.detach())
    )
    error = (values - returns) ** 2
    is_clipped = torch.zeros_like(valid)
    if clip is not None:
        held = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
        is_clipped = ((values - old_values).abs() > clip) & (held > error)
        error = torch.where(is_clipped, held, error)
    return ValueLoss(0.5 * (weights * error).sum(), masked_mean(is_clipped, valid))
