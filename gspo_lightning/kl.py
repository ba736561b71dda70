"""KL estimators per token, and the rules that adapt the KL coefficient.

Decides the estimators' formulas, where the exponent is clamped, and which of them may be a loss.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "k3_corrected"]

_PLAIN = bool | int | float | str | None
MAX_EXPONENT = 20.0  # nats; exp(20) = 4.9e8 is still exact enough to add to


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: Estimator = "k3",
    old_logprobs: Tensor | None = None,
) -> Tensor:
    """Estimate KL(policy || reference) from the log-probs of sampled tokens.

    With d = logprobs - ref_logprobs: k1 = d; k2 = d**2 / 2; k3 = exp(-d) + d - 1; k3_corrected: k3
    times the token's importance ratio, with its gradient. Never multiply the result by a sequence
    ratio: value and gradient would be neither estimator's.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T); the gradient flows through these.
        ref_logprobs: Log-probs under the reference, nats, (B, T); no gradient.
        kind: As a loss, k2 has the gradient of the reverse and k3 that of the forward KL;
            k3_corrected that of the reverse KL also where the policy has moved on.
        old_logprobs: Of the policy that sampled, nats, (B, T); for k3_corrected.

    Returns:
        Nats per token, (B, T), float32 at least; all but k1 >= 0. The exponent of k3 is held
        within +-20, see ``kl_clamped``; a clamped token keeps the gradient of the bound.

    Raises:
        ValueError: If ``kind`` is unknown, or k3_corrected has no ``old_logprobs``.

    Source:
        J. Schulman, "Approximating KL Divergence", 2020. k3_corrected: DeepSeek-V3.2,
        arXiv:2512.02556, section 3.1.

    >>> kl_estimate(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]))
    tensor([0.3679, 0.0000])
    >>> old_logprobs = torch.tensor([-1.5])  # 0.3679 e^0.5
    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k3_corrected", old_logprobs)
    tensor([0.6065])
    """
    if kind not in get_args(Estimator):
        raise ValueError(f"kind must be one of {', '.join(get_args(Estimator))}, got {kind!r}")
    d = _difference(logprobs, ref_logprobs)
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    # A plain clamp would leave the gradient of "+ d" alone, which has the wrong sign out there.
    exponent = -d + (d - d.clamp(-MAX_EXPONENT, MAX_EXPONENT)).detach()
    k3 = exponent.expm1() + d  # expm1: for small d, exp(-d) - 1 would lose every digit of d**2
    if kind == "k3":
        return k3
    if old_logprobs is None:
        raise ValueError("k3_corrected needs old_logprobs, those of the policy that sampled")
    moved = _difference(logprobs, old_logprobs)
    return k3 * (moved + (moved.clamp(-MAX_EXPONENT, MAX_EXPONENT) - moved).detach()).exp()


def kl_clamped(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Find the tokens whose k3 exponent is clamped, to be counted under the mask.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T).
        ref_logprobs: Log-probs under the reference, nats, (B, T).

    Returns:
        (B, T) bool.
    """
    return _difference(logprobs, ref_logprobs).detach().abs() > MAX_EXPONENT


def check_loss_kind(kind: str) -> None:
    """Refuse an estimator that cannot be a loss.

    Args:
        kind: Name of the estimator.

    Raises:
        ValueError: For k1, whose gradient is zero on average, and for an unknown name.
    """
    if kind == "k1":
        raise ValueError(
            "kl_estimator k1 cannot be a loss: on the policy's own samples its mean gradient is "
            "zero, whatever the reference; use k2 (reverse KL) or k3 (forward KL)"
        )
    if kind not in get_args(Estimator):
        raise ValueError(f"kl_estimator must be k2, k3 or k3_corrected, got {kind!r}")


class KLRule:
    """How the next coefficient follows from a rollout's KL.

    A type of its own, not a union: a config that names one rule is then told what is wrong with
    that one.
    """

    target: float

    def next_coef(self, coef: float, observed: float, sequences: int) -> float:
        """Return the coefficient for the next rollout.

        Args:
            coef: Coefficient used in this rollout, > 0.
            observed: KL of this rollout's own samples, nats per token; NaN changes nothing.
            sequences: Completions in the rollout.

        Raises:
            ValueError: If ``coef`` is not positive, or one rollout could make it so.
        """
        raise NotImplementedError

    def marks(self) -> dict[str, Any]:
        """What makes this rule another one: its name and its values, as plain values.

        >>> MultiplicativeKL(target=0.02).marks()["rule.target"]
        0.02
        """
        values = {name: value for name, value in vars(self).items() if isinstance(value, _PLAIN)}
        return {"rule": type(self).__name__, **{f"rule.{k}": v for k, v in values.items()}}


@dataclass(frozen=True)
class MultiplicativeKL(KLRule):
    """Multiply the coefficient when the KL leaves a band around the target.

    Attributes:
        target: KL to aim at, nats per token, > 0.
        factor_up: Factor when KL > high * target, >= 1.
        factor_down: Factor when KL < low * target, in (0, 1].
        high: Upper edge of the band, in targets.
        low: Lower edge of the band, in targets.
        minimum: Smallest coefficient, > 0.
        maximum: Largest coefficient.

    Raises:
        ValueError: If a value is out of range.

    >>> MultiplicativeKL(target=0.01).next_coef(0.2, observed=0.03, sequences=64)
    0.30000000000000004
    """

    target: float = 0.01
    factor_up: float = 1.5
    factor_down: float = 0.5
    high: float = 2.0
    low: float = 0.5
    minimum: float = 0.01
    maximum: float = 1.0

    def __post_init__(self) -> None:
        _check_target(self.target)
        if not self.factor_up >= 1:
            raise ValueError(f"factor_up must be at least 1, got {self.factor_up}")
        if not 0 < self.factor_down <= 1:
            raise ValueError(f"factor_down must be in (0, 1], got {self.factor_down}")
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low must be in [0, high = {self.high}], got {self.low}")
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(
                f"minimum must be in (0, maximum = {self.maximum}], got {self.minimum}"
            )

    def next_coef(self, coef: float, observed: float, sequences: int) -> float:
        """See :meth:`KLRule.next_coef`; this rule does not depend on ``sequences``."""
        del sequences
        _check_coef(coef)
        if math.isnan(observed):
            return coef
        if observed > self.high * self.target:
            coef *= self.factor_up
        elif observed < self.low * self.target:
            coef *= self.factor_down
        return min(max(coef, self.minimum), self.maximum)


@dataclass(frozen=True)
class ProportionalKL(KLRule):
    """Move the coefficient in proportion to the relative error of the KL.

    The factor of a rollout is 1 + error * sequences / horizon, with error = observed / target - 1,
    held within +-clip. The published horizon of 10,000 completions is for runs of millions: at 32
    completions a rollout it is 6 in 10,000 a rollout. Hence the default, which is the same speed
    whatever a rollout's size.

    Attributes:
        target: KL to aim at, nats per token, > 0.
        horizon: Completions over which the coefficient may change by the factor 1 + clip; ``None``
            is ``rollouts`` times those of a rollout.
        clip: Largest relative error that counts, > 0.
        rollouts: The horizon in rollouts, where ``horizon`` is ``None``; more than ``clip``.

    Raises:
        ValueError: If a value is out of range.

    Source:
        arXiv:1909.08593, section 2.2.

    >>> rule = ProportionalKL(target=0.05)
    >>> rule.next_coef(1.0, observed=9.9, sequences=32), rule.next_coef(1.0, 9.9, sequences=512)
    (1.1, 1.1)
    """

    target: float
    horizon: int | None = None
    clip: float = 0.2
    rollouts: float = 2.0

    def __post_init__(self) -> None:
        _check_target(self.target)
        if self.horizon is not None and not self.horizon >= 1:
            raise ValueError(f"horizon must be at least 1 completion, got {self.horizon}")
        if not self.clip > 0:
            raise ValueError(f"clip must be > 0, got {self.clip}")
        if self.horizon is None and not self.clip < self.rollouts < math.inf:
            raise ValueError(f"rollouts must exceed clip = {self.clip:g}, got {self.rollouts}")

    def marks(self) -> dict[str, Any]:
        """See :meth:`KLRule.marks`; without ``rollouts`` where ``horizon`` stands in its place."""
        marks = super().marks()
        return marks if self.horizon is None else marks | {"rule.rollouts": None}

    def next_coef(self, coef: float, observed: float, sequences: int) -> float:
        """See :meth:`KLRule.next_coef`."""
        _check_coef(coef)
        if self.horizon is not None and self.clip * sequences >= self.horizon:
            bound = f"clip * sequences = {self.clip * sequences:g}"
            raise ValueError(f"horizon must exceed {bound} completions, got {self.horizon}")
        if math.isnan(observed):
            return coef
        error = min(max(observed / self.target - 1, -self.clip), self.clip)
        horizon = self.rollouts * sequences if self.horizon is None else self.horizon
        return coef * (1 + error * sequences / horizon)


def _difference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return logprobs.to(dtype) - ref_logprobs.detach().to(dtype)


def _check_target(target: float) -> None:
    if not 0 < target < math.inf:
        raise ValueError(f"target must be > 0 nats per token, got {target}")


def _check_coef(coef: float) -> None:
    if not coef > 0:
        raise ValueError(f"kl_coef must be > 0 to be adapted, a factor cannot move it, got {coef}")
