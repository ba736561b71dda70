"""Batches in an order that can be resumed: which examples come next, how many were served."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gspo_lightning.rollout import stream_seed


def pad(sequences: list[list[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Stack id lists into ids (N, length) int64 and a mask (N, length) bool, True on real ids.

    Padded ids are 0: no mask is ever derived from ids, so the value is free.

    >>> pad([[5], [6, 7]], "left")[0].tolist()
    [[0, 5], [6, 7]]
    """
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    ids, mask = (pad_sequence(x, batch_first=True, padding_side=side) for x in (rows, real))
    return ids, mask


@dataclass(eq=False)
class ResumableStream:
    """Batches of examples without end, in an order that is a function of (seed, pass).

    Sized, because Lightning fetches one batch ahead from a loader without a length, and a batch
    fetched ahead is lost on resume. The position moves before a batch is handed out for the same
    reason: what was handed out counts as served.
    """

    examples: list[Any]
    collate: Callable[[list[Any]], Any]
    batch_size: int
    num_batches: int
    seed: int
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    served: int = 0  # over all ranks
    _order: tuple[int, list[int]] = (-1, [])  # of the newest pass

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.draw(self.batch_size)

    def draw(self, count: int) -> Any:
        """The next ``count`` examples of this rank, collated. Every rank must draw alike."""
        return self.share([count] * self.world_size)

    def ahead(self, count: int) -> Any:
        """What :meth:`draw` gives next, without serving it."""
        served = self.served
        examples = self.draw(count)
        self.served = served
        return examples

    def share(self, counts: Sequence[int]) -> Any:
        """The next examples of this rank, collated, where ranks need different numbers.

        Args:
            counts: How many each rank gets. Every rank must say the same, also one that gets none,
                so that all stay at one place in the data.

        Returns:
            None for a rank that gets none.
        """
        start = self.served + sum(counts[: self.rank])
        self.served += sum(counts)
        examples = [self._example(i) for i in range(start, start + counts[self.rank])]
        return self.collate(examples) if examples else None

    def _example(self, position: int) -> Any:
        epoch, offset = divmod(position, len(self.examples))
        if not self.shuffle:
            return self.examples[offset]
        if self._order[0] != epoch:
            seed = stream_seed(self.seed, epoch, 0, "data order")
            generator = torch.Generator().manual_seed(seed)
            self._order = (epoch, torch.randperm(len(self.examples), generator=generator).tolist())
        return self.examples[self._order[1][offset]]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]
