"""Reward terms: functions of rows and completions, weighted and summed into one reward a sequence.

Decides what a missing reward is and how terms add up. Leaves out advantages, and the frozen reward
model (``frozen.RewardModel``), which is one more callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RewardFn = Callable[[list[dict], list[str]], Sequence[float | None]]


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward.

    Args:
        fn: Called with the rows of the data and the completions, both of length B; gives one number
            a completion, or ``None`` where the term does not apply.
        weight: Factor of the term in the sum.

    Raises:
        ValueError: If ``weight`` is not finite.
    """

    fn: RewardFn
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"a reward weight must be finite, got {self.weight}")


class Scores(NamedTuple):
    """Rewards of B completions: the weighted sum (B,) and each term raw (B,); NaN where missing."""

    total: Tensor
    parts: dict[str, Tensor]


def score(terms: Mapping[str, RewardTerm], rows: list[dict], completions: list[str]) -> Scores:
    """Score completions with every term and add the terms up.

    A term that does not apply to a row (``None``) is left out of that row's sum. A row with a NaN,
    or to which no term applies, has no reward: NaN, for the group statistics to leave out.

    Args:
        terms: Reward terms by name.
        rows: Rows of the data, one per completion.
        completions: Completion texts.

    Returns:
        Totals and raw parts, (B,) float32 on the CPU.

    Raises:
        ValueError: If a term gives another number of rewards than there are completions, something
            that is no number, or an infinite one; the message names the term.

    >>> length = RewardTerm(lambda rows, texts: [float(len(text)) for text in texts], weight=0.5)
    >>> score({"length": length}, [{}, {}], ["ab", "abcd"]).total
    tensor([1., 2.])
    """
    total = torch.zeros(len(completions), dtype=torch.float64)
    applies = torch.zeros(len(completions), dtype=torch.bool)
    parts = {}
    for name, term in terms.items():
        values = list(term.fn(rows, completions))
        if len(values) != len(completions):
            raise ValueError(
                f"reward {name!r} gave {len(values)} values for {len(completions)} completions"
            )
        present = torch.tensor([value is not None for value in values], dtype=torch.bool)
        try:
            numbers = [math.nan if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward {name!r} gave something that is no number: {error}"
            ) from error
        part = torch.tensor(numbers, dtype=torch.float64)
        if part.isinf().any():
            i = int(part.isinf().nonzero()[0])
            raise ValueError(
                f"reward {name!r} gave {numbers[i]} for the completion {completions[i][:80]!r}; "
                "a reward must be finite, or None where there is none"
            )
        total += term.weight * torch.where(present, part, 0.0)  # a NaN given as a number stays
        applies |= present
        parts[name] = part.float()
    return Scores(torch.where(applies, total, math.nan).float(), parts)


class MarkedAnswer:
    """1 where the text behind the last marker equals the row's answer, else 0.

    Args:
        marker: Text before the answer; empty compares the whole completion.
        column: Column of the data with the right answer.

    >>> MarkedAnswer("answer: ")([{"answer": "7"}] * 3, ["3+4=7, answer: 7", "answer: 71", "7"])
    [1.0, 0.0, 0.0]
    """

    def __init__(self, marker: str = "answer: ", column: str = "answer") -> None:
        self.marker = marker
        self.column = column

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """Score B completions; a row without the column is a ``ValueError`` that names it."""
        rewards: list[float | None] = []
        for row, completion in zip(rows, completions, strict=True):
            if self.column not in row:
                raise ValueError(
                    f"the row with prompt {str(row.get('prompt'))[:60]!r} has no column "
                    f"{self.column!r} to compare with; it has {sorted(row)}"
                )
            _, found, answer = (
                completion.rpartition(self.marker) if self.marker else ("", "x", completion)
            )
            rewards.append(float(bool(found) and answer.strip() == str(row[self.column]).strip()))
        return rewards


def overlong_penalty(lengths: Tensor, max_length: int, ramp: int) -> Tensor:
    """Penalise completions that run close to the generation limit.

    Zero while ``max_length - ramp`` tokens or fewer were used, then a straight line down to -1 at
    ``max_length``.

    Args:
        lengths: Completion lengths in tokens, (B,) int.
        max_length: Generation limit in tokens.
        ramp: Width of the slope in tokens, 1 <= ramp <= max_length.

    Returns:
        Penalty in [-1, 0], (B,) float32. Add it to the rewards.

    Raises:
        ValueError: If ``ramp`` is out of range.

    Source:
        DAPO, arXiv:2503.14476, "Overlong Reward Shaping" (L_cache is ``ramp``).

    >>> overlong_penalty(torch.tensor([5, 8, 12]), max_length=10, ramp=4)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    if not 1 <= ramp <= max_length:
        raise ValueError(f"overlong_ramp must be in [1, {max_length}] tokens, got {ramp}")
    excess = lengths.float() - (max_length - ramp)  # tokens past the free zone
    return 0.0 - (excess / ramp).clamp(0, 1)
