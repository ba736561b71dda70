"""Rows that are given tokens between those they draw.

Decides when a turn of a row ends, that the tokens it is given then come instead of draws, and which
columns were drawn. Who answers is not known here: it is a function of token ids.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DRAWN = -1  # in place of the id of a token that is not given


class Ended(NamedTuple):
    """A turn that ended: the row, what it drew in the turn, and the tokens it may still have."""

    row: int
    ids: list[int]
    room: int


class Watch(Protocol):
    """Sees drawn tokens and looks for stop strings: ``texts.Watch``."""

    def __call__(self, row: int, token: int) -> bool:
        """Whether the turn ends with the next token of a row."""
        ...

    def go_on(self, row: int, ids: list[int]) -> None:
        """Begin anew behind tokens that the row is given."""
        ...


# What each row is given, fewer tokens than its room; None where the row is over.
Answer = Callable[[list[Ended]], list[list[int] | None]]


class Turns:
    """The turns of a rollout, row by row.

    Args:
        answer: Called with the turns that ended at a step, in the order of the rows that run.
        num_rows: B.
        limit: Tokens of a row at most.
        eos_ids: All ids that end a turn.
        watch: Says whether a stop string ends it; ``None`` where there are none.
    """

    def __init__(
        self,
        answer: Answer,
        num_rows: int,
        limit: int,
        eos_ids: Sequence[int],
        watch: Watch | None = None,
    ) -> None:
        self.answer, self.limit, self.eos_ids, self.watch = answer, limit, eos_ids, watch
        self.lengths = [0] * num_rows
        self.open: list[list[int]] = [[] for _ in range(num_rows)]  # drawn in the turn under way
        self.holes: list[tuple[int, int, int]] = []  # row, first column, the one behind the last
        self._given: dict[int, deque[int]] = {}

    def given(self, rows: Sequence[int]) -> list[int] | None:
        """The next token of each row that is not to draw, ``DRAWN`` elsewhere.

        ``None`` where all draw.
        """
        if not self._given:
            return None
        return [self._given[row][0] if row in self._given else DRAWN for row in rows]

    def over(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Take the next token of each row; whether the row is over, its limit aside."""
        return self._answered([self._take(*each) for each in zip(rows, tokens, strict=True)])

    def over_with(self, rows: Sequence[int], runs: Sequence[Sequence[int]]) -> list[bool]:
        """As ``over``, of tokens that rows drew at once: of each row up to the end of its turn."""
        ended: list[Ended | None] = []
        for row, run in zip(rows, runs, strict=True):
            taken = (self._take(row, token) for token in run)
            ended.append(next(filter(None, taken), None))
        return self._answered(ended)

    def _take(self, row: int, token: int) -> Ended | None:
        """Take a row's next token; the turn that ends with it."""
        self.lengths[row] += 1
        if row in self._given:
            self._given[row].popleft()
            if not self._given[row]:
                del self._given[row]
            return None
        self.open[row].append(token)
        if token in self.eos_ids or (self.watch is not None and self.watch(row, token)):
            return Ended(row, self.open[row], self.limit - self.lengths[row])
        return None

    def _answered(self, ended: Sequence[Ended | None]) -> list[bool]:
        """Ask for answers to the turns that ended, all at once; whether the rows are over."""
        asked = [turn for turn in ended if turn is not None]
        if not asked:  # as at most steps
            return [False] * len(ended)
        answers = iter(self.answer(asked))
        over = []
        for turn in ended:
            ids = [] if turn is None else next(answers)
            over.append(ids is None)
            if turn is not None:
                self._begin(turn.row, ids or [])
        return over

    def _begin(self, row: int, ids: list[int]) -> None:
        self.open[row] = []
        if self.watch is not None:
            self.watch.go_on(row, ids)
        if not ids:
            return
        self._given[row] = deque(ids)
        start = self.lengths[row]
        self.holes.append((row, start, start + len(ids)))

    def long(self, row: int, least: int) -> list[int]:
        """Take all tokens that a row is given next, if there are so many: it has read them."""
        waiting = self._given.get(row, ())
        if len(waiting) < least:
            return []
        self.lengths[row] += len(waiting)
        return [*self._given.pop(row)]

    def mask(self) -> Tensor:
        """True where a token was drawn, (B, T) bool."""
        mask = torch.arange(self.limit) < torch.tensor(self.lengths)[:, None]
        for row, start, end in self.holes:
            mask[row, start:end] = False
        return mask


def with_given(given: list[int] | None, token: Tensor) -> Tensor:
    """Drawn tokens, (N,), with those in their places that are given."""
    if given is None:
        return token
    ids = token.new_tensor(given)
    return torch.where(ids == DRAWN, token, ids)
