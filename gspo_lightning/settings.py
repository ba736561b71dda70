"""Settings of ``GSPOModule`` that cannot work, alone or together.

Leaves out what the parts check of themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sampling import Sampler


def check_settings(
    counts: Mapping[str, int | None],
    rewards: Mapping[str, RewardTerm],
    sampler: Sampler,
    *,
    coefficients: tuple[float, float, float | None],
    has_reference: bool,
    truncated: str,
) -> None:
    """Refuse settings that cannot work.

    Args:
        counts: Numbers that must be 1 or more, by name.
        rewards: Reward terms.
        sampler: Draws the completions.
        coefficients: ``kl_coef``, ``entropy_coef`` and ``max_grad_norm``.
        has_reference: Whether there is a reference policy.
        truncated: What becomes of a completion that hit the limit.

    Raises:
        ValueError: Naming the setting, its bound and its value.
    """
    kl_coef, entropy_coef, max_grad_norm = coefficients
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"model.{name} must be >= 1, got {value}")
    if not sampler.temperature > 0:
        raise ValueError(
            f"sampler.temperature must be above 0 in training, got {sampler.temperature}"
        )
    if not rewards:
        raise ValueError("model.rewards is empty; name at least one reward term")
    if not 0 <= kl_coef < math.inf or not math.isfinite(entropy_coef):
        raise ValueError(f"kl_coef {kl_coef} must be >= 0 and entropy_coef {entropy_coef} finite")
    if kl_coef > 0 and not has_reference:
        raise ValueError(f"kl_coef is {kl_coef} but there is no reference; set model.reference")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0 or null, got {max_grad_norm}")
    whitened = [name for name, term in rewards.items() if term.whiten]
    if truncated == "zero_reward" and whitened:
        raise ValueError(
            f"truncated: zero_reward gives 0, which is an average reward where {whitened[0]!r} "
            "is whitened; use keep or mask"
        )
