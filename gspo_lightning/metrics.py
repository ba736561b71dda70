"""Metrics: sums and counts over a rollout's updates, unbiased pass@k, and the names of the curves.

Sums and counts are reduced over mini-batches and ranks, never means of means; extremes by maximum
and minimum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from gspo_lightning.bounds import check_at_least

CURVES = (
    "policy_loss",
    "entropy_loss",
    "kl_loss",
    "reward",
    "relative_advantage",
    "kl_divergence",
    "kl_coef",
    "avg_response_length",
)


def pass_at_k(num_samples: Tensor, num_correct: Tensor, k: int) -> Tensor:
    """Chance that at least one of k completions drawn without replacement is correct, unbiased.

    1 - C(n - c, k) / C(n, k), as a product, which does not overflow.

    Args:
        num_samples: Completions sampled per prompt, n, (P,) int, n >= k.
        num_correct: Correct ones among them, c, (P,) int.
        k: Completions drawn.

    Returns:
        Probability in [0, 1], (P,) float64.

    Raises:
        ValueError: If fewer than ``k`` completions were sampled, or more were correct.

    Source:
        arXiv:2107.03374, section 2.1.

    >>> pass_at_k(torch.tensor([4]), torch.tensor([1]), k=2)
    tensor([0.5000], dtype=torch.float64)
    """
    if k < 1 or bool((num_samples < k).any()):
        raise ValueError(f"pass@{k} needs 1 <= k <= samples per prompt, got {num_samples.tolist()}")
    if bool(((num_correct < 0) | (num_correct > num_samples)).any()):
        raise ValueError(f"num_correct must lie in [0, num_samples], got {num_correct.tolist()}")
    n, c = num_samples.double(), num_correct.double()
    none_correct = torch.ones_like(n)
    for i in range(k):  # the i-th draw misses too
        none_correct = none_correct * ((n - c - i).clamp(min=0) / (n - i))
    return 1 - none_correct


class PassAtK(Metric):
    """Mean of :func:`pass_at_k` over prompts.

    Args:
        k: Completions drawn per prompt.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        check_at_least(1, k=k)
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, num_samples: Tensor, num_correct: Tensor) -> None:
        """Add prompts: completions sampled (P,) and correct ones among them (P,)."""
        self.total += pass_at_k(num_samples, num_correct, self.k).sum()
        self.count += num_samples.numel()

    def compute(self) -> Tensor:
        """The mean so far, () float64; NaN before the first prompt."""
        return self.total / self.count


class RolloutMetrics(Metric):
    """Means, totals and extremes over one rollout, exact under mini-batches and ranks.

    Args:
        means: Names of quantities averaged as (sum of values) / (sum of counts).
        totals: Names of quantities that are only summed.
        extremes: Names of quantities of which the least and the greatest value are kept, reported
            as ``<name>_min`` and ``<name>_max``.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, means: Sequence[str], totals: Sequence[str] = (), extremes: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.totals = frozenset(totals)
        self.places = {name: i for i, name in enumerate([*means, *totals])}
        self.extremes = {name: i for i, name in enumerate(extremes)}
        size, double = len(self.places), torch.float64  # float32 would lose tokens of long runs
        self.add_state("sums", torch.zeros(size, dtype=double), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size, dtype=double), dist_reduce_fx="sum")
        bound = torch.full((len(extremes),), math.inf, dtype=double)
        self.add_state("low", bound, dist_reduce_fx="min")
        self.add_state("high", -bound, dist_reduce_fx="max")

    def update(
        self, name: str, values: Tensor | float, count: Tensor | float | None = None
    ) -> None:
        """Add to a mean, a total or an extreme.

        Args:
            name: One of ``means``, ``totals`` or ``extremes``.
            values: Values to add up, any shape, or with ``count`` a sum already made.
            count: How many values the sum holds; ``None`` counts ``values``.
        """
        values = torch.as_tensor(values, device=self.sums.device).detach().double()
        if name in self.extremes:
            if values.numel():
                i = self.extremes[name]
                self.low[i] = torch.minimum(self.low[i], values.min())
                self.high[i] = torch.maximum(self.high[i], values.max())
            return
        i = self.places[name]
        self.sums[i] += values.sum()
        self.counts[i] += values.numel() if count is None else count

    def compute(self) -> dict[str, float]:
        """Everything that was counted, by name. A name without a value is absent, never NaN."""
        result = {}
        for name, i in self.places.items():
            if self.counts[i] > 0:
                total = self.sums[i]
                result[name] = (total if name in self.totals else total / self.counts[i]).item()
        for name, i in self.extremes.items():
            if self.high[i] >= self.low[i]:
                result[f"{name}_min"] = self.low[i].item()
                result[f"{name}_max"] = self.high[i].item()
        return result
