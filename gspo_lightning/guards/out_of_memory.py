"""Out of memory: what counts as that, and how a pass is repeated with less at once.

Decides that a size is halved, for the rest of the run, until the pass fits or one row is too much.
"""

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gspo_lightning.engine.head import is_full
from gspo_lightning.rollout import Samples

MICRO, TOKENS = "micro_batch_size", "micro_batch_tokens"
SAMPLED, REFERRED = "sampler.batch_size", "reference.batch_size"
Result = TypeVar("Result")
Cut = Callable[[int | None, int | None], Sequence[Sized]]  # as ``Samples.micro_batch_indices``


class OutOfMemory(RuntimeError):
    """Memory does not suffice and nothing more can be done about it here: why, in one line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    return isinstance(error, OutOfMemory) or is_full(error)


@dataclass
class Sizes:
    """How much is computed at once.

    Attributes:
        now: Size by setting. ``None`` stands for all rows, or for no limit on tokens.
        start: The sizes that the settings asked for.
        shared: Settings of passes that all ranks make together, so that none is made again.
    """

    now: dict[str, int | None]
    shared: tuple[str, ...] = ()
    start: dict[str, int | None] = field(init=False)

    def __post_init__(self) -> None:
        self.start = dict(self.now)

    def pieces(self, samples: Samples, default: int | None = None) -> list[Tensor]:
        """Cut samples into micro-batches, of ``default`` rows where no setting limits the rows."""
        return samples.micro_batch_indices(self.now[MICRO] or default, self.now[TOKENS])

    def fit(
        self, key: str, rows: int, what: str, work: Callable[[], Result], cut: Cut | None = None
    ) -> Result:
        """Do ``work``, and do it again with half of ``key`` at once whenever memory is short.

        Args:
            key: The setting that decides how much ``work`` does at once.
            rows: How much there is to do.
            what: The work in words, for the line that is said.
            work: Called without arguments; nothing of a failed call may remain.
            cut: Cuts what is passed into pieces of limited rows and tokens; ``None`` where no limit
                on tokens is to be halved.

        Raises:
            OutOfMemory: If one row at once is too much, or nothing here decides the size.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                    raise
                if key in self.shared:
                    raise OutOfMemory(
                        f"out of memory in {what} ({key} {self.now.get(key) or rows}), in a pass "
                        f"that other ranks share; continue with a smaller {key}"
                    ) from error
            # Halve outside the handler: the error keeps the tensors of the failed pass alive.
            self.halve(key, rows, what, cut)

    def halve(self, key: str, rows: int, what: str, cut: Cut | None = None) -> None:
        """Give memory back, halve a size, or the limit on tokens if that decides, and say so.

        Raises:
            OutOfMemory: As ``fit``.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if key not in self.now:
            raise OutOfMemory(f"out of memory in {what}, and there is no {key} to make smaller")
        size = min(self.now[key] or rows, rows)
        tokens = self.now.get(TOKENS) if key == MICRO else None
        if tokens and cut is not None:
            pieces = cut(size, tokens)
            if tokens == 1 or max(map(len, pieces)) <= 1:
                sizes = f"{key} {size}, {TOKENS} {tokens}"
                raise OutOfMemory(f"out of memory in {what}, with one row at once ({sizes})")
            if len(pieces) > len(cut(size, None)):  # the limit on tokens bounds the pass
                less = tokens // 2
                while less > 1 and len(cut(size, less)) <= len(pieces):  # no piece shrinks
                    less //= 2
                return self._change(TOKENS, tokens, less, what)
        if size <= 1:
            raise OutOfMemory(f"out of memory in {what}, with one row at once ({key} 1)")
        self._change(key, size, size // 2, what)

    def check_repeatable(self, error: Exception, place: str, moved: bool, shared: bool) -> None:
        """Raise an error again unless memory was short and an update can be done from its start.

        Args:
            error: What ended the update's passes.
            place: The update in words.
            moved: Whether weights have moved since the rollout was collected.
            shared: Whether the pass was one that other ranks share.
        """
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise error
        key = MICRO if self.now[TOKENS] is None else TOKENS
        short = f"out of memory in {place} ({key} {self.now[key]})"
        if moved:
            raise OutOfMemory(
                f"{short}, after the first step of the rollout, which cannot be repeated; continue "
                f"from the last checkpoint with a smaller model.init_args.{key}"
            ) from error
        if shared:
            raise OutOfMemory(
                f"{short}, in a pass that other ranks share; continue with a smaller "
                f"model.init_args.{key}"
            ) from error

    def _change(self, key: str, old: int, new: int, what: str) -> None:
        self.now[key] = new
        line = f"out of memory in {what}: {key} {old} -> {new} for the rest of the run"
        warnings.warn(line, stacklevel=3)

    def numbers(self) -> list[int]:
        """The sizes in the order of ``start``, 0 for ``None``."""
        return [self.now[key] or 0 for key in self.start]

    def state(self, ranks: list[list[int]]) -> dict[str, Any]:
        """Plain values for a checkpoint; ``ranks`` has the ``numbers`` of each rank, in order."""
        return {"start": {key: size or 0 for key, size in self.start.items()}, "now": ranks}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Continue with the sizes that a run ended with, where its settings were those of now."""
        now = state["now"][rank] if rank < len(state["now"]) else []
        saved = dict(zip(state["start"], now, strict=False))
        for key, size in self.start.items():
            if key in saved and state["start"][key] == (size or 0):
                self.now[key] = saved[key] or None
