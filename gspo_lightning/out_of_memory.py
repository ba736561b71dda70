"""Out of memory: what counts as that, and how a pass is repeated with less at once.

Decides that a size is halved, for the rest of the run, until the pass fits or one row is too much.
Leaves out which passes may be repeated (``collect``, ``update``).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class OutOfMemory(RuntimeError):
    """Memory does not suffice and nothing more can be done about it here: why, in one line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    # the CPU's allocator has no error of its own
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class BatchSizes:
    """How much is computed at once, by the name of the setting.

    Args:
        owners: Which object has each setting; the last part of the name is its attribute there. A
            value of None stands for all rows.
    """

    def __init__(self, owners: Mapping[str, Any]) -> None:
        self.owners = dict(owners)
        self.start = self.now()

    def now(self) -> dict[str, int]:
        """The sizes, 0 for None."""
        return {
            key: getattr(owner, key.rpartition(".")[2]) or 0 for key, owner in self.owners.items()
        }

    def set(self, key: str, size: int) -> None:
        """Change a size; 0 stands for None."""
        setattr(self.owners[key], key.rpartition(".")[2], size or None)

    def fit(self, key: str, rows: int, what: str, work: Callable[[], Result]) -> Result:
        """Do ``work``, and do it again with half of ``key`` at once whenever memory is short.

        Args:
            key: The setting that decides how much ``work`` does at once.
            rows: How much there is to do.
            what: The work in words, for the line that is said.
            work: Called without arguments; nothing of a failed call may remain.

        Raises:
            OutOfMemory: If one row at once is too much, or nothing here decides the size.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                    raise
            # not in the handler: what it holds keeps the tensors of the failed pass alive
            self.halve(key, rows, what)

    def halve(self, key: str, rows: int, what: str) -> None:
        """Give memory back, halve a size and say so.

        Raises:
            OutOfMemory: As ``fit``.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if key not in self.owners:
            raise OutOfMemory(f"out of memory in {what}, and there is no {key} to make smaller")
        size = min(self.now()[key] or rows, rows)
        if size <= 1:
            raise OutOfMemory(f"out of memory in {what}, with one row at once ({key} 1)")
        self.set(key, size // 2)
        warnings.warn(
            f"out of memory in {what}: {key} {size} -> {size // 2} for the rest of the run",
            stacklevel=2,
        )

    def state(self, now: Any) -> dict[str, Any]:
        """Plain values for a checkpoint; ``now`` has the sizes of each rank, in order."""
        return {"start": self.start, "now": now}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Continue with the sizes that a run ended with, where its settings were those of now."""
        now = state["now"][rank] if rank < len(state["now"]) else []
        for (key, size), saved in zip(self.start.items(), now, strict=False):
            if state["start"].get(key) == size:
                self.set(key, saved)
