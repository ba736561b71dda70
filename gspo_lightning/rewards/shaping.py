"""Whitening: the running statistics that put raw rewards of different units on one scale."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the standard deviation: equal rewards whiten to 0


@dataclass
class RunningStatistics:
    """Mean and standard deviation of every value seen so far, merged batch by batch.

    A checkpoint keeps ``state_dict``. Batches are merged, not values added one at a time, so that
    the result does not depend on how ranks share a rollout.

    Source:
        Welford's method for batches: Chan, Golub and LeVeque, 1979, "Updating Formulae and a
        Pairwise Algorithm for Computing Sample Variances".

    >>> seen = RunningStatistics()
    >>> seen.update(torch.tensor([1.0, 2.0]))
    >>> seen.update(torch.tensor([6.0, float("nan")]))
    >>> seen.count, seen.mean, round(seen.std, 4)
    (3, 3.0, 2.1602)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    @property
    def std(self) -> float:
        """Standard deviation over all values (divided by their number); 1 before there are two."""
        return math.sqrt(self.squares / self.count) if self.count > 1 else 1.0

    def update(self, values: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take a batch in; NaN is no value.

        Args:
            values: Raw rewards of this rank, (B,).
            reduce: Sums a tensor over ranks; every rank must call. ``None`` for one rank.
        """
        reduce = reduce or (lambda x: x)
        values = values[~values.isnan()].double().cpu()
        size = torch.tensor(float(len(values)), dtype=torch.float64)
        count, total = reduce(torch.stack([size, values.sum()])).tolist()
        if count == 0:
            return
        mean = total / count
        # Squares are taken around the mean of all ranks: a sum of squares minus a squared sum would
        # lose digits.
        squares = reduce(((values - mean) ** 2).sum()).item()
        difference, before = mean - self.mean, self.count
        self.count += int(count)
        self.mean += difference * count / self.count
        self.squares += squares + difference**2 * before * count / self.count

    def whiten(self, values: Tensor) -> Tensor:
        """(value - mean) / std, same shape; unchanged before two values were seen."""
        return values if self.count < 2 else (values - self.mean) / (self.std + EPSILON)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
