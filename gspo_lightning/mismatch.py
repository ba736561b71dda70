"""Weights of completions that something else than the policy drew: another engine, older weights.

Decides what a row's policy loss is multiplied with where its tokens had other probabilities there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gspo_lightning.masked import masked_mean, masked_sum

Correction = Literal["none", "sequence", "mean"]
FAR = 300.0  # nats; the square of e^300 is still a number in float64


@dataclass(frozen=True)
class Mismatch:
    """How a row's policy loss is weighed; d is log pi_old - log mu of a token, mu the sampler.

    Attributes:
        correction: ``none``: by 1, and the difference is only measured; ``sequence``: by
            min(cap, exp(sum of d)) over its mean in the mini-batch, the exact change of measure up
            to the cap, for short completions; ``mean``: by exp(mean of d), between 1 / cap and cap,
            which is no change of measure.
        cap: Largest weight, above 1 (before it is divided by a mean).
        sequence_limit: Rows whose mean d is farther from 0 than this, in nats per token, are left
            out of the policy loss. What it is divided by stays.
        token_limit: The same for rows with a d that is farther from 0, in nats.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    correction: Correction = "none"
    cap: float = 2.0
    sequence_limit: float | None = None
    token_limit: float | None = None

    def __post_init__(self) -> None:
        if self.correction not in get_args(Correction):
            kinds = ", ".join(get_args(Correction))
            raise ValueError(f"mismatch.correction must be one of {kinds}, got {self.correction}")
        if not self.cap > 1:
            raise ValueError(f"mismatch.cap must be above 1, got {self.cap}")
        for name in ("sequence_limit", "token_limit"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise ValueError(f"mismatch.{name} must be above 0 nats or null, got {limit}")

    @property
    def weighs(self) -> bool:
        """Whether a row can have another weight than 1."""
        limits = self.sequence_limit, self.token_limit
        return self.correction != "none" or limits != (None, None)


class RowWeights(NamedTuple):
    """The weight of each row, in each of its columns, (B, T); whether cap or limits act, (B,)."""

    weights: Tensor
    capped: Tensor
    masked: Tensor


def sampler_log_ratios(old: Tensor, sampled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The d of each token, (B, T), 0 under a False mask, and each row's sum and mean, (B,)."""
    tokens = (old.detach().double() - sampled.double()).masked_fill(~mask, 0)
    return tokens, masked_sum(tokens, mask, 1), masked_mean(tokens, mask, 1)


def row_weights(
    old: Tensor,
    sampled: Tensor,
    mask: Tensor,
    mismatch: Mismatch,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> RowWeights:
    """Compute what the policy loss of each row of a mini-batch is multiplied with.

    Args:
        old: Log-probs under the policy before its updates, nats, (B, T), of this rank's rows.
        sampled: Log-probs under the sampler, nats, (B, T).
        mask: Tokens that count, (B, T) bool; what stands elsewhere has no influence.
        mismatch: The choices.
        reduce: Sums a float64 tensor over all ranks; None with one rank.

    Returns:
        Weights, all exactly 1 where ``old`` equals ``sampled``.

    >>> old, sampled = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), torch.full((2, 2), -1.0)
    >>> row_weights(old, sampled, torch.ones(2, 2).bool(), Mismatch("mean", cap=1.5)).weights[:, 0]
    tensor([0.6667, 1.0000])
    """
    tokens, sums, means = sampler_log_ratios(old, sampled, mask)
    log_weight = {"none": torch.zeros_like(sums), "sequence": sums, "mean": means}[
        mismatch.correction
    ]
    highest = math.log(mismatch.cap)
    lowest = -highest if mismatch.correction == "mean" else -math.inf
    weights = log_weight.clamp(max(lowest, -FAR), min(highest, FAR)).exp()
    if mismatch.correction == "sequence":
        counted = mask.any(1)
        total = torch.stack([weights[counted].sum(), counted.sum()])
        total, count = total if reduce is None else reduce(total)
        weights = weights * (count / total)
    masked = torch.zeros_like(mask[:, 0])
    if mismatch.sequence_limit is not None:
        masked = masked | (means.abs() > mismatch.sequence_limit)
    if mismatch.token_limit is not None:
        masked = masked | (tokens.abs() > mismatch.token_limit).any(1)
    weights = weights.masked_fill(masked, 0).to(old.dtype)[:, None].expand_as(mask)
    return RowWeights(weights, (log_weight < lowest) | (log_weight > highest), masked)
