"""Importance ratios, clipped surrogates, aggregation weights, and the policy loss made of them.

Decides what an algorithm is: a row of choices (``Objective``), no class per paper. All arithmetic
is float32 at least, since 1 + 4e-4 is exactly 1 in bfloat16, and masked before it begins.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gspo_lightning.masked import masked_mean, masked_sum

RatioLevel = Literal["sequence", "sequence_token", "token", "sequence_sum"]
Surrogate = Literal["clip", "cispo"]
Aggregation = Literal["sequence_mean", "token_mean", "fixed_length"]

MAX_LOG_RATIO = 10.0  # nats; exp(10) = 22026, far outside any clip range


@dataclass(frozen=True)
class Objective:
    """The choices that make an algorithm; the defaults are GSPO as published.

    Attributes:
        ratio: Importance ratio. ``sequence``: geometric mean over the sequence's tokens (GSPO,
            eq. 7); ``sequence_token``: the same value, with each token's own gradient (eq. 14);
            ``token``: one per token (GRPO, PPO); ``sequence_sum``: product over the tokens, not
            length-normalised.
        surrogate: ``clip``: PPO's pessimistic minimum; ``cispo``: detached, capped ratio times the
            log-prob.
        aggregation: ``sequence_mean``: mean over tokens, then over sequences (GSPO, GRPO);
            ``token_mean``: over all tokens (DAPO); ``fixed_length``: sum over tokens, divided by
            the generation limit (Dr. GRPO).
        clip_low: The ratio is clipped below 1 - clip_low, in [0, 1).
        clip_high: The ratio is clipped above 1 + clip_high, at least 0.

    Raises:
        ValueError: If a value is unknown or out of range, or the choices do not go together.

    Source:
        GSPO, arXiv:2507.18071, sections 4 and 5.1 (clip range).
    """

    ratio: RatioLevel = "sequence"
    surrogate: Surrogate = "clip"
    aggregation: Aggregation = "sequence_mean"
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        _check_choice("ratio", self.ratio, RatioLevel)
        _check_choice("surrogate", self.surrogate, Surrogate)
        _check_choice("aggregation", self.aggregation, Aggregation)
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low must be in [0, 1), got {self.clip_low}")
        limit = math.expm1(MAX_LOG_RATIO)
        if not 0 <= self.clip_high < limit:
            raise ValueError(f"clip_high must be in [0, {limit:.0f}), got {self.clip_high}")
        if self.ratio != "token" and self.aggregation == "token_mean":
            raise ValueError(
                f"ratio {self.ratio} cannot be combined with aggregation token_mean: one ratio per "
                "sequence would be weighted by the sequence's length, so that long completions "
                "dominate; use sequence_mean, or ratio token"
            )

    @property
    def clip_width(self) -> float:
        """Narrower side of the clip range; CISPO caps the ratio, and has an upper side only."""
        return self.clip_high if self.surrogate == "cispo" else min(self.clip_low, self.clip_high)


class PolicyLoss(NamedTuple):
    """What ``policy_loss`` returns.

    Attributes:
        loss: Scalar with a gradient, to be minimised.
        clip_fraction_sequences: Of the given sequences that count, those with a clipped token, ().
        clip_fraction_tokens: Of the given tokens that count, those clipped, ().
        ratio: Importance ratio of each token, detached, (B, T).
    """

    loss: Tensor
    clip_fraction_sequences: Tensor
    clip_fraction_tokens: Tensor
    ratio: Tensor


def importance_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: RatioLevel
) -> Tensor:
    """Compute the log of the importance ratio of policy to old policy.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T).
        old_logprobs: Log-probs under the policy that sampled, nats, (B, T).
        mask: True on tokens that count, (B, T) bool.
        level: See ``Objective.ratio``.

    Returns:
        Log-ratio, (B, T), float32 at least. A sequence's ratio stands in each of its columns;
        a row with nothing selected has 0, and so has a token ratio under a False mask.

    Raises:
        ValueError: If ``level`` is unknown.

    Source:
        GSPO, arXiv:2507.18071, eq. 7 (sequence), eq. 13 and 14 (sequence_token).

    >>> log_ratio = importance_log_ratio(
    ...     torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -2.1, 0.0]]),
    ...     torch.tensor([[True, True, False]]), "sequence")
    >>> [round(value, 4) for value in log_ratio[0].tolist()]
    [0.3, 0.3, 0.3]
    """
    _check_choice("level", level, RatioLevel)
    logprobs = _clean(logprobs, mask)
    difference = logprobs - _clean(old_logprobs, mask).detach()
    if level == "token":
        return difference
    if level == "sequence_sum":
        return masked_sum(difference, mask, dim=1)[:, None].expand_as(difference)
    sequence = masked_mean(difference, mask, dim=1)[:, None].expand_as(difference)
    if level == "sequence":
        return sequence
    # The bracket is exactly 0. Added in another order, its rounding exceeds the clip range.
    return sequence.detach() + (logprobs - logprobs.detach())


def clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """Find the tokens whose ratio is clipped.

    With surrogate ``clip`` these are the tokens without a gradient: advantage positive and ratio
    above the range, or negative and below. With ``cispo``, where the gradient stays, they are
    those whose ratio is capped. An advantage of 0 never counts.

    Args:
        log_ratio: From ``importance_log_ratio``, (B, T).
        advantages: (B,) or (B, T).
        mask: True on tokens that count, (B, T) bool.
        objective: Surrogate and clip range.

    Returns:
        (B, T) bool, False under a False mask.
    """
    advantages = _per_token(advantages, mask)
    # Logs are compared: around 1 float32 resolves a ratio to 1e-7 only, a log-ratio much finer.
    above = log_ratio.detach() > math.log1p(objective.clip_high)
    below = log_ratio.detach() < math.log1p(-objective.clip_low)
    if objective.surrogate == "cispo":
        return above & (advantages != 0) & mask
    return ((above & (advantages > 0)) | (below & (advantages < 0))) & mask


def token_weights(
    mask: Tensor,
    aggregation: Aggregation,
    max_length: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the weight of each token in the loss, once for a whole mini-batch.

    A loss is then ``sum(weights * per-token loss)`` over any cut of the mini-batch into
    micro-batches and ranks: gradients are to be summed, not averaged, over both.

    Args:
        mask: True on tokens that count, (B, T) bool, of all rows of this rank's mini-batch.
        aggregation: See ``Objective.aggregation``.
        max_length: Generation limit in tokens, needed by ``fixed_length`` alone.
        reduce: Sums an int64 tensor over all ranks; None with one rank.
        dtype: Of the result; float64 for a float64 loss.

    Returns:
        Non-negative weights, (B, T), 0 under a False mask; their sum over all ranks is 1 for
        ``sequence_mean`` and ``token_mean``.

    Raises:
        ValueError: If ``aggregation`` is unknown, or ``max_length`` is missing or below 1.

    Source:
        ``token_mean``: DAPO, arXiv:2503.14476, "Token-Level Policy Gradient Loss".
        ``fixed_length``: Dr. GRPO, arXiv:2503.20783, section 3.2.

    >>> token_weights(torch.tensor([[True, True], [True, False]]), "sequence_mean")
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    _check_choice("aggregation", aggregation, Aggregation)
    if aggregation == "fixed_length" and (max_length is None or max_length < 1):
        raise ValueError(f"fixed_length needs max_length of at least 1 token, got {max_length}")
    lengths = mask.sum(dim=1, keepdim=True)
    counts = torch.stack([(lengths > 0).sum(), lengths.sum()])
    # Ranks add up before the division: a mean of their means would depend on who has which rows.
    num_sequences, num_tokens = (counts if reduce is None else reduce(counts)).clamp(min=1)
    if aggregation == "token_mean":
        return mask.to(dtype) / num_tokens
    if aggregation == "fixed_length":
        return mask.to(dtype) / (num_sequences * max_length)
    return mask.to(dtype) / (lengths.clamp(min=1) * num_sequences)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    objective: Objective,
) -> PolicyLoss:
    """Compute the surrogate loss of some rows of a mini-batch.

    The log-ratio is held within +-10 nats before ``exp``, so that one broken token cannot make
    the loss infinite; its gradient then is that of the bound instead of none, so that a token
    that should become less likely still does.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T).
        old_logprobs: Log-probs under the policy that sampled, nats, (B, T).
        advantages: (B,) or (B, T).
        mask: True on tokens that count, (B, T) bool. What stands elsewhere has no influence.
        weights: From ``token_weights`` of the whole mini-batch, (B, T).
        objective: Ratio, surrogate and clip range.

    Returns:
        Loss and clip fractions; with nothing selected all are 0 and the loss keeps its graph.

    Raises:
        ValueError: If the shapes do not fit.

    Source:
        GSPO, arXiv:2507.18071, eq. 5. PPO, arXiv:1707.06347, eq. 7. CISPO, arXiv:2506.13585.
    """
    for name, tensor in {"old_logprobs": old_logprobs, "mask": mask, "weights": weights}.items():
        if tensor.shape != logprobs.shape:
            shapes = f"{tuple(logprobs.shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"{name} must have the shape of logprobs, {shapes}")
    advantages = _per_token(advantages, mask)
    log_ratio = importance_log_ratio(logprobs, old_logprobs, mask, objective.ratio)
    is_clipped = clipped(log_ratio, advantages, mask, objective)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = (log_ratio + (bounded - log_ratio).detach()).exp()

    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.surrogate == "cispo":
        gain = ratio.detach().clamp(max=high) * _clean(logprobs, mask)
    else:  # the minimum of PPO, with a gradient that is exactly 0 where it is clipped
        gain = torch.where(is_clipped, ratio.detach().clamp(low, high), ratio)
    return PolicyLoss(
        loss=-(weights * gain * advantages).sum(),
        clip_fraction_sequences=masked_mean(is_clipped.any(dim=1), mask.any(dim=1)),
        clip_fraction_tokens=masked_mean(is_clipped, mask),
        ratio=ratio.detach(),
    )


def _clean(x: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (or float64) values with zeros under a False mask, whatever stood there."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask, 0)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return clean (B, T) advantages from (B,) or (B, T)."""
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        allowed = f"{tuple(mask.shape[:1])} or {tuple(mask.shape)}"
        raise ValueError(f"advantages must have shape {allowed}, got {tuple(advantages.shape)}")
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(mask)
    return _clean(advantages, mask).detach()


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
