"""Out of memory: what counts as that, and how a pass is repeated with less at once.

Decides that a size is halved, for the rest of the run, until the pass fits or one row is too much.
Leaves out which passes may be repeated (``collect``, ``update``).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, TypeVar

import torch

TOKENS = "micro_batch_tokens"
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
            value of None stands for all rows, or for no limit on tokens.
        tokens: By a setting that limits the rows of a pass, the one that limits its tokens.

    Attributes:
        cut: Cuts what is passed at present into pieces of limited rows and tokens, as
            ``Samples.micro_batch_indices``; None where no limit on tokens is to be halved.
    """

    def __init__(self, owners: Mapping[str, Any], tokens: Mapping[str, str] | None = None) -> None:
        self.owners = dict(owners)
        self.tokens = dict(tokens or {})
        self.cut: Callable[[int | None, int | None], Sequence[Sized]] | None = None
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
        """Give memory back, halve a size, or the limit on tokens if that decides, and say so.

        Raises:
            OutOfMemory: As ``fit``.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if key not in self.owners:
            raise OutOfMemory(f"out of memory in {what}, and there is no {key} to make smaller")
        size = min(self.now()[key] or rows, rows)
        budget = self.tokens.get(key, "")
        tokens = self.now().get(budget, 0)
        if tokens and self.cut is not None:
            pieces = self.cut(size, tokens)
            if tokens == 1 or max(map(len, pieces)) <= 1:
                raise OutOfMemory(
                    f"out of memory in {what}, with one row at once ({key} {size}, {budget} "
                    f"{tokens})"
                )
            if len(pieces) > len(self.cut(size, None)):  # it is tokens that bound the pass
                less = tokens // 2
                while less > 1 and len(self.cut(size, less)) <= len(pieces):  # all would stay
                    less //= 2
                return self._change(budget, tokens, less, what)
        if size <= 1:
            raise OutOfMemory(f"out of memory in {what}, with one row at once ({key} 1)")
        self._change(key, size, size // 2, what)

    def _change(self, key: str, old: int, new: int, what: str) -> None:
        self.set(key, new)
        line = f"out of memory in {what}: {key} {old} -> {new} for the rest of the run"
        warnings.warn(line, stacklevel=3)

    def state(self, now: Any) -> dict[str, Any]:
        """Plain values for a checkpoint; ``now`` has the sizes of each rank, in order."""
        return {"start": self.start, "now": now}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Continue with the sizes that a run ended with, where its settings were those of now."""
        now = state["now"][rank] if rank < len(state["now"]) else []
        saved = dict(zip(state["start"], now, strict=False))
        for key, size in self.start.items():
            if key in saved and state["start"][key] == size:
                self.set(key, saved[key])
