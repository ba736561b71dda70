"""Group-relative advantages: how much better a completion was than its siblings.

Decides the baseline, the scale, and what counts as a group without information (flat: advantages
exactly 0). A missing reward is NaN: it takes part in no statistic and gets advantage 0.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from gspo_lightning.masked import masked_mean, masked_sum

Kind = Literal[
    "normalized",
    "relative",
    "leave_one_out",
    "batch_normalized",
    "opo",
    "gpg",
    "pass_at_k",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")  # over all tokens, afterwards
SCALED = ("normalized", "pass_at_k")  # by the spread of a group


def group_advantages(
    rewards: Tensor,
    kind: Kind = "normalized",
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compare each reward with the rewards of its group.

    Args:
        rewards: One row per prompt, (P, G), finite, or NaN where missing.
        kind: ``relative``: reward minus group mean; ``normalized``: that over the group's standard
            deviation (n - 1); ``leave_one_out``: reward minus the mean of the other members;
            ``batch_normalized``: ``relative`` over the standard deviation of all P * G rewards;
            ``opo``: reward minus the mean weighted by length; ``gpg``: ``relative`` over the share
            of rewards in groups that are not flat; ``pass_at_k``: the best one's lead over the
            second, over the group's standard deviation, 0 for the others. To be whitened over all
            tokens afterwards: ``reinforce_plus_plus``, the reward itself, G = 1 will do, and
            ``reinforce_plus_plus_baseline``, which is ``relative``.
        eps: Added to the standard deviation, in units of the reward.
        lengths: Tokens of each completion, (P, G), for ``opo``.
        reduce: Sums a tensor over all ranks, for ``gpg``; None with one rank.

    Returns:
        Advantages, (P, G), float32 at least. 0 for missing rewards, for flat groups, and for
        groups with fewer than two rewards. With ``normalized``, at most sqrt(G - 1) in size.

    Raises:
        ValueError: If the shape is not (P, G) with G >= 2, or ``kind``, ``eps`` or a reward is bad.

    Source:
        ``normalized``: GRPO, arXiv:2402.03300, section 4.1.2. ``relative``: Dr. GRPO,
        arXiv:2503.20783, section 3.2. ``leave_one_out``: RLOO, arXiv:2402.14740. ``opo``:
        arXiv:2505.23585. ``gpg``: arXiv:2504.02546. ``pass_at_k``: arXiv:2503.19595.
        ``reinforce_plus_plus``: arXiv:2501.03262.

    The first of two groups, of which the second is flat:

    >>> rewards = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    >>> lengths = torch.tensor([[1, 1, 1, 3], [1, 1, 1, 1]])
    >>> for kind in get_args(Kind):
    ...     found = group_advantages(rewards, kind, lengths=lengths)[0]
    ...     print(kind, [round(value, 2) for value in found.tolist()])
    normalized [1.41, 0.0, -0.71, -0.71]
    relative [2.0, 0.0, -1.0, -1.0]
    leave_one_out [2.67, 0.0, -1.33, -1.33]
    batch_normalized [2.16, 0.0, -1.08, -1.08]
    opo [2.33, 0.33, -0.67, -0.67]
    gpg [4.0, 0.0, -2.0, -2.0]
    pass_at_k [1.41, 0.0, 0.0, 0.0]
    reinforce_plus_plus [3.0, 1.0, 0.0, 0.0]
    reinforce_plus_plus_baseline [2.0, 0.0, -1.0, -1.0]
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if kind == "reinforce_plus_plus":
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32)).nan_to_num(0)
    flat = flat_groups(rewards)[:, None]
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    valid = ~rewards.isnan()
    count = valid.sum(dim=1, keepdim=True)
    mean = masked_mean(rewards, valid, dim=1)[:, None]
    # Flat groups are 0 by decision, not by subtraction: in float32 eight 0.1 have another mean.
    centered = torch.where(valid & ~flat, rewards - mean, 0)
    if kind in ("relative", "reinforce_plus_plus_baseline"):
        return centered
    if kind == "opo":
        if lengths is None:
            raise ValueError("kind opo needs lengths, the tokens of each completion")
        share = lengths.masked_fill(~valid, 0).to(rewards)
        baseline = masked_sum(share * rewards, valid, dim=1) / share.sum(dim=1).clamp(min=1)
        return torch.where(valid & ~flat, rewards - baseline[:, None], 0)
    if kind == "gpg":
        counts = torch.stack([valid.sum(), (valid & ~flat).sum()])
        total, telling = counts if reduce is None else reduce(counts)
        return centered * total / telling.clamp(min=1)
    deviation = centered
    if kind == "pass_at_k":
        first, second = torch.where(valid, rewards, -torch.inf).topk(2, dim=1).values.unbind(1)
        lead = (first - second)[:, None]
        best = valid & ~flat & (rewards == first[:, None])
        centered = torch.where(best, lead, 0)
    if kind == "leave_one_out":  # r - (sum - r) / (n - 1), written with the group's mean
        return centered * count / (count - 1).clamp(min=1)
    if kind == "batch_normalized":
        spread = rewards - masked_mean(rewards, valid)
        variance = masked_sum(spread**2, valid) / (valid.sum() - 1).clamp(min=1)
    else:
        variance = masked_sum(deviation**2, valid, dim=1)[:, None] / (count - 1).clamp(min=1)
    # where() keeps a flat group from becoming 0 / 0 when eps is 0.
    return torch.where(centered == 0, 0, centered / (variance.sqrt() + eps))


def flat_groups(rewards: Tensor) -> Tensor:
    """Find the groups whose rewards carry no information.

    Args:
        rewards: One row per prompt, (P, G), finite, or NaN where missing.

    Returns:
        (P,) bool: True where largest and smallest reward agree to 1e-6 (of the largest, if that
        is above 1 in size), or where fewer than two rewards are there.

    Raises:
        ValueError: If the shape is not (P, G) with G >= 2, or a reward is infinite.

    >>> flat_groups(torch.tensor([[0.1, 0.1], [0.1, 0.2], [0.1, float("nan")]]))
    tensor([ True, False,  True])
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards must be (P, G) with group size G >= 2, got {shape}")
    if rewards.isinf().any():
        raise ValueError("rewards must be finite, or NaN where missing, got an infinite one")
    valid = ~rewards.isnan()
    largest = torch.where(valid, rewards, -torch.inf).amax(dim=1)
    smallest = torch.where(valid, rewards, torch.inf).amin(dim=1)
    # A group with one reward has the difference 0, one with none -inf: both count as flat.
    return largest - smallest <= 1e-6 * largest.abs().clamp(min=1)
